//! What is in force and where it came from, for people who wonder.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::{
    ConfigError, keys,
    source::{self, Given, Setting},
};

/// The example file: every key with its default and what it means. `tests/config_example.rs` holds it to that.
pub const EXAMPLE: &str = include_str!("../../config.example.yaml");

/// A key with the value in force.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Effective {
    /// Its section.
    #[serde(skip)]
    pub section: &'static str,
    /// Its name in the section.
    #[serde(skip)]
    pub name: &'static str,
    /// Section and name with a dot between.
    pub key: String,
    /// The value as it was written; a number if it looks like one.
    pub value: Value,
    /// `default`, or the file with the line, or the variable.
    pub from: String,
}

/// Every key, in the order of the example file, from the same places as [`super::Config::load`]. Values are not checked.
///
/// # Errors
/// What can't be read, and keys that there are not.
pub fn effective(
    file: Option<&Path>,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<Vec<Effective>, ConfigError> {
    let mut settings = source::text("default", EXAMPLE)?;
    let defaults = settings.len();
    settings.extend(file.map(source::file).transpose()?.unwrap_or_default());
    settings.extend(source::environment(env)?);
    let in_force = |key: &'static keys::Key| {
        let sets =
            |setting: &Setting| (setting.section.as_str(), setting.key.as_str()) == (key.section, key.name);
        let at = settings.iter().rposition(sets)?;
        let Setting { origin, value, .. } = &settings[at];
        Some(Effective {
            section: key.section,
            name: key.name,
            key: format!("{}.{}", key.section, key.name),
            value: json(value),
            from: if at < defaults { origin.name.clone() } else { origin.to_string() },
        })
    };
    Ok(keys::KEYS.iter().filter_map(in_force).collect())
}

fn json(given: &Given) -> Value {
    match given {
        // A mapping is refused when the configuration is loaded.
        Given::Null | Given::Nested => Value::Null,
        Given::One(text) => scalar(text),
        Given::Many(items) => items.iter().map(|(text, _)| scalar(text)).collect(),
    }
}

/// A number only if it would be written like that: a user agent `1.10` must not become 1.1.
fn scalar(text: &str) -> Value {
    match serde_json::from_str(text) {
        Ok(Value::Number(number)) if number.to_string() == text => Value::Number(number),
        _ => text.into(),
    }
}
