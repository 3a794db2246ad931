//! The configuration: built-in defaults, over them a YAML file, over that the environment; checked once, then fixed.

mod keys;
mod source;
#[cfg(test)]
mod tests;
mod value;

use std::{
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    time::Duration,
};

pub use crate::artifact::globs::{HostGlobs, QueryGlobs};
use http::HeaderValue;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use keys::Set;
use source::{Given, Setting};
use tracing::Level;
use url::Url;

/// Everything that can be set. Every value has been checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The service's own side.
    pub server: Server,
    /// Where artifacts and their records lie.
    pub storage: Storage,
    /// What is logged and how.
    pub logging: Logging,
    /// How and from where artifacts are downloaded.
    pub upstream: Upstream,
    /// How `/fetch` answers.
    pub fetch: Fetch,
    /// What is done in the background.
    pub jobs: Jobs,
    /// Whether the metrics port was asked for by name, so that failing to bind it is an error.
    pub metrics_port_given: bool,
}

/// Section `server`.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// Address that both listeners bind.
    pub host: IpAddr,
    /// API port; 0 lets the system choose.
    pub port: u16,
    /// Port of the listener that has only metrics; 0 for none.
    pub metrics_port: u16,
    /// Peers whose forwarding headers are believed.
    pub trusted_proxies: Vec<IpNet>,
    /// Client connections at a time.
    pub max_connections: usize,
    /// From accept, or a request's first byte, to the end of its head.
    pub header_timeout: Duration,
    /// How long a connection may idle between requests.
    pub keepalive_timeout: Duration,
    /// How long a client may read nothing of its answer.
    pub write_idle_timeout: Duration,
    /// How long answers may go on after the order to stop.
    pub shutdown_grace: Duration,
}

/// Section `storage`.
#[derive(Clone, Debug, PartialEq)]
pub struct Storage {
    /// Directory of the artifacts.
    pub base_path: PathBuf,
    /// The SQLite file.
    pub database: PathBuf,
    /// Size in bytes over which an artifact is refused; above 0.
    pub max_artifact_bytes: u64,
    /// Bytes of disk that downloads leave free.
    pub min_free_bytes: u64,
    /// After so many bytes a download is made safe to be continued after a restart; above 0.
    pub checkpoint_bytes: u64,
    /// How long a download that broke off is kept to be continued; zero for not at all.
    pub partial_keep: Duration,
    /// Bytes of all downloads kept so, together; 0 for none.
    pub partial_max_bytes: u64,
}

/// Section `logging`.
#[derive(Clone, Debug, PartialEq)]
pub struct Logging {
    /// The least important level still logged.
    pub level: Level,
    /// How a line looks.
    pub format: LogFormat,
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object.
    #[default]
    Json,
    /// For people.
    Text,
}

/// Section `upstream`.
#[derive(Clone, Debug, PartialEq)]
pub struct Upstream {
    /// How long a download may go without a new byte, over all its attempts.
    pub timeout: Duration,
    /// How long one attempt may be silent or too slow.
    pub stall: Duration,
    /// Bytes a second under which an attempt is too slow; 0 for no such limit.
    pub min_bytes_per_second: u64,
    /// For one connection, TLS included.
    pub connect_timeout: Duration,
    /// Further attempts in a row without real progress.
    pub max_retries: u32,
    /// Redirects followed.
    pub max_redirects: u32,
    /// Downloads at a time.
    pub max_downloads: usize,
    /// What upstream is told that we are.
    pub user_agent: HeaderValue,
    /// An http:// proxy for every download: host and port, no credentials.
    pub proxy: Option<Url>,
    /// PEM file of certificates trusted beside the system's.
    pub ca_file: Option<PathBuf>,
    /// Internal networks that may be asked all the same.
    pub allow_private_networks: Vec<IpNet>,
    /// If not empty, the only hosts that may be asked.
    pub allow_hosts: HostGlobs,
    /// Hosts that may not be asked.
    pub deny_hosts: HostGlobs,
}

