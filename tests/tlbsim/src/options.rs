//! Arguments of the plugin: `name=value` words.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{bail, Context};

use crate::profile::{self, Profile};

/// How the plugin is told to work.
#[derive(Clone, Debug)]
pub struct Options {
    /// `profile`: the processor to be simulated; with `coalesce`, how many base pages
    /// one entry of its TLB may hold, whatever the profile's own name says.
    pub profile: Profile,
    /// `memory`: bytes of guest memory, which is one memfd of this size.
    pub memory: u64,
    /// `control`: the socket to listen on.
    pub control: PathBuf,
    /// `pcid`: whether the processor keeps the entries of some address spaces when
    /// it goes to another.
    pub pcid: bool,
    /// `simulate`: whether to simulate from the start, or not before it is asked
    /// for: the boot of a guest takes several times as long with it.
    pub simulate: bool,
    /// `epoch`: how often the host's page tables are looked at, in milliseconds.
    pub epoch: Duration,
}

impl Options {
    /// Reads the words.
    ///
    /// # Errors
    /// If a word is unknown or has a value that it cannot have, or if memory or
    /// control is missing.
    pub fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> anyhow::Result<Self> {
        let (mut profile, mut pcid, mut simulate, mut epoch) = (profile::ALL[0], false, true, 100);
        let (mut memory, mut control, mut coalesce) = (None, None, None);
        for word in words {
            let (name, value) = word.split_once('=').with_context(|| format!("what is {word}?"))?;
            match name {
                "profile" => {
                    profile = profile::find(value)
                        .with_context(|| format!("there is no profile {value}"))?;
                }
                "coalesce" => coalesce = Some(value.parse().context("coalesce is no number")?),
                "memory" => memory = Some(value.parse().context("memory is no number")?),
                "control" => control = Some(PathBuf::from(value)),
                "pcid" => pcid = switch(name, value)?,
                "simulate" => simulate = switch(name, value)?,
                "epoch" => epoch = value.parse().context("epoch is no number")?,
                _ => bail!("what is {name}?"),
            }
        }
        if let Some(pages) = coalesce {
            profile = profile
                .coalescing(pages)
                .with_context(|| format!("coalesce is a power of two up to 16, not {pages}"))?;
        }
        Ok(Options {
            profile,
            memory: memory.context("memory is missing")?,
            control: control.context("control is missing")?,
            pcid,
            simulate,
            epoch: Duration::from_millis(epoch),
        })
    }
}

fn switch(name: &str, value: &str) -> anyhow::Result<bool> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => bail!("{name} is on or off"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_and_the_rest_has_defaults() {
        let options = Options::parse(["memory=4096", "control=/run/x", "pcid=on"]).expect("fine");
        assert_eq!((options.memory, options.pcid, options.simulate), (4096, true, true));
        assert_eq!(options.profile.to_string(), "broadwell");
        assert_eq!(options.epoch, Duration::from_millis(100));
    }

    #[test]
    fn merging_is_an_option_of_its_own_or_part_of_the_profile() {
        for (words, name) in [
            (&["profile=zen4", "coalesce=4"][..], "zen4+coalesce4"),
            (&["coalesce=8", "profile=zen4"], "zen4+coalesce8"),
            (&["profile=zen4+coalesce2"], "zen4+coalesce2"),
            (&["profile=zen4+coalesce2", "coalesce=16"], "zen4+coalesce16"),
            (&["profile=zen4+coalesce2", "coalesce=0"], "zen4"),
            (&["coalesce=1"], "broadwell"),
        ] {
            let needed = ["memory=4096", "control=/run/x"];
            let options = Options::parse(needed.into_iter().chain(words.iter().copied()));
            assert_eq!(options.expect("fine").profile.to_string(), name);
        }
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let needed = ["memory=4096", "control=/run/x"];
        for wrong in [
            "profile=i386",
            "profile=zen4+coalesce5",
            "coalesce=5",
            "coalesce=32",
            "coalesce=on",
            "pcid=maybe",
            "epoch=soon",
            "speed=9",
            "on",
            "memory=much",
        ] {
            let words = needed.into_iter().chain([wrong]);
            assert!(Options::parse(words).is_err(), "{wrong}");
        }
        assert!(Options::parse(["memory=4096"]).is_err());
        assert!(Options::parse(["control=x"]).is_err());
    }
}
