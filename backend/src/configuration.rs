//! Where the settings in force come from: the defaults, then the configuration file, then the
//! command line, which wins. The control socket changes what is in force until the file is
//! loaded again or the daemon ends: loading puts every setting to what a start would set it to.
//!
//! A file is taken whole or not at all.

use crate::engine::{lock, Engine};
use crate::logging;
use crate::settings::{names, Given, Setting, Settings, SETTINGS};
use serde_json::Value;
use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use toml::de::{DeTable, DeValue};

/// Longest file that is read; ours have a few lines.
const FILE_MAX: u64 = 64 << 10;

/// Why a configuration file is refused.
#[derive(Debug, thiserror::Error)]
#[error("{}{}: {what}; nothing of it is taken", .path.display(), Line(*.line))]
pub struct Error {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1 on, if it is one that is wrong.
    pub line: Option<usize>,
    /// What is wrong, and what would be right.
    pub what: String,
}

struct Line(Option<usize>);

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |line| write!(f, ":{line}"))
    }
}

/// Something wrong at a place of the text.
type Wrong = (Option<Range<usize>>, String);

/// Reads a configuration file.
///
/// # Errors
/// Which line is wrong, and what would be right; or why the file cannot be read.
pub fn read(path: &Path) -> Result<Given, Error> {
    let error = |line, what| Error { path: path.to_owned(), line, what };
    let text = read_text(path).map_err(|source| {
        error(None, format!("cannot be read: {source}; check the path given with --config"))
    })?;
    parse(&text).map_err(|(span, what)| {
        let line = span.map(|span| {
            let before = text.as_bytes().iter().take(span.start);
            1 + before.filter(|byte| **byte == b'\n').count()
        });
        error(line, what)
    })
}

fn read_text(path: &Path) -> io::Result<String> {
    // A pipe without a writer must not stop the daemon.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut text = String::new();
    if file.take(FILE_MAX + 1).read_to_string(&mut text)? as u64 > FILE_MAX {
        return Err(io::Error::other(format!("it has more than {FILE_MAX} bytes")));
    }
    Ok(text)
}

fn parse(text: &str) -> Result<Given, Wrong> {
    let table = DeTable::parse(text).map_err(|error| {
        (error.span(), format!("this is no TOML: {}; a line is: name = value", error.message()))
    })?;
    // In the order of the file, so that the first mistake is told first.
    let mut entries: Vec<_> = table.get_ref().iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    let mut given = Given::default();
    for (key, value) in entries {
        let name: &str = key.get_ref();
        let at = |what| (Some(key.span()), what);
        // One spelling, or a name could be given twice.
        let setting = Setting::find(name).filter(|setting| setting.name == name);
        let setting = setting.ok_or_else(|| at(unknown(name)))?;
        let value = to_json(value.get_ref())
            .ok_or_else(|| {
                format!(
                    "a {} is not right: give a number or a text in quotes",
                    value.get_ref().type_str()
                )
            })
            .and_then(|value| given.give(setting, value));
        value.map_err(|what| at(format!("{name}: {what}")))?;
    }
    Ok(given)
}

fn unknown(name: &str) -> String {
    match Setting::find(name) {
        Some(setting) => format!("the name {name} is written {} here", setting.name),
        None => format!(
            "no setting is named {name}; there are: {}. Everything else, such as paths of \
             sockets, belongs on the command line",
            names()
        ),
    }
}

fn to_json(value: &DeValue<'_>) -> Option<Value> {
    match value {
        DeValue::String(text) => Some(text.as_ref().into()),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).ok().map(Value::from)
        }
        _ => None,
    }
}

struct Inner {
    settings: Settings,
    /// Why the file was refused the last time that it was read.
    refused: Option<String>,
}

/// The settings in force, and the ways to change them.
pub struct Configuration {
    file: Option<PathBuf>,
    command_line: Given,
    engine: Arc<Engine>,
    inner: Mutex<Inner>,
}

/// The settings with which to start.
///
/// # Errors
/// If the file is refused.
pub fn at_start(file: Option<&Path>, command_line: &Given) -> Result<Settings, Error> {
    let from_file = file.map_or_else(|| Ok(Given::default()), read)?;
    Ok(command_line.apply(&from_file.apply(&Settings::default())))
}

impl Configuration {
    /// `settings` are those that [`at_start`] gave, and with which `engine` was started.
    pub fn new(
        file: Option<PathBuf>,
        command_line: Given,
        settings: Settings,
        engine: Arc<Engine>,
    ) -> Self {
        let inner = Mutex::new(Inner { settings, refused: None });
        Self { file, command_line, engine, inner }
    }

    /// The settings in force.
    pub fn settings(&self) -> Settings {
        lock(&self.inner).settings.clone()
    }

    /// The file, if there is one.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Why the file was refused, if it was the last time.
    pub fn refused(&self) -> Option<String> {
        lock(&self.inner).refused.clone()
    }