/// Section `fetch`.
#[derive(Clone, Debug, PartialEq)]
pub struct Fetch {
    /// How long a miss may take before its body is streamed as it arrives.
    pub stream_after: Duration,
    /// Bytes at the end of a streamed body held back until all is verified; above 0.
    pub tail_hold_bytes: u64,
    /// How a streamed body is framed.
    pub stream_framing: StreamFraming,
    /// How long a rejected digest is remembered.
    pub mismatch_memory: Duration,
    /// Query parameters that are no part of what a URL names.
    pub ignore_query: QueryGlobs,
}

/// Section `jobs`.
#[derive(Clone, Debug, PartialEq)]
pub struct Jobs {
    /// Daily snapshots of the database that are kept; 0 for none.
    pub snapshots_kept: usize,
}

/// How a streamed HTTP/1.1 body is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamFraming {
    /// By length if known and no proxy is between, else in chunks.
    Auto,
    /// By length whenever it is known.
    ContentLength,
    /// In chunks always.
    Chunked,
}

/// Why there is no configuration: a complete message that names the place, the key and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

/// Signature parameters of object stores and CDNs. What may name content by itself has a condition, and what changes
/// content (`versionId`, `generation`, `snapshot`, `x-oss-process`) is not here.
const IGNORE_QUERY: [&str; 12] = [
    // AWS Signature V4, and the headers that a signed URL may set.
    "X-Amz-*",
    "{x-id,response-*} if X-Amz-Signature",
    // Google Cloud Storage V4.
    "X-Goog-*",
    "response-* if X-Goog-Signature",
    // The V2 scheme of AWS, Google and Alibaba.
    "{AWSAccessKeyId,GoogleAccessId,OSSAccessKeyId} if Signature and Expires",
    "{Signature,Expires,security-token,response-*} if {AWSAccessKeyId,GoogleAccessId,OSSAccessKeyId} and Signature and Expires",
    // Alibaba V2 and V4.
    "x-oss-{signature,signature-version,credential,access-key-id,date,expires,additional-headers,security-token}",
    "response-* if x-oss-signature",
    // CloudFront.
    "{Expires,Policy,Signature,Key-Pair-Id,Hash-Algorithm} if Signature and Key-Pair-Id and {Expires,Policy}",
    // Azure shared access signatures: who, what, until when; then the headers they may set.
    "{sv,ss,srt,sp,st,se,sip,spr,sr,si,sig,sdd,ses,scid} if sig and sv",
    "{skoid,sktid,skt,ske,sks,skv,saoid,suoid,jwt} if sig and sv",
    "{rscc,rscd,rsce,rscl,rsct,response-*} if sig and sv",
];

impl Default for Config {
    fn default() -> Config {
        Config {
            server: Server::default(),
            storage: Storage {
                base_path: "./data/cache".into(),
                database: "./data/metadata.db".into(),
                max_artifact_bytes: 100 << 30,
                min_free_bytes: 1 << 30,
                checkpoint_bytes: 64 << 20,
                partial_keep: Duration::from_secs(24 * 3600),
                partial_max_bytes: 20 << 30,
            },
            logging: Logging { level: Level::INFO, format: LogFormat::Json },
            upstream: Upstream::default(),
            fetch: Fetch {
                stream_after: Duration::from_secs(3),
                tail_hold_bytes: 64 << 10,
                stream_framing: StreamFraming::Auto,
                mismatch_memory: Duration::from_secs(600),
                ignore_query: QueryGlobs::new(&IGNORE_QUERY)
                    .expect("the constant above, which a test compiles"),
            },
            jobs: Jobs { snapshots_kept: 7 },
            metrics_port_given: false,
        }
    }
}

impl Default for Server {
    fn default() -> Server {
        let loopback =
            [Ipv4Net::from(Ipv4Addr::LOCALHOST).into(), Ipv6Net::from(std::net::Ipv6Addr::LOCALHOST).into()];
        Server {
            host: Ipv4Addr::LOCALHOST.into(),
            port: 8080,
            metrics_port: 9090,
            trusted_proxies: loopback.into(),
            max_connections: 4096,
            header_timeout: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(120),
            write_idle_timeout: Duration::from_secs(300),
            // Under the 10 s after which container runtimes kill.
            shutdown_grace: Duration::from_secs(8),
        }
    }
}

