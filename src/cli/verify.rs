//! `artifact-cache verify`: is everything there that the database records, and is it what it was?
//!
//! It works beside a running service and takes none of its locks: it reads the database as a second connection, and
//! files that nobody changes in place. With `--repair` the two must not both move files about, so there is one rule:
//! **whoever holds the store's lock mends.** If that can be had, no service runs and this process mends with the same
//! code; if not, the rows are marked, and the running service looks at them within a second, with its own eyes.

use std::{io::Write, path::Path, process::ExitCode, str::FromStr, sync::Arc};

use clap::Args;
use indicatif::{BinaryBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::{ConfigArgs, Outcome};
use crate::{
    artifact::Digest,
    blobs::{self, Blobs, Checked, Loss},
    cache::{Cache, Scrubbed},
    catalog::{Blob, Catalog, Inspection},
    config::{self, Config},
    error::Error,
    telemetry::Metrics,
    upstream::Upstream,
};

pub(super) const HELP: &str = "\
Files that the database does not know are counted; they are no damage. What is whole is noted in the database, so that
the scrub of the service needn't read it again. With --repair, damaged files are moved to .quarantine in the store and
fetched again with the recorded checksum. If the service runs, it does that itself: see its log, or verify again.

Exit codes:
  0  all that was looked at is whole, or is again
  1  it could not be done; standard error says why
  2  the command line is wrong
  3  damage was found, and is still there
  4  damage was found and handed to the running service

Examples:
  artifact-cache verify
  artifact-cache verify --sample 5%
  artifact-cache verify --max-bytes 200GiB --repair
      every night: the next run begins where this one ended
  artifact-cache verify --part 2/7
      a seventh of the store, for instance on Tuesdays";

const DAMAGED: u8 = 3;
const HANDED_OVER: u8 = 4;
/// Whole files noted at a time.
const NOTE_BATCH: usize = 256;
/// More than so many files lost, and none whole, are no rot, but a disk that is not mounted.
const SUSPICIOUS: usize = 32;

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// Set aside what is damaged, and fetch it again
    #[arg(long)]
    repair: bool,
    /// Only so many files, chosen at random: a number, or a share of all
    #[arg(long, value_name = "N|N%")]
    sample: Option<Sample>,
    /// Only the N-th of T parts, so that T runs make a whole
    #[arg(long, value_name = "N/T")]
    part: Option<Part>,
    /// Begin no further file when so many bytes were read; those unverified for the longest time come first
    #[arg(long, value_name = "SIZE", value_parser = config::parse_size)]
    max_bytes: Option<u64>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy)]
enum Sample {
    Count(usize),
    Percent(f64),
}

impl FromStr for Sample {
    type Err = String;

    fn from_str(text: &str) -> Result<Sample, String> {
        let sample = match text.strip_suffix('%') {
            None => text.parse().ok().filter(|&count| count > 0).map(Sample::Count),
            Some(share) => {
                let share = share.parse().ok();
                share.filter(|share| *share > 0.0 && *share <= 100.0).map(Sample::Percent)
            }
        };
        sample.ok_or_else(|| "write a number such as 100, or a share such as 5%".to_owned())
    }
}

#[derive(Debug, Clone, Copy)]
struct Part {
    number: u64,
    of: u64,
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Part, String> {
        let part = text.split_once('/').and_then(|(number, of)| {
            Some(Part { number: number.parse().ok()?, of: of.parse::<u32>().ok()?.into() })
        });
        part.filter(|part| (1..=part.of).contains(&part.number))
            .ok_or_else(|| "write a part such as 2/7: the second of seven".to_owned())
    }
}

impl Part {
    /// Parts are neighbours on the disk: digests from one to another.
    fn has(&self, digest: Digest) -> bool {
        let [a, b, c, d, ..] = *digest.as_bytes();
        (u64::from(u32::from_be_bytes([a, b, c, d])) * self.of) >> 32 == self.number - 1
    }
}

