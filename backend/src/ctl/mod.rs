//! `geminictl`: the client of the control socket.

mod picture;
mod socket;
mod table;

pub use socket::{Error, SOCKET_SUFFIX, SOCKET_VARIABLE};

use clap::{Parser, Subcommand};
use serde_json::{json, Map, Value};
use socket::Socket;
use std::path::PathBuf;

/// Look at a running vhost-device-gemini and change what it does.
///
/// What is changed holds until the daemon reads its configuration file again, or ends; a pause
/// until it ends.
#[derive(Debug, Parser)]
#[command(name = "geminictl", version)]
pub struct Args {
    /// The daemon's control socket. Without it, and without the variable, the only socket that is
    /// named *control.sock in /run/virtio-gemini or $XDG_RUNTIME_DIR/virtio-gemini.
    #[arg(long, value_name = "PATH", global = true, env = SOCKET_VARIABLE)]
    pub control_socket: Option<PathBuf>,

    /// Print what the daemon answers, as JSON.
    #[arg(long, global = true)]
    pub json: bool,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// How the huge pages of guest and host meet, what was spent, and what is wrong.
    Status,
    /// The policy; with a name, sets it.
    Policy {
        /// The policy from now on.
        name: Option<String>,
    },
    /// What the daemon may spend, and has spent.
    Budgets,
    /// All settings that can be changed: value, default, and what they may be.
    Settings,
    /// Changes settings, all of them or none.
    #[command(override_usage = "geminictl set <NAME> <VALUE> [<NAME> <VALUE>]...")]
    Set {
        /// A setting (see `geminictl settings`) and its value, for example: copy-rate 100M.
        #[arg(required = true, num_args = 2.., value_names = ["NAME", "VALUE"])]
        pairs: Vec<String>,
    },
    /// Reads the daemon's configuration file again, as SIGHUP does.
    Reload,
    /// A picture of every block at both layers.
    Map,
    /// Lets the daemon make nothing huge until `resume`.
    Pause,
    /// Ends a pause.
    Resume,
    /// The metrics, as Prometheus reads them.
    Metrics,
}

/// Does what is asked; what is to be printed.
///
/// # Errors
/// What went wrong, and what to do about it.
pub fn run(args: &Args) -> Result<String, Error> {
    let socket = Socket::find(args.control_socket.as_deref())?;
    let answer = socket.ask(&request(&args.command)?)?;
    if args.json {
        return Ok(format!("{answer:#}\n"));
    }
    Ok(match &args.command {
        Command::Status => table::status(&answer),
        Command::Policy { name: None } => format!("{}\n", table::word(&answer["policy"])),
        Command::Budgets => table::budgets(&answer),
        Command::Settings => table::settings(&answer),
        Command::Policy { .. } | Command::Set { .. } | Command::Reload => table::changed(&answer),
        Command::Map => picture::picture(&answer),
        Command::Pause => {
            let rest =
                if answer["acting"] == true { "; an action under way ends by itself" } else { "" };
            format!("paused: nothing is made huge until geminictl resume{rest}\n")
        }
        Command::Resume => "resumed\n".into(),
        Command::Metrics => answer["metrics"].as_str().unwrap_or_default().into(),
    })
}

/// The request of the control socket for a command.
fn request(command: &Command) -> Result<Value, Error> {
    let plain = match command {
        Command::Status | Command::Policy { name: None } | Command::Budgets => "status",
        Command::Settings => "settings",
        Command::Reload => "reload",
        Command::Map => "map",
        Command::Pause => "pause",
        Command::Resume => "resume",
        Command::Metrics => "metrics",
        Command::Policy { name: Some(name) } => return Ok(json!({"cmd": "set", "policy": name})),
        Command::Set { pairs } => {
            let mut members = Map::new();
            for pair in pairs.chunks(2) {
                let [name, value] = pair else { return Err(Error::NoValue(pair.concat())) };
                // The daemon knows what it has: what is wrong it tells.
                let name = name.replace('-', "_");
                if name == "cmd" || members.insert(name.clone(), json!(value)).is_some() {
                    return Err(Error::Twice(name));
                }
            }
            members.insert("cmd".into(), json!("set"));
            return Ok(Value::Object(members));
        }
    };
    Ok(json!({ "cmd": plain }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(words: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(words.split(' '))
    }

    fn asked(words: &str) -> Value {
        request(&parse(words).unwrap().command).unwrap()
    }

    #[test]
    fn the_command_line_is_sound_and_helps_everywhere() {
        Args::command().debug_assert();
        for words in ["geminictl --help", "geminictl set --help", "geminictl map --help"] {
            let help = parse(words).unwrap_err();
            assert_eq!(help.kind(), clap::error::ErrorKind::DisplayHelp);
        }
        assert!(parse("geminictl").is_err());
        assert!(parse("geminictl set copy-rate").is_err());
    }

    #[test]
    fn commands_become_requests() {
        assert_eq!(asked("geminictl budgets"), json!({"cmd": "status"}));
        assert_eq!(asked("geminictl policy always"), json!({"cmd": "set", "policy": "always"}));
        assert_eq!(
            asked("geminictl set copy-rate 100M cpu_share 5"),
            json!({"cmd": "set", "copy_rate": "100M", "cpu_share": "5"})
        );
        for wrong in ["set a 1 b", "set a 1 a 2", "set cmd status"] {
            let args = parse(&format!("geminictl {wrong}")).unwrap();
            assert!(request(&args.command).is_err(), "{wrong}");
        }
    }
}
