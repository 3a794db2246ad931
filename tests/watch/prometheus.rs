//! A real Prometheus with the configuration of `deploy/prometheus`, which scrapes a service of the tests.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::{Client, encode, eventually};
use crate::program::{free_address, need};
use crate::stage::Stage;

/// Several times a second: rates need two samples, and tests no waiting.
const SCRAPE_INTERVAL: &str = "200ms";

/// A running Prometheus; it stops when dropped.
pub struct Prometheus {
    child: Child,
    address: SocketAddr,
    dir: tempfile::TempDir,
}

/// The directory with the configuration and the rules.
pub fn config_dir() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/prometheus"))
}

impl Prometheus {
    /// Starts it and waits for its first scrape; none, and the test is skipped, if it is not installed.
    pub fn watch(stage: &Stage) -> Option<Prometheus> {
        let program = need("prometheus")?;
        let (dir, address) = (tempfile::tempdir().unwrap(), free_address());
        let metrics = stage.service.metrics.expect("the second listener is on");
        let config = fs::read_to_string(config_dir().join("prometheus.yml")).unwrap();
        let config = config.replace("30s", SCRAPE_INTERVAL);
        let config = config.replace("artifact-cache:9090", &metrics.to_string());
        assert!(config.contains(&metrics.to_string()), "the target is replaced");
        fs::write(dir.path().join("prometheus.yml"), config).unwrap();
        let rules = "artifact-cache.rules.yml";
        fs::copy(config_dir().join(rules), dir.path().join(rules)).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new(program);
        command.args(["--config.file=prometheus.yml", "--storage.tsdb.path=tsdb"]);
        command.arg(format!("--web.listen-address={address}"));
        command.current_dir(dir.path()).env_clear();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().expect("Prometheus starts");
        let mut prometheus = Prometheus { child, address, dir };
        eventually("Prometheus has scraped the service", || {
            let log = || fs::read_to_string(prometheus.dir.path().join("log")).unwrap_or_default();
            assert!(prometheus.child.try_wait().unwrap().is_none(), "Prometheus ended: {}", log());
            std::net::TcpStream::connect(address).ok()?;
            let up = prometheus.try_query("artifact_cache_items_total").ok()?;
            (!up.is_empty()).then_some(())
        });
        Some(prometheus)
    }

    /// `data` of an answer of its API, or its error.
    fn api(&self, target: &str) -> Result<Value, String> {
        let mut client = Client::connect(self.address);
        client.request("GET", target, &[("Connection", "close")]);
        let answer = client.response("GET");
        let json: Value =
            serde_json::from_slice(&answer.body).map_err(|e| format!("{e}: {}", answer.status))?;
        match json["status"].as_str() {
            Some("success") => Ok(json["data"].clone()),
            _ => Err(json["error"].to_string()),
        }
    }

    fn try_query(&self, promql: &str) -> Result<Vec<f64>, String> {
        let data = self.api(&format!("/api/v1/query?query={}", encode(promql)))?;
        let value = |series: &Value| {
            series["value"][1].as_str().and_then(|text| text.parse().ok()).unwrap_or(f64::NAN)
        };
        Ok(data["result"].as_array().into_iter().flatten().map(value).collect())
    }

    /// What a query gives now, a value a series.
    #[track_caller]
    pub fn query(&self, promql: &str) -> Vec<f64> {
        self.try_query(promql).unwrap_or_else(|error| panic!("{error} in {promql}"))
    }

    /// What a query of one series gives now.
    #[track_caller]
    pub fn value(&self, promql: &str) -> f64 {
        let values = self.query(promql);
        assert_eq!(values.len(), 1, "{promql}: {values:?}");
        values[0]
    }

    /// The values of a label, as a dashboard's variable asks for them.
    #[track_caller]
    pub fn label_values(&self, metric: &str, label: &str) -> Vec<String> {
        let data = self.api(&format!("/api/v1/label/{label}/values?match[]={metric}")).unwrap();
        serde_json::from_value(data).unwrap()
    }

    /// All rules with their state.
    #[track_caller]
    pub fn rules(&self) -> Vec<Value> {
        let data = self.api("/api/v1/rules").unwrap();
        let groups = data["groups"].as_array().cloned().unwrap_or_default();
        groups.iter().flat_map(|group| group["rules"].as_array().cloned().unwrap_or_default()).collect()
    }

    /// Waits until all these requests were scraped.
    #[track_caller]
    pub fn catch_up(&self, requests: u64) {
        eventually("the last request was scraped", || {
            (self.query("sum(artifact_cache_requests_total)") == [requests as f64]).then_some(())
        });
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // It is our child and not yet waited for, so the id is still its own. What it stored is thrown away.
        let _ = kill_process(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}
