//! Whether the documents tell of everything that can be set, and of nothing else: options of the
//! programs, commands, the driver's files in sysfs, findings. (The settings themselves are compared
//! with docs/configuration.md in backend/src/settings.rs, the metrics in its control/metrics.rs.)

#![allow(clippy::unwrap_used)] // a test that cannot go on must fail

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use clap::Command;
use gemini_manual::programs;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The documents for people who use the programs.
fn documents() -> Vec<String> {
    let mut paths: Vec<String> = fs::read_dir(root().join("docs"))
        .unwrap()
        .map(|entry| format!("docs/{}", entry.unwrap().file_name().to_str().unwrap()))
        .filter(|path| path.ends_with(".md"))
        .collect();
    paths.extend(["README.md", "guest-driver/agent/README.md"].map(String::from));
    paths.sort();
    paths
}

/// The text of a document that is code: fenced blocks, and what stands between backticks.
fn code(text: &str) -> Vec<String> {
    let (mut pieces, mut block) = (Vec::new(), None::<String>);
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            match block.take() {
                Some(block) => pieces.push(block),
                None => block = Some(String::new()),
            }
        } else if let Some(block) = &mut block {
            // A command may go on in the next line.
            match line.strip_suffix('\\') {
                Some(begun) => *block += begun,
                None => {
                    *block += line;
                    block.push('\n');
                }
            }
        } else {
            pieces.extend(line.split('`').skip(1).step_by(2).map(String::from));
        }
    }
    pieces
}

/// The words of a shell's commands, one list for each command.
fn commands(code: &str) -> impl Iterator<Item = Vec<&str>> {
    code.split(['\n', '|', ';', '&']).map(|command| command.split_whitespace().collect())
}

/// Options as they are written, `--name`, without value and punctuation.
fn option(word: &str) -> Option<&str> {
    let word = word.trim_start_matches(['[', '(']);
    let name = word.strip_prefix("--")?;
    let end = name.find(|c: char| !c.is_ascii_lowercase() && c != '-').unwrap_or(name.len());
    Some(&name[..end]).filter(|name| !name.is_empty())
}

/// Every option of a program, of its subcommands too.
fn options(command: &Command) -> BTreeSet<String> {
    let own = command.get_arguments().filter_map(|arg| arg.get_long()).map(String::from);
    own.chain(command.get_subcommands().flat_map(options))
        .chain(["help".into(), "version".into()])
        .collect()
}

/// The options that each of the scripts says it takes.
fn of_scripts() -> BTreeMap<String, BTreeSet<String>> {
    let script = |entry: fs::DirEntry| {
        let name = entry.file_name().to_str().unwrap().to_owned();
        let text = fs::read_to_string(entry.path()).unwrap();
        let options = text.split_whitespace().filter_map(option).map(String::from).collect();
        (name, options)
    };
    fs::read_dir(root().join("scripts")).unwrap().map(|entry| script(entry.unwrap())).collect()
}

#[test]
fn every_option_is_in_the_documents() {
    let all: String = documents().iter().map(|path| read(path)).collect();
    let said: BTreeSet<String> = code(&all)
        .iter()
        .flat_map(|code| code.split_whitespace().filter_map(option).map(String::from))
        .collect();
    for program in programs() {
        // The settings have a table of their own, by their names.
        let settings = vhost_device_gemini::settings::SETTINGS;
        let missing: Vec<String> = options(&program.command)
            .into_iter()
            .filter(|name| !said.contains(name) && name != "help" && name != "version")
            .filter(|name| !settings.iter().any(|setting| setting.name == name))
            .collect();
        assert!(missing.is_empty(), "{}: no document has {missing:?}", program.name());
    }
}

