//! The rules of the house that no compiler holds: read over the sources of the whole repository.
//!
//! Each rule is a function from a file's path and text to what is wrong with it, and each is tried on an example that
//! breaks it, so that none is a rule that cannot fail.

use std::fs;
use std::path::{Path, PathBuf};

/// Most lines of a source file.
const LINES_MAX: usize = 700;
/// Folders that are not ours to judge.
const NOT_SOURCES: [&str; 6] = ["target", ".git", "shkv-data", "corpus", "artifacts", "coverage"];

/// A file of the repository: its path from the top with `/` between the parts, and its text.
struct Source {
    path: String,
    text: String,
}

/// What is wrong with a file; empty when nothing is.
type Rule = fn(&Source) -> Vec<String>;

// ---------------------------------------------------------------------------------------------- the files

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests are inside the repository").to_owned()
}

fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    let top = top();
    walk(&top, &top, &mut found);
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(found.iter().any(|source| source.path == "proto/src/lib.rs"), "the walk does not find the sources");
    found
}

fn walk(top: &Path, folder: &Path, found: &mut Vec<Source>) {
    for entry in fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("a readable entry").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if !NOT_SOURCES.contains(&name.as_str()) {
                walk(top, &path, found);
            }
        } else if let Ok(text) = fs::read_to_string(&path)
            && is_ours(&name)
        {
            let path = path.strip_prefix(top).expect("a path below the top").to_string_lossy().replace('\\', "/");
            found.push(Source { path, text });
        }
    }
}

fn is_ours(name: &str) -> bool {
    let kinds = [".rs", ".toml", ".md", ".yaml", ".yml", ".txt"];
    name == "run" || name == "Dockerfile" || kinds.iter().any(|kind| name.ends_with(kind))
}