impl Default for Upstream {
    fn default() -> Upstream {
        Upstream {
            timeout: Duration::from_secs(600),
            stall: Duration::from_secs(60),
            min_bytes_per_second: 1024,
            connect_timeout: Duration::from_secs(10),
            max_retries: 3,
            max_redirects: 10,
            max_downloads: 64,
            user_agent: HeaderValue::from_static("HomeLabArtifactCache/1.0"),
            proxy: None,
            ca_file: None,
            allow_private_networks: Vec::new(),
            allow_hosts: HostGlobs::default(),
            deny_hosts: HostGlobs::default(),
        }
    }
}

impl Config {
    /// Reads the file, if one is given, then the variables of `env` that begin with `ARTIFACT_CACHE__`. With neither,
    /// the built-in defaults. The first thing wrong is the error.
    pub fn load(
        file: Option<&Path>,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Config, ConfigError> {
        let mut settings = file.map(source::file).transpose()?.unwrap_or_default();
        settings.extend(source::environment(env)?);
        let mut config = Config::default();
        for setting in &settings {
            config.apply(setting)?;
        }
        config.check(&settings)
    }

    /// The names of all keys, as `section.key`, in the order of the example file.
    pub fn keys() -> impl Iterator<Item = String> {
        keys::KEYS.iter().map(|key| format!("{}.{}", key.section, key.name))
    }

    fn apply(&mut self, setting: &Setting) -> Result<(), ConfigError> {
        let Setting { origin, section, key: name, value } = setting;
        let key = keys::find(section, name).map_err(|e| ConfigError(format!("{origin}: {e}")))?;
        let wrong =
            |what: &str| Err(ConfigError(format!("{origin}: {section}.{name} {what}; write {}", key.right)));
        let (at, text, why) = match (&key.set, value) {
            (Set::One(set), Given::One(text)) => match set(self, text) {
                Ok(()) => return Ok(()),
                Err(why) => (origin, text, why),
            },
            (Set::Optional(set), Given::Null) => {
                return set(self, None).or_else(|why| wrong(&why));
            }
            (Set::Optional(set), Given::One(text)) => match set(self, Some(text)) {
                Ok(()) => return Ok(()),
                Err(why) => (origin, text, why),
            },
            (Set::List(set), Given::Many(items)) => {
                let texts: Vec<&str> = items.iter().map(|(text, _)| text.as_str()).collect();
                match set(self, &texts) {
                    Ok(()) => return Ok(()),
                    Err((item, why)) => (&items[item].1, &items[item].0, why),
                }
            }
            (Set::List(_), Given::Null) => return wrong("has no value ([] is the empty list)"),
            (_, Given::Null) => return wrong("has no value"),
            (Set::List(_), _) => return wrong("takes a list of plain values"),
            (_, _) => return wrong("takes one plain value"),
        };
        Err(ConfigError(format!("{at}: {section}.{name}: \"{}\" {why}; write {}", shown(text), key.right)))
    }

    /// What no key can judge alone.
    fn check(self, settings: &[Setting]) -> Result<Config, ConfigError> {
        let Server { port, metrics_port, .. } = self.server;
        if self.metrics_port_given && port == metrics_port && port != 0 {
            let by = settings.iter().rev().find(|s| s.section == "server" && s.key == "metrics_port");
            let origin = by.map(|s| s.origin.to_string()).unwrap_or_default();
            return Err(ConfigError(format!(
                "{origin}: server.metrics_port: \"{port}\" is also server.port; write another port, such as 9090, or \
                 0, since /metrics is on server.port too"
            )));
        }
        Ok(self)
    }
}

/// A value fit for a message: without the password of a URL, on one line, and not endless.
fn shown(text: &str) -> String {
    let text = match (text.find("://"), text.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => format!("{}://…{}", &text[..scheme], &text[at..]),
        _ => text.to_owned(),
    };
    text.chars()
        .take(200)
        .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
        .collect()
}