#[test]
fn every_option_in_the_documents_is_one() {
    let programs: BTreeMap<String, BTreeSet<String>> = programs()
        .iter()
        .map(|program| (program.name().to_owned(), options(&program.command)))
        .chain(of_scripts())
        .collect();
    let known: BTreeSet<String> = programs.values().flatten().cloned().collect();
    let mut wrong = Vec::new();
    for path in documents() {
        for code in code(&read(&path)) {
            for words in commands(&code) {
                // Whose options follow. Those that stand alone are ours, whosever.
                let mut whose =
                    words.first().is_some_and(|word| word.starts_with("--")).then_some(&known);
                for word in &words {
                    let name = word.trim_start_matches('(').rsplit('/').next().unwrap_or(word);
                    if let Some(options) = programs.get(name) {
                        whose = Some(options);
                    } else if let (Some(name), Some(options)) = (option(word), whose) {
                        if !options.contains(name) {
                            wrong.push(format!("{path}: {}", words.join(" ")));
                        }
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_command_of_geminictl_in_the_documents_is_one() {
    let programs = programs();
    let geminictl = programs.iter().find(|program| program.name() == "geminictl").unwrap();
    let names: BTreeSet<&str> =
        geminictl.command.get_subcommands().map(Command::get_name).collect();
    let mut said = BTreeSet::new();
    for path in documents() {
        for code in code(&read(&path)) {
            for words in commands(&code) {
                let Some(at) = words.iter().position(|word| *word == "geminictl") else { continue };
                let mut rest = words[at + 1..].iter();
                while let Some(word) = rest.next() {
                    match option(word) {
                        Some("control-socket") => drop(rest.next()),
                        Some(_) => {}
                        None => {
                            let command = word.trim_end_matches(|c: char| !c.is_ascii_lowercase());
                            // A name in capitals stands for any.
                            let known = command.is_empty() || names.contains(command);
                            assert!(known, "{path}: geminictl {word}");
                            said.insert(command.to_owned());
                            break;
                        }
                    }
                }
            }
        }
    }
    let table = read("docs/configuration.md");
    for name in names {
        assert!(
            said.contains(name) || table.contains(&format!("`{name}`")),
            "no document has geminictl {name}"
        );
    }
}

/// What stands in backticks in the first cell of a table's row.
fn first_cells<'a>(table: &'a str, head: &str) -> impl Iterator<Item = &'a str> {
    let rows = table.split(head).nth(1).unwrap_or_else(|| panic!("no table with {head}"));
    rows.lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.split('|').nth(1).unwrap_or_default())
}

#[test]
fn the_drivers_files_are_in_its_document_and_no_others() {
    let source = read("guest-driver/module/sysfs.c");
    let list = source.split("*gemini_attrs[] = {").nth(1).unwrap().split("};").next().unwrap();
    let ours: BTreeMap<String, bool> = list
        .lines()
        .filter_map(|line| line.trim().strip_prefix('&')?.split_once(".attr"))
        .map(|(name, _)| match name.strip_prefix("setting_") {
            Some(name) => (name.to_owned(), true),
            None => {
                let name = name.strip_prefix("dev_attr_").unwrap();
                (name.to_owned(), source.contains(&format!("DEVICE_ATTR_RW({name})")))
            }
        })
        .collect();
    assert!(ours.len() > 50, "the list of files has another form: {ours:?}");
    let readme = read("guest-driver/module/README.md");
    let theirs: BTreeMap<String, bool> = first_cells(&readme, "| file | meaning |")
        .flat_map(|cell| {
            let writable = cell.contains("(rw)");
            cell.split('`').skip(1).step_by(2).map(move |name| (name.to_owned(), writable))
        })
        .collect();
    assert_eq!(theirs, ours);
}

#[test]
fn findings_are_in_the_troubleshooting_and_no_others() {
    let source = read("backend/src/backing/findings.rs");
    let code = source.split("#[cfg(test)]").next().unwrap();
    let ours: BTreeSet<(String, String)> = code
        .split("Severity::")
        .filter_map(|piece| {
            let (severity, rest) = piece.split_once(',')?;
            let code = rest.trim_start().strip_prefix('"')?.split_once('"')?.0;
            Some((code.to_owned(), severity.to_lowercase()))
        })
        .collect();
    assert!(ours.len() > 15, "the findings have another form: {ours:?}");
    let document = read("docs/troubleshooting.md");
    let theirs: BTreeSet<(String, String)> = document
        .split("| code | severity | means |")
        .nth(1)
        .unwrap()
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            (cells[1].trim_matches('`').to_owned(), cells[2].to_owned())
        })
        .collect();
    assert_eq!(theirs, ours);
}

/// Where a document's links lead to, as they are written, without those to the web and to itself.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let files = targets.filter_map(|target| target.split('#').next());
    files.filter(|file| !file.is_empty() && !file.contains(':'))
}

/// scripts/build-packages names a document of docs/ that it does not ship, and leads elsewhere what
/// lies in other folders: such a link has to be one that it knows.
#[test]
fn no_link_of_a_packaged_document_leads_nowhere() {
    let script = read("scripts/build-packages");
    let shipped = script.lines().find_map(|line| line.trim().strip_prefix("for document in op"));
    let shipped = format!("op{}", shipped.unwrap().trim_end_matches("; do"));
    for name in shipped.split_whitespace() {
        let path = format!("docs/{name}.md");
        for link in links(&read(&path)) {
            assert!(root().join("docs").join(link).exists(), "{path} leads to {link}");
            let known = script.contains(&format!("({}|", link.replace('.', "\\.")));
            let beside = !link.contains('/');
            let copied = ["libvirt/", "apparmor/"].iter().any(|folder| link.starts_with(folder));
            assert!(known || beside || copied, "{path} leads to {link}, which no package has");
        }
    }
}
