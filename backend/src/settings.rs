//! The settings of the daemon, each declared once: its name, what it may be, and how it is read
//! and written. The command line, the configuration file, the control socket and `geminictl`
//! all go by [`SETTINGS`].
//!
//! On the command line and in the file a name has dashes (`copy-rate`), on the control socket
//! underscores (`copy_rate`).

use crate::adapt;
use crate::engine::{GiveBack, Settings as EngineSettings};
use crate::policy::Policy;
use crate::shares::{Limits, WEIGHT_MAX};
use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Arg, ArgMatches, Command, ValueEnum};
use log::LevelFilter;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// The word for a limit that there is not.
const UNLIMITED: &str = "unlimited";
/// The word for what the daemon finds out by itself.
const AUTO: &str = "auto";
/// Least copy rate. Less than a block a second would leave requests of the guest waiting for
/// longer than anybody means.
const COPY_RATE_MIN: u64 = 2 << 20;
/// Largest number of bytes: what a JSON number carries exactly, and far beyond any machine.
const BYTES_MAX: u64 = 1 << 53;

/// What every setting is set to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Which blocks the host makes huge.
    pub policy: Policy,
    /// Most bytes that collapses may copy per second.
    pub copy_rate: u64,
    /// Most CPU time that the daemon may use, in percent of one CPU.
    pub cpu_share: u32,
    /// Most bytes of host huge pages that the guest may have; `None` for any amount.
    pub huge_max: Option<u64>,
    /// When the guest is asked for memory that it does not use.
    pub give_back: GiveBack,
    /// How long what is of no use is kept, in seconds; `None`: to be found out.
    pub booking_timeout: Option<u32>,
    /// Weight among the VMs that share what the host has.
    pub weight: u64,
    /// Most bytes of huge pages for all of them; `None` for any amount.
    pub host_huge_max: Option<u64>,
    /// Most bytes that are copied a second for all of them; `None` for any amount.
    pub host_copy_rate: Option<u64>,
    /// Least important messages that are logged.
    pub log_level: LevelFilter,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            policy: Policy::Gemini,
            copy_rate: 256 << 20,
            cpu_share: 25,
            huge_max: None,
            give_back: GiveBack::Pressure,
            booking_timeout: None,
            weight: 100,
            host_huge_max: None,
            host_copy_rate: None,
            log_level: LevelFilter::Info,
        }
    }
}

impl Settings {
    /// The share of one CPU as a fraction.
    pub fn cpu_fraction(&self) -> f64 {
        f64::from(self.cpu_share) / 100.0
    }

    /// How long what is of no use is kept, in milliseconds; `None`: to be found out.
    pub fn booking_timeout_ms(&self) -> Option<u32> {
        self.booking_timeout.map(|seconds| seconds.saturating_mul(1000))
    }

    /// What the engine begins with, for blocks of `1 << block_shift` bytes.
    pub fn engine(&self, block_shift: u32) -> EngineSettings {
        EngineSettings {
            policy: self.policy,
            copy_rate: self.copy_rate,
            cpu_share: self.cpu_fraction(),
            block_shift,
            huge_max: self.huge_max,
            give_back: self.give_back,
            limits: self.limits(),
            booking_timeout_ms: self.booking_timeout_ms(),
        }
    }

    /// What is shared with other VMs.
    pub fn limits(&self) -> Limits {
        Limits {
            weight: self.weight,
            host_huge_max: self.host_huge_max,
            host_copy_rate: self.host_copy_rate,
        }
    }

    /// Every setting and its value, under the names of the control socket.
    pub fn to_json(&self) -> Map<String, Value> {
        SETTINGS.iter().map(|setting| (setting.key(), (setting.get)(self))).collect()
    }
}