    /// Changes all that is given, at once; the settings that are in force then.
    pub fn change(&self, given: &Given) -> Settings {
        let mut inner = lock(&self.inner);
        let settings = given.apply(&inner.settings);
        // Given again, a policy begins again: some do what they do once.
        let again = settings.policy == inner.settings.policy && given.has("policy");
        self.put(&mut inner, settings.clone(), "the control socket");
        if again {
            self.engine.set_policy(settings.policy);
        }
        settings
    }

    /// Reads the file again, and sets everything to what a start would set it to.
    ///
    /// # Errors
    /// If there is no file, or it is refused; then nothing changes.
    pub fn reload(&self) -> Result<Settings, String> {
        let Some(file) = &self.file else {
            return Err("there is no file to load: the daemon was started without --config".into());
        };
        let mut inner = lock(&self.inner);
        match at_start(Some(file), &self.command_line) {
            Ok(settings) => {
                inner.refused = None;
                self.put(&mut inner, settings.clone(), &file.display().to_string());
                Ok(settings)
            }
            Err(error) => {
                let error = error.to_string();
                inner.refused = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Puts settings in force. Under the lock, so that two changes at once do not end half and
    /// half.
    fn put(&self, inner: &mut Inner, settings: Settings, source: &str) {
        let before = std::mem::replace(&mut inner.settings, settings);
        let now = &inner.settings;
        if now.policy != before.policy {
            self.engine.set_policy(now.policy);
        }
        if now.copy_rate != before.copy_rate {
            self.engine.set_copy_rate(now.copy_rate);
        }
        if now.cpu_share != before.cpu_share {
            self.engine.set_cpu_share(now.cpu_fraction());
        }
        if now.huge_max != before.huge_max {
            self.engine.set_huge_max(now.huge_max);
        }
        if now.give_back != before.give_back {
            self.engine.set_give_back(now.give_back);
        }
        if now.booking_timeout != before.booking_timeout {
            self.engine.set_booking_timeout(now.booking_timeout_ms());
        }
        if now.limits() != before.limits() {
            self.engine.set_limits(now.limits());
        }
        if now.log_level != before.log_level {
            logging::set_level(now.log_level);
        }
        for setting in SETTINGS {
            let (was, is) = (setting.show(&before), setting.show(now));
            if was != is {
                log::info!("{} is now {is}, was {was} ({source})", setting.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> (usize, String) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let error = read(file.path()).unwrap_err();
        let place = format!("{}:{}: ", file.path().display(), error.line.unwrap());
        assert!(error.to_string().starts_with(&place), "{error}");
        (error.line.unwrap(), error.what)
    }

    #[test]
    fn a_file_gives_what_the_command_line_would() {
        let text = "# for the database\npolicy = \"always\"\ncopy-rate = 0x40_0000\n\n\
                    huge-max = \"3G\"\ncpu-share = 10\nlog-level = 'warn'\n";
        let settings = parse(text).unwrap().apply(&Settings::default());
        assert_eq!(settings.policy, crate::policy::Policy::Always);
        assert_eq!((settings.copy_rate, settings.cpu_share), (4 << 20, 10));
        assert_eq!(settings.huge_max, Some(3 << 30));
        assert_eq!(settings.log_level, log::LevelFilter::Warn);
        assert_eq!(parse("").unwrap(), Given::default());
    }

    #[test]
    fn a_bad_file_is_refused_with_its_line_and_what_would_be_right() {
        for (text, line, right) in [
            ("copy-rate = \"1M\"", 1, "from 2M on"),
            ("\n\ncpu-share = 0 # none\npolicy = 1", 3, "1 to 100"),
            ("policy = \"none\"\ncpu_share = 5", 2, "cpu-share"),
            ("policy = \"none\"\nhuge = 5", 2, "huge-max"),
            ("socket-path = \"x\"", 1, "command line"),
            ("cpu-share = 5\ncpu-share = 6", 2, "duplicate"),
            ("cpu-share = 5\n\ncpu-share", 3, "name = value"),
            ("huge-max = -1", 1, "unlimited"),
            ("huge-max = true", 1, "a number or a text"),
            ("huge-max = 99999999999999999999", 1, "a number or a text"),
            ("[gemini]\npolicy = \"none\"", 1, "no setting is named gemini"),
        ] {
            let (at, what) = refused(text);
            assert_eq!(at, line, "{text}: {what}");
            assert!(what.contains(right), "{text}: {what}");
        }
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let missing = read(&directory.path().join("none")).unwrap_err().to_string();
        assert!(missing.contains("--config"), "{missing}");
        let error = read(directory.path()).unwrap_err();
        assert!(error.what.contains("no regular file"), "{error}");
        let long = directory.path().join("long");
        std::fs::write(&long, vec![b'\n'; 70_000]).unwrap();
        assert!(read(&long).unwrap_err().what.contains("more than"));
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "cpu-share = 10\ncopy-rate = \"4M\"\n").unwrap();
        let mut command_line = Given::default();
        command_line.give(Setting::find("cpu-share").unwrap(), 20.into()).unwrap();
        let settings = at_start(Some(file.path()), &command_line).unwrap();
        assert_eq!((settings.cpu_share, settings.copy_rate), (20, 4 << 20));
    }
}