/// A blob that is not what it should be.
struct Damage {
    blob: Blob,
    problem: String,
    urls: Vec<String>,
    fate: Fate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Nobody was asked to mend it.
    Left,
    Healed,
    /// No URL gives it.
    NotHealed,
    HandedOver,
}

impl Fate {
    /// In JSON, and with spaces for people.
    fn as_str(self) -> &'static str {
        match self {
            Fate::Left => "not_repaired",
            Fate::Healed => "fetched_again",
            Fate::NotHealed => "not_to_be_had",
            Fate::HandedOver => "handed_to_the_service",
        }
    }
}

/// What was found.
#[derive(Default)]
struct Report {
    /// Of the database file itself.
    database: Vec<String>,
    /// Recorded, and chosen to be looked at.
    chosen: usize,
    whole: usize,
    /// Chosen, but for `--max-bytes`.
    left: usize,
    read_bytes: u64,
    damaged: Vec<Damage>,
    /// Missing, and no URL has that content now: nothing can be done and nobody asks for it.
    lost_versions: usize,
    orphans: usize,
}

/// Looks, mends if asked to, and tells.
pub(super) fn verify(args: &VerifyArgs, config: &ConfigArgs) -> Outcome {
    let (config, _) = config.load()?;
    let base = &config.storage.base_path;
    // What opens for mending also makes what is not there, and migrates what is old.
    let mut inspection = Inspection::open(&config.storage.database)?;
    if !base.is_dir() {
        return Err(not_mounted(base, "is no directory").into());
    }
    // Before the look, so that no service can start while this process mends.
    let mender = args.repair.then(|| Mender::new(&config)).transpose()?;
    let mut report = look(args, base, &mut inspection)?;
    let mended = match mender {
        Some(_) if report.whole == 0 && report.damaged.len() > SUSPICIOUS => {
            Err(not_mounted(base, "has none of the files, so nothing is mended").into())
        }
        Some(mender) => mender.mend(&mut report.damaged, &mut inspection).map_err(Into::into),
        None => Ok(()),
    };
    let text = if args.json { format!("{}\n", report.to_json()) } else { report.to_text() };
    // A reader who has left has seen enough; the exit code tells the rest.
    let _ = std::io::stdout().write_all(text.as_bytes());
    mended.map(|()| report.exit_code())
}

fn not_mounted(base: &Path, what: &str) -> String {
    format!("storage.base_path {} {what}; mount its disk, or correct the path", base.display())
}

fn look(args: &VerifyArgs, base: &Path, inspection: &mut Inspection) -> Result<Report, Error> {
    let mut report = Report { database: inspection.damage()?, ..Report::default() };
    let blobs = match inspection.blobs() {
        Ok(blobs) => choose(args, blobs),
        // Already told, and what can't be read can't be compared.
        Err(_) if !report.database.is_empty() => return Ok(report),
        Err(error) => return Err(error),
    };
    report.chosen = blobs.len();
    let progress = progress(&blobs, args.max_bytes);
    let mut whole = Vec::new();
    for (at, blob) in blobs.iter().enumerate() {
        if args.max_bytes.is_some_and(|most| report.read_bytes >= most) {
            report.left = blobs.len() - at;
            break;
        }
        match problem(base, *blob, inspection, &mut report.read_bytes, &progress)? {
            None => {
                report.whole += 1;
                match blob.is_missing {
                    // At once: it would undo what a running service finds later.
                    true => warn_unnoted(inspection.note_found(blob.digest)),
                    false => whole.push(blob.digest),
                }
            }
            Some(loss) => {
                let urls = inspection.urls(blob.digest)?;
                let is_deleted = || Ok::<_, Error>(inspection.find(blob.digest)?.is_none());
                match urls.is_empty() {
                    true if blob.is_missing || loss.is_absent => report.lost_versions += 1,
                    true if is_deleted()? => report.chosen -= 1,
                    _ => report.damaged.push(Damage {
                        blob: *blob,
                        problem: loss.problem,
                        urls,
                        fate: Fate::Left,
                    }),
                }
            }
        }
        if whole.len() >= NOTE_BATCH {
            note(inspection, &mut whole);
        }
    }
    note(inspection, &mut whole);
    progress.finish_and_clear();
    report.orphans = count_orphans(base, inspection)?;
    Ok(report)
}