/// What the value of a setting may be.
enum Range {
    /// One of these.
    Choice(fn() -> Vec<PossibleValue>),
    /// Anything that these words say.
    Words(&'static str),
}

/// The declaration of one setting.
pub struct Setting {
    /// Its name, with dashes.
    pub name: &'static str,
    /// What its value is, for the usage text.
    pub value_name: &'static str,
    /// What it does, in one or more sentences.
    pub about: &'static str,
    range: Range,
    get: fn(&Settings) -> Value,
    show: fn(&Settings) -> String,
    set: fn(&mut Settings, &Value) -> Result<(), String>,
}

/// All settings that may change while the daemon runs.
pub static SETTINGS: &[Setting] = &[
    Setting {
        name: "policy",
        value_name: "POLICY",
        about: "Which blocks the host makes huge.",
        range: Range::Choice(policies),
        get: |s| policy_name(s.policy).into(),
        show: |s| policy_name(s.policy),
        set: |s, value| {
            let policy = value.as_str().and_then(|name| Policy::from_str(name, false).ok());
            policy.map(|policy| s.policy = policy).ok_or_else(|| one_of(&policies()))
        },
    },
    Setting {
        name: "copy-rate",
        value_name: "BYTES",
        about: "Most bytes that collapses may copy per second. To copy nothing set the policy to \
                none.",
        range: Range::Words("bytes a second (K, M, G, T: powers of 1024), 2M or more"),
        get: |s| s.copy_rate.into(),
        show: |s| show_bytes(s.copy_rate),
        set: |s, value| {
            let rate = bytes(value).filter(|rate| *rate >= COPY_RATE_MIN);
            rate.map(|rate| s.copy_rate = rate)
                .ok_or_else(|| "a number of bytes a second from 2M on, for example 256M".into())
        },
    },
    Setting {
        name: "cpu-share",
        value_name: "PERCENT",
        about: "Most CPU time that the daemon may use, in percent of one CPU.",
        range: Range::Words("percent of one CPU, 1 to 100"),
        get: |s| s.cpu_share.into(),
        show: |s| s.cpu_share.to_string(),
        set: |s, value| {
            let share = number(value).and_then(|share| u32::try_from(share).ok());
            let share = share.filter(|share| (1..=100).contains(share));
            share
                .map(|share| s.cpu_share = share)
                .ok_or_else(|| "a whole number of percent from 1 to 100".into())
        },
    },
    Setting {
        name: "huge-max",
        value_name: "BYTES",
        about: "Most bytes of host huge pages that the daemon lets the VM have. It holds only \
                where no huge page comes unasked: with \
                /sys/kernel/mm/transparent_hugepage/shmem_enabled set to never.",
        range: Range::Words("bytes (K, M, G, T: powers of 1024), or unlimited"),
        get: |s| s.huge_max.into(),
        show: |s| s.huge_max.map_or(UNLIMITED.into(), show_bytes),
        set: |s, value| {
            s.huge_max = bytes_or_unlimited(value, 0)
                .ok_or_else(|| format!("a number of bytes, for example 4G, or {UNLIMITED}"))?;
            Ok(())
        },
    },
    Setting {
        name: "weight",
        value_name: "NUMBER",
        about: "Weight of the VM among those whose daemons have the same --share-dir.",
        range: Range::Words("a whole number from 1 to 10000"),
        get: |s| s.weight.into(),
        show: |s| s.weight.to_string(),
        set: |s, value| {
            let weight = number(value).filter(|weight| (1..=WEIGHT_MAX).contains(weight));
            weight
                .map(|weight| s.weight = weight)
                .ok_or_else(|| format!("a whole number from 1 to {WEIGHT_MAX}"))
        },
    },
    Setting {
        name: "host-huge-max",
        value_name: "BYTES",
        about: "Most bytes of host huge pages for all VMs of the --share-dir together, each of \
                which has its share by weight; give all daemons the same.",
        range: Range::Words("bytes (K, M, G, T: powers of 1024), or unlimited"),
        get: |s| s.host_huge_max.into(),
        show: |s| s.host_huge_max.map_or(UNLIMITED.into(), show_bytes),
        set: |s, value| {
            s.host_huge_max = bytes_or_unlimited(value, 0)
                .ok_or_else(|| format!("a number of bytes, for example 64G, or {UNLIMITED}"))?;
            Ok(())
        },
    },
    Setting {
        name: "host-copy-rate",
        value_name: "BYTES",
        about: "Most bytes that are copied per second for all VMs of the --share-dir together, \
                shared likewise among those that have something to copy.",
        range: Range::Words(
            "bytes a second (K, M, G, T: powers of 1024), 2M or more, or unlimited",
        ),
        get: |s| s.host_copy_rate.into(),
        show: |s| s.host_copy_rate.map_or(UNLIMITED.into(), show_bytes),
        set: |s, value| {
            s.host_copy_rate = bytes_or_unlimited(value, COPY_RATE_MIN).ok_or_else(|| {
                format!("a number of bytes a second from 2M on, for example 1G, or {UNLIMITED}")
            })?;
            Ok(())
        },
    },
    Setting {
        name: "give-back",
        value_name: "WHEN",
        about: "When the guest is asked to give memory back that it does not use: never; under \
                pressure, which is when the host is short of memory; or always, once nobody came \
                for it within the driver's booking timeout.",
        range: Range::Choice(give_backs),
        get: |s| give_back_name(s.give_back).into(),
        show: |s| give_back_name(s.give_back),
        set: |s, value| {
            let when = value.as_str().and_then(|name| GiveBack::from_str(name, false).ok());
            when.map(|when| s.give_back = when).ok_or_else(|| one_of(&give_backs()))
        },
    },
    Setting {
        name: "booking-timeout",
        value_name: "SECONDS",
        about: "How long huge pages are kept that nobody has a use for: by the driver those that \
                it holds, and by a guest at --huge-max, for a thirtieth of it, those that others \
                could have. auto: found out by what it brings.",
        range: Range::Words("seconds, 1 to 600, or auto"),
        get: |s| s.booking_timeout.into(),
        show: |s| s.booking_timeout.map_or(AUTO.into(), |seconds| seconds.to_string()),
        set: |s, value| {
            s.booking_timeout = seconds_or_auto(value)
                .ok_or_else(|| format!("a whole number of seconds from 1 to 600, or {AUTO}"))?;
            Ok(())
        },
    },
    Setting {
        name: "log-level",
        value_name: "LEVEL",
        about: "Least important messages that are logged.",
        range: Range::Choice(levels),
        get: |s| level_name(s.log_level).into(),
        show: |s| level_name(s.log_level).into(),
        set: |s, value| {
            let level =
                LevelFilter::iter().find(|level| value.as_str() == Some(level_name(*level)));
            level.map(|level| s.log_level = level).ok_or_else(|| one_of(&levels()))
        },
    },
];

fn policy_name(policy: Policy) -> String {
    policy.to_possible_value().map_or(String::new(), |value| value.get_name().into())
}

fn give_back_name(when: GiveBack) -> String {
    when.to_possible_value().map_or(String::new(), |value| value.get_name().into())
}

fn give_backs() -> Vec<PossibleValue> {
    GiveBack::value_variants().iter().filter_map(GiveBack::to_possible_value).collect()
}

fn level_name(level: LevelFilter) -> &'static str {
    match level {
        LevelFilter::Off => "off",
        LevelFilter::Error => "error",
        LevelFilter::Warn => "warn",
        LevelFilter::Info => "info",
        LevelFilter::Debug => "debug",
        LevelFilter::Trace => "trace",
    }
}

