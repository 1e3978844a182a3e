//! The documentation: every command in it exists with its flags, every link leads somewhere.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use harness::cluster::{binary, repository};

use crate::rehearsal::kubectl_takes;

/// Pages for users.
pub(crate) fn pages() -> Result<Vec<PathBuf>> {
    fn collect(directory: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                collect(&path, into)?;
            } else if path.extension().is_some_and(|extension| extension == "md") {
                into.push(path);
            }
        }
        Ok(())
    }
    let mut pages = vec![repository().join("README.md")];
    collect(&repository().join("deploy"), &mut pages)?;
    ensure!(pages.len() > 10, "{pages:?}");
    Ok(pages)
}

/// A page's inline code. Its blocks of commands are run by rehearsal.rs.
fn commands(page: &str) -> Vec<String> {
    let mut is_text = true;
    let mut commands = Vec::new();
    for line in page.lines() {
        if line.trim_start().starts_with("```") {
            is_text = !is_text;
        } else if is_text {
            commands.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    commands
}

/// The words of a command up to where the shell takes over.
fn words(command: &str) -> Vec<&str> {
    let command = command.split(" #").next().unwrap_or_default();
    let is_end =
        |word: &&str| !matches!(*word, "|" | ">" | "<" | "&" | "&&" | ";" | "||") && !word.starts_with(['>', '<']);
    command.split_whitespace().take_while(is_end).collect()
}

/// What `--help` of these subcommands says; empty where they do not exist.
fn help(cache: &mut BTreeMap<String, String>, program: &str, subcommands: &[&str]) -> Result<String> {
    let key = format!("{program} {}", subcommands.join(" "));
    if let Some(known) = cache.get(&key) {
        return Ok(known.clone());
    }
    let output = Command::new(binary(program)?).args(subcommands).arg("--help").output()?;
    let said = if output.status.success() { String::from_utf8(output.stdout)? } else { String::new() };
    cache.insert(key, said.clone());
    Ok(said)
}

#[test]
fn every_command_exists() -> Result<()> {
    let mut cache = BTreeMap::new();
    let mut checked = 0;
    for page in pages()? {
        let content = std::fs::read_to_string(&page)?;
        for command in commands(&content) {
            if let ["kubectl", arguments @ ..] = &words(&command)[..] {
                kubectl_takes(arguments).with_context(|| format!("{}: {command}", page.display()))?;
                checked += 1;
            }
            for part in command.split("do ").flat_map(|part| part.split("&& ")) {
                let words = words(part);
                // Behind variables, `docker compose run`, and the like.
                let Some(start) = words.iter().position(|word| {
                    let name = word.rsplit('/').next().unwrap_or_default();
                    matches!(name, "turnctl" | "relay-node" | "controller")
                        && (!word.contains('/') || word.starts_with("target"))
                }) else {
                    continue;
                };
                let called = words[..start].iter().all(|word| word.contains('=') || matches!(*word, "run" | "--rm"))
                    || words[..start].contains(&"--rm");
                if !called || words.len() == start + 1 {
                    continue;
                }
                let (program, arguments) = (words[start], &words[start + 1..]);
                check(&mut cache, program, arguments).with_context(|| format!("{}: {command}", page.display()))?;
                checked += 1;
            }
        }
    }
    ensure!(checked > 40, "{checked} commands were found");
    Ok(())
}

fn check(cache: &mut BTreeMap<String, String>, program: &str, arguments: &[&str]) -> Result<()> {
    let mut subcommands: Vec<&str> = Vec::new();
    let mut said = help(cache, program, &[])?;
    if program == "turnctl" {
        // Global options with their values may come first.
        let mut rest = arguments.iter().copied().peekable();
        while let Some(word) = rest.next() {
            if word.starts_with("--") && subcommands.is_empty() {
                rest.next();
                continue;
            }
            let names = word.split(['|', ',']).next().unwrap_or_default();
            let mut longer = subcommands.clone();
            longer.push(names);
            if word.starts_with('-') || !word.starts_with(|c: char| c.is_ascii_lowercase()) {
                break;
            }
            let deeper = help(cache, program, &longer)?;
            if deeper.is_empty() || !said.contains("Commands:") {
                ensure!(!subcommands.is_empty() || arguments[0].starts_with('-'), "there is no turnctl {word}");
                break;
            }
            (said, subcommands) = (deeper, longer);
        }
        // A line that ends among the global options is the first half of a command.
        ensure!(!subcommands.is_empty() || arguments[0].starts_with('-'), "no subcommand");
    }
    for flag in arguments.iter().filter(|word| word.starts_with('-') && word.len() > 1) {
        let flag = flag.trim_start_matches('[').trim_end_matches([']', ',', '.', ';']);
        let name = flag.split('=').next().unwrap_or_default();
        let stands = |end: &str| said.contains(&format!("{name}{end}"));
        let there = [" ", ",", "\n", "[", "="].iter().any(|end| stands(end));
        ensure!(there, "{program} {} has no {name}", subcommands.join(" "));
    }
    Ok(())
}

#[test]
fn every_link_leads_somewhere() -> Result<()> {
    for page in pages()? {
        let content = std::fs::read_to_string(&page)?;
        for link in content.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") || link.contains(' ') {
                continue;
            }
            let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
            let target = if file.is_empty() { page.clone() } else { page.parent().context("a directory")?.join(file) };
            ensure!(target.exists(), "{}: {link} leads nowhere", page.display());
            if let Some(anchor) = anchor {
                let there = std::fs::read_to_string(&target)?;
                let headings = there.lines().filter(|line| line.starts_with('#')).map(anchor_of);
                ensure!(
                    headings.into_iter().any(|heading| heading == anchor),
                    "{}: no heading for {link}",
                    page.display()
                );
            }
        }
    }
    Ok(())
}

/// As the pages of a forge make it.
fn anchor_of(heading: &str) -> String {
    let title = heading.trim_start_matches('#').trim().to_lowercase();
    title
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}