fn check(rule: Rule) {
    let wrong: Vec<String> = sources().iter().flat_map(rule).collect();
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

fn rust(path: &str, text: &str) -> Source {
    Source { path: path.into(), text: text.into() }
}

/// What the example breaks, in words; it must break the rule, and its neighbour must not.
fn breaks(rule: Rule, bad: &Source, good: &Source) {
    assert!(!rule(bad).is_empty(), "{} should break the rule:\n{}", bad.path, bad.text);
    assert_eq!(rule(good), Vec::<String>::new(), "{} should keep the rule", good.path);
}

/// The lines of a Rust file with their numbers, without what stands behind `//`.
fn code(source: &Source) -> impl Iterator<Item = (usize, &str)> {
    let lines = if source.path.ends_with(".rs") { &source.text[..] } else { "" };
    (1..).zip(lines.lines().map(|line| line.split("//").next().unwrap_or_default()))
}

/// Whether `name` stands in `line` as a word of its own with `suffix` behind it.
fn says(line: &str, name: &str, suffix: &str) -> bool {
    let wanted = format!("{name}{suffix}");
    line.match_indices(&wanted)
        .any(|(at, _)| !line[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_' || before == '-'))
}

// ---------------------------------------------------------------------------------------------- form

fn opens_with_its_purpose(source: &Source) -> Vec<String> {
    if source.path.ends_with(".rs") && !source.text.starts_with("//! ") {
        return vec![format!("{}: does not open with `//!`: what is it for, and what does it never do?", source.path)];
    }
    vec![]
}

#[test]
fn every_source_file_opens_with_its_purpose() {
    breaks(opens_with_its_purpose, &rust("a.rs", "use std::fs;\n"), &rust("a.rs", "//! It is for this.\n"));
    check(opens_with_its_purpose);
}

fn is_short(source: &Source) -> Vec<String> {
    let lines = source.text.lines().count();
    if source.path.ends_with(".rs") && lines > LINES_MAX {
        return vec![format!("{}: {lines} lines, more than {LINES_MAX}: split it, it is two files", source.path)];
    }
    vec![]
}

#[test]
fn no_source_file_needs_a_table_of_contents() {
    breaks(is_short, &rust("a.rs", &"\n".repeat(LINES_MAX + 1)), &rust("a.rs", &"\n".repeat(LINES_MAX)));
    check(is_short);
}

fn has_no_stray_blanks(source: &Source) -> Vec<String> {
    let mut wrong = Vec::new();
    for (number, line) in (1..).zip(source.text.split('\n')) {
        if line.contains('\t') {
            wrong.push(format!("{}:{number}: a tab", source.path));
        }
        if line.ends_with([' ', '\r']) {
            wrong.push(format!("{}:{number}: a blank at the end of the line", source.path));
        }
    }
    if !source.text.is_empty() && !source.text.ends_with('\n') {
        wrong.push(format!("{}: no end of line at the end of the file", source.path));
    }
    wrong
}

#[test]
fn no_line_has_tabs_or_blanks_at_its_end() {
    for bad in ["a\tb\n", "a \n", "a\r\n", "a"] {
        breaks(has_no_stray_blanks, &rust("a.md", bad), &rust("a.md", "a b\n\nc\n"));
    }
    check(has_no_stray_blanks);
}

fn is_finished(source: &Source) -> Vec<String> {
    let unfinished = ["todo", "unimplemented", "dbg"];
    let found = code(source).flat_map(|(number, line)| {
        let said = unfinished.iter().filter(move |name| says(line, name, "!"));
        said.map(move |name| format!("{}:{number}: {name}!", source.path))
    });
    found.collect()
}

#[test]
fn nothing_is_left_unfinished() {
    for name in ["todo", "unimplemented", "dbg"] {
        let bad = rust("a.rs", &format!("fn f() {{ {name}!() }}\n"));
        breaks(is_finished, &bad, &rust("a.rs", &format!("fn f() {{ my_{name}!() }} // {name}!\n")));
    }
    check(is_finished);
}

fn names_no_machine(source: &Source) -> Vec<String> {
    let homes = ["root", "home", "work", "Users"].map(|name| format!("/{name}/"));
    let found = (1..).zip(source.text.lines()).filter(|(_, line)| homes.iter().any(|home| line.contains(home)));
    found.map(|(number, _)| format!("{}:{number}: a path of somebody's machine", source.path)).collect()
}

#[test]
fn no_file_names_a_path_of_one_machine() {
    let bad = rust("a.md", &["see /ho", "me/someone/notes\n"].concat());
    breaks(names_no_machine, &bad, &rust("a.md", "see ../notes and /proc/self/status\n"));
    check(names_no_machine);
}

// ---------------------------------------------------------------------------------------------- boundaries

/// A crate, and where it may be named: the beginnings of paths.
const BOUNDARIES: [(&str, &[&str]); 4] = [
    ("bincode", &["proto/src/codec.rs"]),
    ("redb", &["node/src/store.rs", "node/src/store/"]),
    ("raft", &["node/src/replica.rs", "node/src/replica/"]),
    ("bollard", &["balancer/src/provision/docker.rs", "balancer/src/provisioner/docker.rs", "balancer/src/docker.rs"]),
];

fn keeps_the_boundaries(source: &Source) -> Vec<String> {
    let mut wrong = Vec::new();
    for (name, homes) in BOUNDARIES {
        if homes.iter().any(|home| source.path.starts_with(home)) {
            continue;
        }
        for (number, line) in code(source) {
            let alone = format!("use {name};");
            if says(line, name, "::") && !line.contains(&format!("::{name}::")) || line.trim() == alone {
                wrong.push(format!("{}:{number}: only {} may name {name}", source.path, homes[0]));
            }
        }
    }
    wrong
}

#[test]
fn a_crate_at_a_boundary_is_named_in_one_place() {
    for (name, homes) in BOUNDARIES {
        let text = format!("//! A.\nuse {name}::Thing; // {name}::Thing\n");
        breaks(keeps_the_boundaries, &rust("client/src/lib.rs", &text), &rust(homes[0], &text));
        let other = format!("//! {name}::Thing\nuse my_{name}::Thing;\nuse crate::{name}::Thing;\n");
        breaks(keeps_the_boundaries, &rust("node/src/lib.rs", &format!("use {name};\n")), &rust("a.rs", &other));
    }
    check(keeps_the_boundaries);
}

/// What each crate of the workspace may import of the others.
const ARROWS: [(&str, &[&str]); 6] = [
    ("proto/Cargo.toml", &[]),
    ("node/Cargo.toml", &["shkv-proto"]),
    ("balancer/Cargo.toml", &["shkv-proto"]),
    ("client/Cargo.toml", &["shkv-proto"]),
    ("client/cli/Cargo.toml", &["shkv-proto", "shkv-node", "shkv-balancer", "shkv-client", "shkv-tests"]),
    ("tests/Cargo.toml", &["shkv-proto", "shkv-node", "shkv-balancer", "shkv-client"]),
];

fn points_at_proto_only(source: &Source) -> Vec<String> {
    let Some((_, allowed)) = ARROWS.iter().find(|(path, _)| source.path == *path) else { return vec![] };
    let (mut wrong, mut in_dependencies) = (Vec::new(), false);
    for line in source.text.lines() {
        if let Some(section) = line.strip_prefix('[') {
            in_dependencies = section.contains("dependencies");
        }
        let name = line.split(['.', '=', ' ', ']']).next().unwrap_or_default();
        let name =
            name.strip_prefix("[dependencies").map_or(name, |_| line.split(['.', ']']).nth(1).unwrap_or_default());
        if in_dependencies && name.starts_with("shkv") && !allowed.contains(&name) {
            wrong.push(format!("{}: may not import {name}", source.path));
        }
    }
    wrong
}

#[test]
fn node_balancer_and_client_do_not_import_each_other() {
    let manifest = |path: &str, line: &str| rust(path, &format!("[package]\nname = \"shkv\"\n{line}\n"));
    for bad in ["[dependencies]\nshkv-node.workspace = true", "[dev-dependencies]\nshkv-node = { path = \"../node\" }"]
    {
        breaks(points_at_proto_only, &manifest("client/Cargo.toml", bad), &manifest("client/cli/Cargo.toml", bad));
    }
    let good = "[dependencies]\nshkv-proto.workspace = true";
    breaks(points_at_proto_only, &manifest("proto/Cargo.toml", good), &manifest("node/Cargo.toml", good));
    let found: Vec<String> = sources().into_iter().map(|source| source.path).collect();
    for (path, _) in ARROWS {
        assert!(found.iter().any(|found| found == path), "no {path}: has the house been rebuilt?");
    }
    check(points_at_proto_only);
}

fn gives_reasons_for_dependencies(source: &Source) -> Vec<String> {
    if source.path != "Cargo.toml" {
        return vec![];
    }
    let lines = (1..).zip(source.text.lines()).skip_while(|(_, line)| *line != "[workspace.dependencies]").skip(1);
    let lines = lines.take_while(|(_, line)| !line.starts_with('['));
    let bare = lines.filter(|(_, line)| {
        let (dependency, reason) = line.split_once('#').unwrap_or((line, ""));
        let is_ours = dependency.starts_with("shkv-");
        !dependency.trim().is_empty() && !is_ours && reason.trim().len() < 4
    });
    bare.map(|(number, line)| format!("{}:{number}: no reason behind `{line}`", source.path)).collect()
}

#[test]
fn every_dependency_has_a_reason() {
    let manifest =
        |line: &str| rust("Cargo.toml", &format!("[workspace.dependencies]\nshkv-x = {{}}\n\n{line}\n[lints]\n"));
    for bad in ["x = \"1\"", "x = \"1\" # x", "x = \"1\" #"] {
        breaks(gives_reasons_for_dependencies, &manifest(bad), &manifest("x = \"1\" # keeps the y"));
    }
    let source = sources().into_iter().find(|source| source.path == "Cargo.toml").expect("the workspace's manifest");
    assert!(source.text.contains("[workspace.dependencies]"));
    check(gives_reasons_for_dependencies);
}

// ---------------------------------------------------------------------------------------------- guarantees

/// What is wrong with the table under `## Guarantees`: each row's last column names the tests that hold the promise,
/// each in backticks, alone or behind its module's path.
fn unheld_guarantees(readme: &str, has_test: impl Fn(&str) -> bool) -> Vec<String> {
    let Some(section) =
        format!("\n{readme}").split("\n## ").find_map(|part| part.strip_prefix("Guarantees\n").map(str::to_owned))
    else {
        return vec!["README.md: no heading `## Guarantees`".into()];
    };
    let rows: Vec<&str> = section.lines().filter(|line| line.trim_start().starts_with('|')).skip(2).collect();
    if rows.is_empty() {
        return vec!["README.md: no table of guarantees".into()];
    }
    let mut wrong = Vec::new();
    for row in rows {
        let last = row.trim().trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        let names: Vec<&str> = last.split('`').skip(1).step_by(2).collect();
        if names.is_empty() {
            wrong.push(format!("README.md: nothing holds this guarantee: {row}"));
        }
        for name in names {
            if !has_test(name.rsplit("::").next().unwrap_or_default()) {
                wrong.push(format!("README.md: no test `{name}`, which should hold: {row}"));
            }
        }
    }
    wrong
}

#[test]
fn every_guarantee_names_tests_that_exist() {
    let table = |row: &str| {
        format!("# A\n\n## Guarantees\n\n| promise | held by |\n|---|---|\n{row}\n\n## Next\n| a | `b` |\n")
    };
    let has_test = |name: &str| name == "it_holds" || name == "it_holds_too";
    for bad in
        ["| It holds. | `it_fails` |", "| It holds. | |", "| It `it_holds`. | a test |", "| It | `it_holds`, `x` |", ""]
    {
        assert!(!unheld_guarantees(&table(bad), has_test).is_empty(), "{bad}");
    }
    assert!(!unheld_guarantees("# A\n\n## Caveats\n", has_test).is_empty());
    for good in ["| It holds. | `it_holds` |", "| It | `node::tests::it_holds`, `it_holds_too` |"] {
        assert_eq!(unheld_guarantees(&table(good), has_test), Vec::<String>::new());
    }

    let sources = sources();
    let readme = sources.iter().find(|source| source.path == "README.md").expect("the repository has a README.md");
    let has_test = |name: &str| {
        let wanted = format!("fn {name}(");
        !name.is_empty() && sources.iter().any(|source| code(source).any(|(_, line)| line.contains(&wanted)))
    };
    let wrong = unheld_guarantees(&readme.text, has_test);
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}