fn policies() -> Vec<PossibleValue> {
    Policy::value_variants().iter().filter_map(Policy::to_possible_value).collect()
}

fn levels() -> Vec<PossibleValue> {
    LevelFilter::iter().map(|level| PossibleValue::new(level_name(level))).collect()
}

fn one_of(values: &[PossibleValue]) -> String {
    let names: Vec<_> = values.iter().map(PossibleValue::get_name).collect();
    match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => names.concat(),
    }
}

/// A whole number, as number or text.
fn number(value: &Value) -> Option<u64> {
    match value {
        Value::String(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok(),
        value => value.as_u64(),
    }
}

/// A number of bytes: a number, or text of digits and perhaps K, M, G or T (powers of 1024).
fn bytes(value: &Value) -> Option<u64> {
    let bytes = match value {
        Value::String(text) => {
            let shift = match text.bytes().last()? {
                b'K' | b'k' => 10,
                b'M' | b'm' => 20,
                b'G' | b'g' => 30,
                b'T' | b't' => 40,
                _ => 0,
            };
            let digits = if shift == 0 { text } else { text.get(..text.len() - 1)? };
            number(&Value::from(digits)).filter(|_| !digits.is_empty())?.checked_mul(1 << shift)?
        }
        value => value.as_u64()?,
    };
    Some(bytes).filter(|bytes| *bytes <= BYTES_MAX)
}

/// A number of bytes, at least `least`, or no limit.
#[allow(clippy::option_option)] // neither right nor wrong, and the outer one is gone at once
fn bytes_or_unlimited(value: &Value, least: u64) -> Option<Option<u64>> {
    match value {
        Value::Null => Some(None),
        Value::String(word) if word == UNLIMITED => Some(None),
        value => bytes(value).filter(|bytes| *bytes >= least).map(Some),
    }
}

/// A booking timeout in seconds, or none.
#[allow(clippy::option_option)] // as above
fn seconds_or_auto(value: &Value) -> Option<Option<u32>> {
    match value {
        Value::Null => Some(None),
        Value::String(word) if word == AUTO => Some(None),
        value => {
            let ms = u32::try_from(number(value)?).ok()?.checked_mul(1000)?;
            (adapt::MIN_MS..=adapt::MAX_MS).contains(&ms).then_some(Some(ms / 1000))
        }
    }
}

/// A number of bytes with the largest suffix that keeps it exact, as [`SETTINGS`] read it.
fn show_bytes(bytes: u64) -> String {
    let suffixes = [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')];
    suffixes
        .iter()
        .find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift)
        .map_or_else(|| bytes.to_string(), |(shift, suffix)| format!("{}{suffix}", bytes >> shift))
}

impl Setting {
    /// Its name on the control socket.
    pub fn key(&self) -> String {
        self.name.replace('-', "_")
    }

    /// What it may be.
    pub fn range(&self) -> String {
        match self.range {
            Range::Choice(choices) => one_of(&choices()),
            Range::Words(words) => words.into(),
        }
    }

    /// Its value in the form in which it may be written anywhere.
    pub fn show(&self, settings: &Settings) -> String {
        (self.show)(settings)
    }

    /// The declaration of a name, with dashes or underscores.
    pub fn find(name: &str) -> Option<&'static Self> {
        SETTINGS.iter().find(|setting| setting.name == name || setting.key() == name)
    }

    /// Whether a value may be set.
    ///
    /// # Errors
    /// What would be right.
    pub fn check(&self, value: &Value) -> Result<(), String> {
        (self.set)(&mut Settings::default(), value)
            .map_err(|right| format!("{value} is not right: give {right}"))
    }
}