/// The blobs that the options leave, the longest unverified first.
fn choose(args: &VerifyArgs, mut blobs: Vec<Blob>) -> Vec<Blob> {
    if let Some(part) = args.part {
        blobs.retain(|blob| part.has(blob.digest));
    }
    let count = match args.sample {
        None => return blobs,
        Some(Sample::Count(count)) => count,
        Some(Sample::Percent(share)) => (blobs.len() as f64 * share / 100.0).ceil() as usize,
    };
    fastrand::shuffle(&mut blobs);
    blobs.truncate(count);
    blobs
}

/// On a terminal only.
fn progress(blobs: &[Blob], most: Option<u64>) -> ProgressBar {
    let all = blobs.iter().map(|blob| blob.size).sum::<u64>();
    let length = most.map_or(all, |most| most.min(all));
    let progress = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template(
        "{wide_bar} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
    );
    match style {
        Ok(style) => progress.with_style(style),
        Err(_) => progress,
    }
}

/// What is wrong with a blob; looked at twice, because a running service may just have replaced it.
fn problem(
    base: &Path,
    blob: Blob,
    inspection: &Inspection,
    read_bytes: &mut u64,
    progress: &ProgressBar,
) -> Result<Option<Loss>, Error> {
    let mut look = || {
        let mut count = |bytes| {
            *read_bytes += bytes;
            progress.inc(bytes);
            true
        };
        // One file that can't be read must not hide what the others are.
        blobs::check(base, blob.digest, blob.size, &mut count)
            .unwrap_or_else(|cause| Checked::Lost(Loss::unreadable(&cause)))
    };
    let Checked::Lost(first) = look() else { return Ok(None) };
    if inspection.find(blob.digest)?.is_none_or(|now| now.is_missing) {
        return Ok(Some(first));
    }
    Ok(match look() {
        Checked::Lost(second) => Some(second),
        Checked::Whole | Checked::Stopped => None,
    })
}

/// Remembers what was found whole; if it can't be, the scrub only reads it once more.
fn note(inspection: &mut Inspection, whole: &mut Vec<Digest>) {
    warn_unnoted(inspection.note_whole(whole));
    whole.clear();
}

fn warn_unnoted(noted: Result<(), Error>) {
    if let Err(error) = noted {
        super::say(format_args!("warning: what was verified can't be noted: {error}"));
    }
}

fn count_orphans(base: &Path, inspection: &Inspection) -> Result<usize, Error> {
    let mut orphans = 0;
    for first in 0..=u8::MAX {
        let held =
            blobs::list(base, first).map_err(|cause| Error::io("Failed to read cache storage", &cause))?;
        for digest in held {
            orphans += usize::from(!inspection.knows_blob(digest)?);
        }
    }
    Ok(orphans)
}

/// Who mends: this process if no service runs, else the service.
enum Mender {
    Own(tokio::runtime::Runtime, Arc<Cache>),
    Service,
}

impl Mender {
    fn new(config: &Config) -> Result<Mender, Box<dyn std::error::Error>> {
        let blobs = match Blobs::open(&config.storage) {
            Err(blobs::OpenError::Locked { .. }) => return Ok(Mender::Service),
            opened => opened?,
        };
        let catalog = Catalog::open(&config.storage.database, 1)?;
        let upstream = Upstream::new(&config.upstream)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        Ok(Mender::Own(runtime, Cache::new(config, catalog, blobs, upstream, Metrics::new(|| 0))))
    }

