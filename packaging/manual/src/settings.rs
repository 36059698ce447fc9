//! The file of settings that is installed: every setting with its default, for people to change.

use std::fmt::Write as _;

use vhost_device_gemini::settings::{Settings, SETTINGS};

/// Longest line of a comment.
const WIDTH: usize = 78;

const HEAD: &str = "\
Settings of the daemons that have no file of their own: each with what it is without this file. \
vhost-device-gemini(8) tells how a daemon gets one. A change counts after: systemctl reload \
'vhost-device-gemini@*'";

/// The file.
#[must_use]
pub fn file() -> String {
    let defaults = Settings::default();
    let mut text = comment(HEAD);
    for setting in SETTINGS {
        let value = setting.show(&defaults);
        let value = match value.bytes().all(|byte| byte.is_ascii_digit()) {
            true => value,
            false => format!("\"{value}\""),
        };
        text.push('\n');
        text += &comment(&format!("{} It is {}.", setting.about, setting.range()));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "#{} = {value}", setting.name);
    }
    text
}

fn comment(words: &str) -> String {
    let mut text = String::from("#");
    let mut width = text.len();
    for word in words.split_whitespace() {
        if width + 1 + word.len() > WIDTH {
            text.push_str("\n#");
            width = 1;
        }
        text.push(' ');
        text.push_str(word);
        width += 1 + word.len();
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use vhost_device_gemini::configuration;
    use vhost_device_gemini::settings::Given;

    fn read(text: &str) -> Given {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        configuration::read(file.path()).unwrap_or_else(|error| panic!("{error}\n{text}"))
    }

    #[test]
    fn the_file_changes_nothing_and_all_in_it_may_be_set() {
        let file = file();
        assert!(read(&file).is_empty());
        // A setting follows its `#` at once, words follow a blank.
        let lines = file.lines().map(|line| match line.strip_prefix('#') {
            Some(setting) if !setting.starts_with(' ') => format!("{setting}\n"),
            _ => format!("{line}\n"),
        });
        let text: String = lines.collect();
        let given = read(&text);
        let other = Settings { cpu_share: 99, huge_max: Some(1), weight: 1, ..Settings::default() };
        assert_eq!(given.apply(&other), Settings::default(), "{text}");
        assert!(text.lines().all(|line| line.len() <= WIDTH), "{text}");
    }
}
