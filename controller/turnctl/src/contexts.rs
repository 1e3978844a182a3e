//! The configuration file: which clusters this person works with, and as whom.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Result};
use crate::files;

/// The file as written.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Contexts {
    /// The context used when none is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) current: Option<String>,
    /// By name.
    pub(crate) contexts: BTreeMap<String, Context>,
}

/// One cluster and one certificate for it. Paths are relative to the file they stand in.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Context {
    /// `https://host:port` of each controller, in the order to try.
    pub(crate) controllers: Vec<String>,
    /// The authority that controllers' certificates must come from, PEM.
    pub(crate) ca: PathBuf,
    /// Our certificate, PEM.
    pub(crate) certificate: PathBuf,
    /// Its key, PEM.
    pub(crate) key: PathBuf,
}

/// Where the file is: as asked, else beside the other configuration of this user.
pub(crate) fn location(asked: Option<&Path>) -> Result<PathBuf> {
    if let Some(asked) = asked {
        return Ok(asked.to_owned());
    }
    let from = |variable| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("XDG_CONFIG_HOME")
        .or_else(|| from("HOME").map(|home| home.join(".config")))
        .map(|directory| directory.join("turnpike").join("config.toml"))
        .ok_or_else(|| Failure::usage("HOME is not set").remedy("name the configuration file with TURNCTL_CONFIG"))
}

impl Contexts {
    /// Reads the file; one that is missing holds nothing.
    pub(crate) fn load(file: &Path) -> Result<Self> {
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(Failure::usage(format!("cannot read {}: {error}", file.display()))),
        };
        toml::from_str(&text).map_err(|error| {
            let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            let reason = error.message().lines().collect::<Vec<_>>().join(", ");
            Failure::usage(format!("{}:{line}: {reason}", file.display()))
        })
    }

    /// Writes the file whole or not at all, and its directory when it is missing.
    pub(crate) fn save(&self, file: &Path) -> Result {
        let failed =
            |error: &dyn std::fmt::Display| Failure::failed(format!("cannot write {}: {error}", file.display()));
        let text = toml::to_string(self).map_err(|error| failed(&error))?;
        if let Some(directory) = file.parent() {
            std::fs::create_dir_all(directory).map_err(|error| failed(&error))?;
        }
        files::write_whole(file, &text, 0o644).map_err(|error| failed(&error))
    }

    /// The context of that name.
    pub(crate) fn named(&self, name: &str) -> Result<&Context> {
        self.contexts.get(name).ok_or_else(|| unknown(name, self))
    }
}

/// The failure of asking for a context that is not there.
pub(crate) fn unknown(name: &str, contexts: &Contexts) -> Failure {
    let names: Vec<_> = contexts.contexts.keys().map(String::as_str).collect();
    let remedy = if names.is_empty() {
        "make one with 'turnctl context set'".into()
    } else {
        format!("there are: {}", names.join(", "))
    };
    Failure::usage(format!("there is no context '{name}'")).remedy(remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_a_missing_file_is_empty() {
        let directory = tempfile::tempdir().expect("directory");
        let file = directory.path().join("deep/config.toml");
        assert_eq!(Contexts::load(&file).expect("empty"), Contexts::default());
        let mut contexts = Contexts { current: Some("local".into()), ..Contexts::default() };
        let context =
            Context { controllers: vec!["https://127.0.0.1:9443".into()], ca: "ca.pem".into(), ..Context::default() };
        contexts.contexts.insert("local".into(), context);
        contexts.save(&file).expect("saved");
        assert_eq!(Contexts::load(&file).expect("loaded"), contexts);
    }

    #[test]
    fn a_wrong_file_is_named_with_its_line() {
        let directory = tempfile::tempdir().expect("directory");
        let file = directory.path().join("config.toml");
        std::fs::write(&file, "current = \"a\"\n[contexts.a]\ncontroler = []\n").expect("written");
        let failure = Contexts::load(&file).expect_err("unknown key").to_string();
        assert!(failure.contains("config.toml:3: unknown field `controler`"), "{failure}");
        assert!(!failure.contains('\n'), "{failure}");
    }
}