    fn mend(self, damaged: &mut [Damage], inspection: &mut Inspection) -> Result<(), Error> {
        match self {
            Mender::Service => {
                let digests: Vec<_> = damaged.iter().map(|damage| damage.blob.digest).collect();
                inspection.ask_for(&digests)?;
                damaged.iter_mut().for_each(|damage| damage.fate = Fate::HandedOver);
            }
            Mender::Own(runtime, cache) => {
                for damage in damaged {
                    damage.fate = match runtime.block_on(cache.scrub(damage.blob, |_| true)) {
                        Ok(Scrubbed::Whole | Scrubbed::Healed) => Fate::Healed,
                        Ok(Scrubbed::Lost | Scrubbed::Changed | Scrubbed::Stopped) => Fate::NotHealed,
                        // What keeps one from being mended need not keep the others.
                        Err(error) => {
                            super::say(format_args!(
                                "warning: {} is not mended: {error}",
                                damage.blob.digest
                            ));
                            Fate::Left
                        }
                    };
                }
                runtime.block_on(cache.checkpoint());
            }
        }
        Ok(())
    }
}

impl Report {
    fn exit_code(&self) -> ExitCode {
        let has = |fate| self.damaged.iter().any(|damage| damage.fate == fate);
        if !self.database.is_empty() || has(Fate::Left) || has(Fate::NotHealed) {
            ExitCode::from(DAMAGED)
        } else if has(Fate::HandedOver) {
            ExitCode::from(HANDED_OVER)
        } else {
            ExitCode::SUCCESS
        }
    }

    fn to_json(&self) -> Value {
        let damaged = self.damaged.iter().map(|damage| {
            json!({
                "sha256": damage.blob.digest,
                "size_bytes": damage.blob.size,
                "problem": damage.problem,
                "source_urls": damage.urls,
                "outcome": damage.fate.as_str(),
            })
        });
        json!({
            "database_problems": self.database,
            "files": self.chosen,
            "whole": self.whole,
            "left": self.left,
            "read_bytes": self.read_bytes,
            "damaged": damaged.collect::<Vec<_>>(),
            "lost_versions": self.lost_versions,
            "orphans": self.orphans,
        })
    }

    fn to_text(&self) -> String {
        let mut lines = Vec::new();
        match self.database.as_slice() {
            [] => lines.push("database  sound".to_owned()),
            problems => {
                lines.push("database  damaged; restore it from a backup or a snapshot".to_owned());
                lines.extend(problems.iter().map(|problem| format!("  {problem}")));
            }
        }
        let read = BinaryBytes(self.read_bytes);
        lines.push(format!("files     {} of {} whole, {read} read", self.whole, self.chosen));
        if self.left > 0 {
            lines.push(format!("left      {}, with which the next run begins", self.left));
        }
        lines.push(format!("damaged   {}", self.damaged.len()));
        for Damage { blob, problem, urls, fate } in &self.damaged {
            lines.push(format!("  {}  {problem}: {}", blob.digest, fate.as_str().replace('_', " ")));
            lines.extend(urls.iter().map(|url| format!("    {url}")));
        }
        if self.lost_versions > 0 {
            lines.push(format!("lost      {} contents that no URL has any more", self.lost_versions));
        }
        if self.orphans > 0 {
            lines.push(format!("orphans   {}, which the database does not know", self.orphans));
        }
        lines.join("\n") + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_digest_is_in_exactly_one_part() {
        for first in 0..=u8::MAX {
            let digest = Digest::from([first; 32]);
            let parts = (1..=7).filter(|&number| Part { number, of: 7 }.has(digest));
            assert_eq!(parts.count(), 1, "{first}");
        }
    }

    #[test]
    fn parts_and_samples_that_make_no_sense_are_refused() {
        for text in ["0/7", "8/7", "1/0", "1", "a/b", "1/2/3"] {
            assert!(text.parse::<Part>().is_err(), "{text}");
        }
        for text in ["0", "0%", "101%", "x", "-1", "%"] {
            assert!(text.parse::<Sample>().is_err(), "{text}");
        }
        assert!("0.5%".parse::<Sample>().is_ok() && "7/7".parse::<Part>().is_ok());
    }
}
