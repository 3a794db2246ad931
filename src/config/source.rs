//! Where configuration comes from: a YAML file and the environment, both turned into the same list of settings.
//!
//! Scalars keep the text they were written with (`1.10` stays `1.10`), so that the key alone decides how to read it.

use std::{fmt, path::Path};

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Spanned, options::NonFiniteFloatPolicy};

use super::{ConfigError, keys};

/// What the environment's variables begin with.
pub(super) const PREFIX: &str = "ARTIFACT_CACHE__";

/// A place to point at: a file with a line, or a variable.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub(super) name: String,
    pub(super) line: Option<u64>,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

#[derive(Debug)]
pub(super) enum Given {
    Null,
    One(String),
    /// Each item with its own place, for a list over several lines.
    Many(Vec<(String, Origin)>),
    /// A mapping, or a list with more than plain values in it.
    Nested,
}

/// One key with what it was given.
#[derive(Debug)]
pub(super) struct Setting {
    pub(super) origin: Origin,
    pub(super) section: String,
    pub(super) key: String,
    pub(super) value: Given,
}

/// A YAML node as far as the configuration needs it.
enum Node {
    Null,
    Text(String),
    /// A number or a boolean: its text is looked up in the source.
    Typed,
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value, a list or a mapping")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_str<E>(self, text: &str) -> Result<Node, E> {
        Ok(Node::Text(text.to_owned()))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Typed)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Typed)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
        Ok(Node::Typed)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Typed)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Node::Map(entries))
    }
}

/// Everything a YAML file sets.
pub(super) fn file(path: &Path) -> Result<Vec<Setting>, ConfigError> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|e| ConfigError(format!("{name}: cannot be read: {e}")))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        ConfigError(format!("{name}: is not UTF-8 text (byte {at}); save it as UTF-8"))
    })?;
    self::text(&name, &text)
}

/// Everything a YAML text sets; `name` is what to call it.
pub(super) fn text(name: &str, text: &str) -> Result<Vec<Setting>, ConfigError> {
    Yaml { name: name.to_owned(), text }.settings()
}

/// The parser's words, but where they would tell a user which option of the parser to change.
fn explained(error: &serde_saphyr::Error) -> String {
    use serde_saphyr::Error;
    match error.without_snippet() {
        Error::DuplicateMappingKey { key: Some(key), .. } => {
            format!("\"{key}\" is set a second time; keep one of them")
        }
        Error::MultipleDocuments { .. } => "a second YAML document begins here; keep one of them".into(),
        other => format!("not valid YAML: {other}"),
    }
}

/// A YAML text and what to call it.
struct Yaml<'a> {
    name: String,
    text: &'a str,
}

impl Yaml<'_> {
    fn settings(&self) -> Result<Vec<Setting>, ConfigError> {
        let sections = match self.parse()? {
            None => return Ok(Vec::new()),
            Some(Spanned { value: Node::Null, .. }) => return Ok(Vec::new()),
            Some(Spanned { value: Node::Map(sections), .. }) => sections,
            Some(other) => {
                return Err(
                    self.wrong(&other, "the file is not a mapping of sections; begin with \"server:\"")
                );
            }
        };
        let mut settings = Vec::new();
        for (section, body) in sections {
            keys::check_section(&section.value).map_err(|e| self.wrong(&section, &e))?;
            match body.value {
                Node::Null => {}
                Node::Map(entries) => {
                    settings.extend(entries.into_iter().map(|e| self.setting(&section.value, e)))
                }
                _ => {
                    let what = format!("{} takes keys of its own, on indented lines below it", section.value);
                    return Err(self.wrong(&section, &what));
                }
            }
        }
        Ok(settings)
    }

    fn parse(&self) -> Result<Option<Spanned<Node>>, ConfigError> {
        let options = serde_saphyr::options! {
            with_snippet: false,
            non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        };
        serde_saphyr::from_str_with_options(self.text, options).map_err(|e| {
            let origin = Origin { name: self.name.clone(), line: e.location().map(|l| l.line()) };
            ConfigError(format!("{origin}: {}", explained(&e)))
        })
    }

    fn setting(&self, section: &str, (key, value): (Spanned<String>, Spanned<Node>)) -> Setting {
        Setting {
            origin: self.origin(&key),
            section: section.to_owned(),
            key: key.value.clone(),
            value: match value.value {
                Node::Null => Given::Null,
                Node::List(items) => self.list(items),
                Node::Map(_) => Given::Nested,
                Node::Text(_) | Node::Typed => Given::One(self.scalar(value).unwrap_or_default()),
            },
        }
    }

    fn list(&self, items: Vec<Spanned<Node>>) -> Given {
        let items = items.into_iter().map(|item| {
            let origin = self.origin(&item);
            self.scalar(item).map(|text| (text, origin))
        });
        items.collect::<Option<_>>().map_or(Given::Nested, Given::Many)
    }

    /// The text of a scalar as written.
    fn scalar(&self, node: Spanned<Node>) -> Option<String> {
        match node.value {
            Node::Text(text) => Some(text),
            Node::Typed => {
                // Where it was written, which for an alias is at its anchor.
                let span = node.defined.span();
                let (skip, take) = (usize::try_from(span.offset()).ok()?, usize::try_from(span.len()).ok()?);
                Some(self.text.chars().skip(skip).take(take).collect::<String>().trim().to_owned())
            }
            _ => None,
        }
    }

    fn origin<T>(&self, at: &Spanned<T>) -> Origin {
        Origin { name: self.name.clone(), line: Some(at.referenced.line()) }
    }

    fn wrong<T>(&self, at: &Spanned<T>, what: &str) -> ConfigError {
        ConfigError(format!("{}: {what}", self.origin(at)))
    }
}

