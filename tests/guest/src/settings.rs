//! Settings of the guest's kernel that are changed for a while.

use anyhow::Context;

/// A changed setting; dropping it puts it back.
pub struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    /// Writes `value` to the file `path`.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn change(path: &'static str, value: &str) -> anyhow::Result<Self> {
        let before =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
        std::fs::write(path, value).with_context(|| format!("cannot write `{value}` to {path}"))?;
        Ok(Setting { path, before: before.trim_end().to_owned() })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(self.path, &self.before) {
            eprintln!("gemini-guest: cannot put {} back: {error}", self.path);
        }
    }
}