/// The names of all settings, with dashes.
pub fn names() -> String {
    SETTINGS.iter().map(|setting| setting.name).collect::<Vec<_>>().join(", ")
}

/// The settings that one source gives, all of them valid.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given(BTreeMap<&'static str, Value>);

impl Given {
    /// Adds a setting.
    ///
    /// # Errors
    /// What would be right.
    pub fn give(&mut self, setting: &'static Setting, value: Value) -> Result<(), String> {
        setting.check(&value)?;
        self.0.insert(setting.name, value);
        Ok(())
    }

    /// Whether a setting is among them, by its name with dashes.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Reads the members of a request of the control socket.
    ///
    /// # Errors
    /// Which member is wrong, and what would be right.
    pub fn from_json(members: &Map<String, Value>) -> Result<Self, String> {
        let mut given = Self::default();
        for (name, value) in members {
            let setting = Setting::find(name)
                .ok_or_else(|| format!("no setting is named {name}; there are: {}", names()))?;
            if given.0.contains_key(setting.name) {
                return Err(format!("{name}: it is given twice; give it once"));
            }
            given.give(setting, value.clone()).map_err(|error| format!("{name}: {error}"))?;
        }
        Ok(given)
    }

    /// Whether it gives nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `settings` with what is given here.
    pub fn apply(&self, settings: &Settings) -> Settings {
        let mut result = settings.clone();
        for setting in SETTINGS {
            if let Some(value) = self.0.get(setting.name) {
                // All was checked when it was given.
                if let Err(right) = (setting.set)(&mut result, value) {
                    log::error!("{}: {value} was taken for {right}", setting.name);
                }
            }
        }
        result
    }
}