/// Everything the environment sets: the variables that begin with the prefix, in order of their names.
pub(super) fn environment(
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<Vec<Setting>, ConfigError> {
    let mut ours: Vec<_> = env.into_iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
    ours.sort();
    let mut settings: Vec<Setting> = Vec::new();
    for (name, text) in ours {
        let setting = variable(&name, &text)?;
        // Two spellings of one key: whichever won, one of them would be ignored without a word.
        if let Some(twin) = settings.iter().find(|s| (&s.section, &s.key) == (&setting.section, &setting.key))
        {
            return Err(ConfigError(format!(
                "{name}: sets the same key as {}; keep one of them",
                twin.origin
            )));
        }
        settings.push(setting);
    }
    Ok(settings)
}

fn variable(name: &str, text: &str) -> Result<Setting, ConfigError> {
    let lower = name[PREFIX.len()..].to_ascii_lowercase();
    let origin = Origin { name: name.to_owned(), line: None };
    let (section, key) = lower.split_once("__").ok_or_else(|| {
        ConfigError(format!("{name}: names no key; write {PREFIX}SECTION__KEY, such as {PREFIX}SERVER__PORT"))
    })?;
    keys::check_section(section).map_err(|e| ConfigError(format!("{name}: {e}")))?;
    let kind = keys::find(section, key).map_err(|e| ConfigError(format!("{name}: {e}")))?.kind();
    let value = match kind {
        keys::Kind::List => env_list(&origin, text)?,
        keys::Kind::Optional if matches!(text.trim(), "" | "~" | "null") => Given::Null,
        keys::Kind::Optional | keys::Kind::One => Given::One(env_scalar(text)),
    };
    Ok(Setting { origin, section: section.to_owned(), key: key.to_owned(), value })
}

/// A scalar is taken as it is, unless it is one quoted YAML string.
fn env_scalar(text: &str) -> String {
    let text = text.trim();
    let quoted = text.starts_with(['"', '\'']).then(|| serde_saphyr::from_str::<String>(text).ok()).flatten();
    quoted.unwrap_or_else(|| text.to_owned())
}

/// A list is `[a, b]` as in YAML, or `a, b`; commas inside `{…}` belong to a pattern.
fn env_list(origin: &Origin, text: &str) -> Result<Given, ConfigError> {
    let text = text.trim();
    if text.starts_with('[') {
        let items: Vec<String> = serde_saphyr::from_str(text).map_err(|e| {
            ConfigError(format!("{origin}: not a YAML list: {}; write [a, b] or a,b", e.without_snippet()))
        })?;
        return Ok(Given::Many(items.into_iter().map(|item| (item, origin.clone())).collect()));
    }
    let mut depth = 0_usize;
    let parts = text.split(|c| {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    });
    let items = parts.map(str::trim).filter(|part| !part.is_empty());
    Ok(Given::Many(items.map(|part| (part.to_owned(), origin.clone())).collect()))
}
