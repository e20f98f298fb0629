//! The binary `shkv`: every role of a cluster, and the client's commands. Here it only starts and ends; each group of
//! commands has a file of its own.

mod args;
mod children;
mod hashing;
mod keyspaces;
mod load;
mod loading;
mod local;
mod members;
mod operate;
mod outcome;
mod output;
mod point;
mod progress;
mod range;
mod record;
mod roles;
mod sizes;
mod status;
mod txn;
mod up;

use args::{Cli, Command};
use clap::CommandFactory;
use outcome::{Ending, Trouble};
use status::What;
use std::process::ExitCode;
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long tasks that still run may take to end when the command is over.
const RUNTIME_END_MAX: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let cli = match Cli::from_command_line() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    output::log_to_stderr(cli.command.serves());
    if cli.command.serves() {
        roles::open_more_files();
    }
    let format = cli.global.output;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if cli.command.serves() {
        runtime.worker_threads(serving_threads());
    }
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return outcome::end(Err(Trouble::Failed(format!("no threads to run on: {error}"))), format),
    };
    let ending = runtime.block_on(Box::pin(run(cli)));
    runtime.shutdown_timeout(RUNTIME_END_MAX);
    outcome::end(ending, format)
}

/// Threads of a process that serves, beside those of its nodes: for half of the processors, because the clients and nodes that keep it
/// busy have use for the others. With one for each of two, a request that was forwarded cost a quarter more: threads woke each other.
fn serving_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1))
}

async fn run(cli: Cli) -> Result<Ending, Trouble> {
    let global = &cli.global;
    match cli.command {
        Command::Up(args) => up::run(global, args).await,
        Command::Node(args) => roles::node(global, args).await,
        Command::Balancer(args) => roles::balancer(global, args).await,
        Command::Serve(args) => roles::serve(global, args).await,
        Command::Put(args) => point::put(global, args).await,
        Command::Get(args) => point::get(global, args).await,
        Command::Del(args) => point::del(global, args).await,
        Command::Txn => txn::run(global).await,
        Command::Range(args) => range::range(global, args).await,
        Command::Count(args) => range::count(global, args).await,
        Command::Load(args) => load::run(global, args).await,
        Command::Status => status::run(global, What::All).await,
        Command::Nodes => status::run(global, What::Nodes).await,
        Command::Shards => status::run(global, What::Shards).await,
        Command::Keyspace(args) => keyspaces::run(global, args).await,
        Command::Add(args) => operate::add(global, args).await,
        Command::Rm(args) => operate::rm(global, args).await,
        Command::Drain(args) => operate::drain(global, args).await,
        Command::Transfer(args) => operate::transfer(global, args).await,
        Command::Ping => operate::ping(global).await,
        Command::Hashing(args) => hashing::run(global, &args),
        Command::Completion(args) => output::completion(args.shell, Cli::command()),
    }
}
