//! `vhost-device-gemini`: see the library for how it works.

use clap::Parser;
use std::process::ExitCode;
use vhost_device_gemini::config::Args;
use vhost_device_gemini::settings::Settings;
use vhost_device_gemini::{logging, server};

/// The device is none of the types that vhost-user's conventions name.
const CAPABILITIES: &str = r#"{"type":"gemini","features":[]}"#;

fn main() -> ExitCode {
    let args = Args::parse();
    if args.print_capabilities {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    // What the configuration file says of it comes later: its errors are logged, too.
    logging::init(args.settings.apply(&Settings::default()).log_level);
    match server::run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
