//! The recipes of `docs/trace.md` work on the events that it shows.

use std::fs;
use std::process::Command;

const DOC: &str = include_str!("../../docs/trace.md");

/// The commands of the chapter that read a saved trace, each with its further lines.
fn commands() -> Vec<String> {
    let (_, chapter) = DOC.split_once("## Recipes").unwrap();
    let mut commands: Vec<String> = Vec::new();
    let mut open = false;
    for line in chapter.lines() {
        match line.strip_prefix("host# ") {
            Some(command) => commands.push(command.into()),
            None if open => *commands.last_mut().unwrap() += &format!("\n{line}"),
            None => continue,
        }
        // A command continues while a quote is open, and after a pipe.
        let command = commands.last().unwrap();
        open = command.matches('\'').count() % 2 == 1 || command.ends_with('|');
    }
    commands.retain(|command| command.starts_with("jq ") && command.contains(" trace.jsonl"));
    commands
}

#[test]
fn every_recipe_finds_something() {
    let folder = tempfile::tempdir().unwrap();
    let events: String =
        DOC.lines().filter(|line| line.starts_with("{\"t\":50000")).map(|l| format!("{l}\n")).collect();
    fs::write(folder.path().join("trace.jsonl"), events).unwrap();
    fs::create_dir(folder.path().join("docs")).unwrap();
    let program = include_str!("../../docs/iova.jq");
    fs::write(folder.path().join("docs/iova.jq"), program).unwrap();
    let shown = DOC.split_once("host# cat docs/iova.jq\n").unwrap().1;
    assert!(program.ends_with(shown.split_once("host# ").unwrap().0), "docs/trace.md shows another iova.jq");
    let commands = commands();
    assert!(commands.len() >= 9, "{commands:#?}");
    for command in commands {
        // Use an address that the events have.
        let command = command.replace("0xfff21000", "0xffffe000");
        let script = format!("set -o pipefail; {command}");
        let output = Command::new("bash").args(["-c", &script]).current_dir(folder.path()).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {error} (scripts/setup installs jq)");
        assert!(!output.stdout.is_empty(), "{command} finds nothing");
    }
}
