//! What the system says of processes of this machine: memory, and bytes sent over loopback.
//!
//! Bytes written to the disk are left out: the system counts whole folios, a megabyte for an append of some hundred bytes.
//!
//! A number that the system does not tell is not told here either; there is none but on Linux.

use std::fs;

/// Names of processes that are looked at, so that the number of a stranger is not taken for a server of another
/// machine's.
const SERVERS: [&str; 3] = ["shkv", "redis-server", "etcd"];

/// A process of this machine, if it is a server.
fn is_server(process: u32) -> bool {
    let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    SERVERS.contains(&name.trim())
}

/// Bytes of memory that servers of this machine hold.
pub fn memory_bytes(processes: impl Iterator<Item = u32>) -> u64 {
    let of = |process| {
        let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        number(&text, "VmRSS:").map_or(0, |kib| kib * 1_024)
    };
    processes.filter(|process| is_server(*process)).map(of).sum()
}

/// Processor time of each process of this machine that has this name, in microseconds. Only that of its first thread.
pub fn cpu_us(name: &str) -> Vec<(u32, u64)> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let of = |process: u32| {
        let is_it = fs::read_to_string(format!("/proc/{process}/comm")).is_ok_and(|found| found.trim() == name);
        let text = is_it.then(|| fs::read_to_string(format!("/proc/{process}/schedstat")).ok())??;
        Some((process, text.split_whitespace().next()?.parse::<u64>().ok()? / 1_000))
    };
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(of).collect()
}

/// Bytes that went over this machine's loopback, whoever sent them.
pub fn loopback_bytes() -> Option<u64> {
    number(&fs::read_to_string("/proc/net/dev").ok()?, "lo:")
}

/// The number behind a name at the beginning of a line.
fn number(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.trim_start().strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_their_names() {
        let text = "Name:\tshkv\nVmRSS:\t   1234 kB\n    lo: 99 1 0\n";
        assert_eq!((number(text, "VmRSS:"), number(text, "lo:"), number(text, "io:")), (Some(1234), Some(99), None));
    }

    #[test]
    fn processor_time_is_found_by_a_processs_name() {
        let own = fs::read_to_string("/proc/self/comm").unwrap();
        let found = cpu_us(own.trim());
        assert!(found.iter().any(|(process, _)| *process == std::process::id()), "{found:?}");
        assert_eq!(cpu_us("no process has this name"), []);
    }

    #[test]
    fn a_process_that_is_no_server_is_not_counted() {
        let own = std::process::id(); // of the test, whose name is none of a server
        assert_eq!(memory_bytes([own].into_iter()), 0);
    }
}
