//! What is installed beside the programs and made of what they declare themselves, so that it can
//! tell nothing else than `--help`: manual pages, shell completions, the file of settings.

pub mod settings;

use std::fs::{self, File};
use std::io;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

/// The title above every page.
const MANUAL: &str = "virtio-gemini";

/// A program that is installed.
#[derive(Clone, Debug)]
pub struct Program {
    /// Its command line.
    pub command: Command,
    /// The section of the manual that it is in: 8 for what the system starts.
    pub section: &'static str,
}

/// All of them.
#[must_use]
pub fn programs() -> Vec<Program> {
    let program = |command, section| Program { command, section };
    vec![
        program(vhost_device_gemini::config::Args::command(), "8"),
        program(vhost_device_gemini::ctl::Args::command(), "1"),
        program(gemini_virt_xml::args::Args::command(), "1"),
        program(gemini_guestd::Args::command(), "8"),
    ]
}

impl Program {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.command.get_name()
    }

    /// Writes its manual pages, one for each subcommand as well, and its completions for bash, zsh
    /// and fish, where Debian keeps them below `share` (/usr/share).
    ///
    /// # Errors
    /// What the system says when it cannot write there.
    pub fn install(&self, share: &Path) -> io::Result<()> {
        let mut command = self.command.clone().disable_help_subcommand(true);
        command.build();
        self.page(&command, share)?;
        self.completion(Shell::Bash, &share.join("bash-completion/completions"), self.name())?;
        let zsh = format!("_{}", self.name());
        self.completion(Shell::Zsh, &share.join("zsh/vendor-completions"), &zsh)?;
        let fish = format!("{}.fish", self.name());
        self.completion(Shell::Fish, &share.join("fish/vendor_completions.d"), &fish)
    }

    fn page(&self, command: &Command, share: &Path) -> io::Result<()> {
        for subcommand in command.get_subcommands() {
            self.page(subcommand, share)?;
        }
        // `geminictl set` is described in geminictl-set(1).
        let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
        let (directory, file) =
            (format!("man/man{}", self.section), format!("{name}.{}", self.section));
        let mut file = create(&share.join(directory), &file)?;
        let man = Man::new(command.clone()).title(name).section(self.section).manual(MANUAL);
        man.render(&mut file)
    }

    fn completion(&self, shell: Shell, directory: &Path, file: &str) -> io::Result<()> {
        let mut file = create(directory, file)?;
        clap_complete::generate(shell, &mut self.command.clone(), self.name(), &mut file);
        Ok(())
    }
}

fn create(directory: &Path, name: &str) -> io::Result<File> {
    fs::create_dir_all(directory)?;
    File::create(directory.join(name))
}