impl clap::FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Self::default();
        given.update_from_arg_matches(matches)?;
        Ok(given)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for setting in SETTINGS {
            if let Some(text) = matches.get_one::<String>(setting.name) {
                self.0.insert(setting.name, Value::from(text.as_str()));
            }
        }
        Ok(())
    }
}

impl clap::Args for Given {
    fn augment_args(command: Command) -> Command {
        let defaults = Settings::default();
        SETTINGS.iter().fold(command, |command, setting| {
            let default = setting.show(&defaults);
            let arg = Arg::new(setting.name)
                .long(setting.name)
                .value_name(setting.value_name)
                .help_heading("Settings (also in the file and at run time)");
            command.arg(match setting.range {
                Range::Choice(choices) => arg
                    .help(format!("{} [default: {default}]", setting.about))
                    .value_parser(PossibleValuesParser::new(choices())),
                Range::Words(words) => arg
                    .help(format!("{} May be: {words} [default: {default}]", setting.about))
                    .value_parser(|text: &str| {
                        setting.check(&Value::from(text)).map(|()| text.to_owned())
                    }),
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn set(name: &str, value: Value) -> Result<Settings, String> {
        let mut given = Given::default();
        given.give(Setting::find(name).unwrap(), value)?;
        Ok(given.apply(&Settings::default()))
    }

    #[test]
    fn bytes_are_read_as_numbers_and_with_suffixes() {
        let huge_max = |value| set("huge_max", value).map(|s| s.huge_max);
        assert_eq!(huge_max(json!(0)), Ok(Some(0)));
        assert_eq!(huge_max(json!("0")), Ok(Some(0)));
        assert_eq!(huge_max(json!("256M")), Ok(Some(256 << 20)));
        assert_eq!(huge_max(json!("3g")), Ok(Some(3 << 30)));
        assert_eq!(huge_max(json!(null)), Ok(None));
        assert_eq!(huge_max(json!("unlimited")), Ok(None));
        for wrong in [
            json!(""),
            json!("M"),
            json!("99999999999999T"),
            json!("-1"),
            json!(-1),
            json!("+1"),
            json!(1.5),
            json!("1.5G"),
            json!(" 1"),
            json!("1Ä"),
            json!([1]),
            json!(u64::MAX),
        ] {
            assert!(huge_max(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ranges_are_held_and_errors_say_what_would_be_right() {
        assert!(set("copy_rate", json!("1M")).unwrap_err().contains("2M"));
        assert!(set("copy_rate", json!(0)).is_err());
        assert_eq!(set("copy_rate", json!("2M")).map(|s| s.copy_rate), Ok(COPY_RATE_MIN));
        for wrong in [json!(0), json!(101), json!("25%"), json!(null), json!(true)] {
            assert!(set("cpu_share", wrong).unwrap_err().contains("1 to 100"));
        }
        for wrong in [json!(0), json!(601), json!(1.5), json!("90s"), json!(u64::MAX)] {
            assert!(set("booking_timeout", wrong).unwrap_err().contains("1 to 600"));
        }
        assert_eq!(
            set("booking_timeout", json!("600")).unwrap().booking_timeout_ms(),
            Some(600_000)
        );
        assert!(set("policy", json!("best")).unwrap_err().contains("gemini"));
        assert!(set("log_level", json!("loud")).unwrap_err().contains("debug"));
        assert!(set("log_level", json!("INFO")).is_err(), "one spelling everywhere");
    }

    #[test]
    fn what_is_shown_and_what_is_told_can_be_set() {
        let settings = Settings {
            policy: Policy::Always,
            copy_rate: 3 << 20,
            cpu_share: 7,
            huge_max: Some(5 << 30),
            give_back: GiveBack::Always,
            booking_timeout: Some(90),
            weight: 7,
            host_huge_max: Some(5 << 30),
            host_copy_rate: Some(3 << 20),
            log_level: LevelFilter::Trace,
        };
        for settings in [settings, Settings::default()] {
            for forms in [
                settings.to_json(),
                SETTINGS.iter().map(|s| (s.name.to_owned(), s.show(&settings).into())).collect(),
            ] {
                let given = Given::from_json(&forms).unwrap();
                let other = Settings { huge_max: Some(1), cpu_share: 99, ..Settings::default() };
                assert_eq!(given.apply(&other), settings);
            }
        }
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        let error = Given::from_json(json!({"copyrate": 1}).as_object().unwrap()).unwrap_err();
        assert!(error.contains("copyrate") && error.contains("copy-rate"), "{error}");
    }

    #[test]
    fn no_setting_is_given_twice() {
        let members = json!({"copy_rate": 4_000_000, "copy-rate": 5_000_000});
        assert!(Given::from_json(members.as_object().unwrap()).unwrap_err().contains("twice"));
    }

    #[test]
    fn command_line_gives_only_what_was_given() {
        #[derive(clap::Parser)]
        struct Args {
            #[command(flatten)]
            given: Given,
        }
        let parse =
            |args: &[&str]| <Args as clap::Parser>::try_parse_from(args).map(|args| args.given);
        assert!(parse(&["x"]).unwrap().is_empty());
        let given = parse(&["x", "--huge-max", "unlimited", "--copy-rate", "3M"]).unwrap();
        let before = Settings { huge_max: Some(7), cpu_share: 3, ..Settings::default() };
        let after = Settings { huge_max: None, copy_rate: 3 << 20, ..before.clone() };
        assert_eq!(given.apply(&before), after);
        assert!(parse(&["x", "--cpu-share", "0"]).is_err());
        assert!(parse(&["x", "--huge-max", "-1"]).is_err());
    }

    #[test]
    fn the_documentation_has_every_setting_as_it_is_and_no_other() {
        let defaults = Settings::default();
        let ours: Vec<String> = SETTINGS
            .iter()
            .map(|setting| {
                let (range, default) = (setting.range(), setting.show(&defaults));
                format!("| `{}` | {range} | `{default}` | {} |", setting.name, setting.about)
            })
            .collect();
        let documentation = include_str!("../../docs/configuration.md");
        let table = documentation.split("| setting |").nth(1).unwrap_or_default();
        let theirs: Vec<&str> =
            table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
        assert_eq!(theirs, ours, "put into docs/configuration.md:\n{}", ours.join("\n"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(name in 0..SETTINGS.len(), text in ".{0,12}") {
            let setting = &SETTINGS[name];
            let mut settings = Settings::default();
            if (setting.set)(&mut settings, &Value::from(text)).is_ok() {
                let again = set(setting.name, setting.show(&settings).into()).unwrap();
                prop_assert_eq!(again, settings);
            }
        }

        #[test]
        fn shown_bytes_are_read_again(bytes_ in 0..=BYTES_MAX) {
            prop_assert_eq!(bytes(&show_bytes(bytes_).into()), Some(bytes_));
        }
    }
}
