//! The one thread that writes: it puts every record that is waiting into one transaction, and the access counts,
//! which were only added up in memory, at most a second later.

use std::{
    collections::HashMap,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::Ordering,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use rusqlite::{Connection, ffi};
use tokio::sync::oneshot;

use super::{
    Deleted, Record, Recorded, Status, deletion,
    integrity::{self, Finding},
    sqlite,
};
use crate::{artifact::Digest, error::Error, kill_point};

/// How late an access count may be written, and how soon another process's change is seen.
const TICK: Duration = Duration::from_millis(500);
/// How often a database that could not be written is tried again when nobody wants to write.
const PROBE_EVERY: Duration = Duration::from_secs(5);
/// Records put into one transaction; more only make the first wait longer.
const BATCH: usize = 256;
/// Access counts put into one transaction at least, and transactions that those of a tick are put into at most. A record
/// waits for one transaction only, and on a single processor a hit for what one has to write; but each costs a sync.
const COUNTS: usize = 64;
const COUNT_TRANSACTIONS: usize = 16;

/// What is dropped when a record is durable or has failed.
type Claim = Box<dyn Send>;

enum Command {
    Record(Box<Record>, Claim, oneshot::Sender<Result<Recorded, Error>>),
    Note(Vec<Digest>, Finding, oneshot::Sender<Result<usize, Error>>),
    MarkSwept(Vec<Deleted>, oneshot::Sender<Result<(), Error>>),
    Checkpoint(oneshot::Sender<()>),
}

/// Handle to the writer thread. Dropping it writes what is waiting, checkpoints and joins the thread.
pub(super) struct Writer {
    /// `None` only while dropping.
    commands: Option<mpsc::Sender<Command>>,
    accesses: Arc<Mutex<HashMap<i64, u64>>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Writer {
    pub(super) fn start(db: Connection, status: Arc<Status>) -> io::Result<Writer> {
        let (commands, waiting) = mpsc::channel();
        let accesses = Arc::new(Mutex::new(HashMap::new()));
        let work = Work {
            db,
            status,
            accesses: accesses.clone(),
            counted: Vec::new(),
            at_a_time: COUNTS,
            seen: None,
            dirty_since: None,
            last_probe: Instant::now(),
        };
        let thread = thread::Builder::new().name("catalog".into()).spawn(move || work.run(&waiting))?;
        Ok(Writer { commands: Some(commands), accesses, thread: Some(thread) })
    }

    pub(super) async fn record(&self, record: Record, claim: Claim) -> Result<Recorded, Error> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Record(Box::new(record), claim, reply));
        answer.await.unwrap_or_else(|_| Err(stopped()))
    }

    pub(super) async fn mark_swept(&self, blobs: Vec<Deleted>) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::MarkSwept(blobs, reply));
        answer.await.unwrap_or_else(|_| Err(stopped()))
    }

    pub(super) async fn note(&self, blobs: Vec<Digest>, finding: Finding) -> Result<usize, Error> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Note(blobs, finding, reply));
        answer.await.unwrap_or_else(|_| Err(stopped()))
    }

    pub(super) fn count_access(&self, id: i64) {
        *self.accesses.lock().unwrap_or_else(PoisonError::into_inner).entry(id).or_default() += 1;
    }

    pub(super) async fn checkpoint(&self) {
        let (reply, done) = oneshot::channel();
        self.send(Command::Checkpoint(reply));
        // The thread only ends with this handle; if it did all the same, there is nothing left to wait for.
        let _ = done.await;
    }

    /// A command that finds the thread gone is dropped, and with it the reply, which its waiter sees.
    fn send(&self, command: Command) {
        if let Some(commands) = &self.commands {
            let _ = commands.send(command);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        drop(self.commands.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn stopped() -> Error {
    Error::Internal {
        message: "Failed to write to the catalogue",
        details: "the service is stopping".to_owned(),
        retry_after: Some(Duration::from_secs(5)),
    }
}

struct Work {
    db: Connection,
    status: Arc<Status>,
    accesses: Arc<Mutex<HashMap<i64, u64>>>,
    /// Taken from `accesses` and not written yet; and how many of them go into one transaction.
    counted: Vec<(i64, u64)>,
    at_a_time: usize,
    /// The `data_version` last seen.
    seen: Option<i64>,
    /// When the WAL last got something that is not in the database yet.
    dirty_since: Option<Instant>,
    last_probe: Instant,
}

impl Work {
    fn run(mut self, waiting: &mpsc::Receiver<Command>) {
        self.checkpoint_first();
        let mut next_tick = Instant::now();
        loop {
            // Before anything else, or a steady stream of commands would keep the ticks waiting for ever.
            if Instant::now() >= next_tick {
                self.tick();
                let rest = if self.counted.is_empty() { TICK } else { Duration::ZERO };
                next_tick = Instant::now() + rest;
            }
            match waiting.recv_timeout(next_tick.saturating_duration_since(Instant::now())) {
                // A panic fails what was asked for, whose reply is dropped, and nothing after it: SQLite takes back the
                // transaction that it leaves.
                Ok(command) => drop(catch_unwind(AssertUnwindSafe(|| self.execute(command, waiting)))),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.write_out(),
            }
        }
    }

    /// Executes a command together with all that came in meanwhile.
    fn execute(&mut self, first: Command, waiting: &mpsc::Receiver<Command>) {
        let mut records = Vec::new();
        let mut checkpoints = Vec::new();
        for command in std::iter::once(first).chain(waiting.try_iter()).take(BATCH) {
            match command {
                Command::Record(record, claim, reply) => records.push((record, claim, reply)),
                Command::Note(blobs, finding, reply) => {
                    let noted = self.settle().and_then(|()| integrity::note(&mut self.db, &blobs, finding));
                    self.note(noted.as_ref().err());
                    // Whoever asked may have given up waiting.
                    let _ = reply.send(noted.map_err(|cause| integrity::write_failed(&cause)));
                }
                Command::MarkSwept(blobs, reply) => {
                    // Whoever asked may have been stopped meanwhile.
                    let _ = reply.send(self.mark_swept(&blobs));
                }
                Command::Checkpoint(reply) => checkpoints.push(reply),
            }
        }
        if !records.is_empty() {
            let outcome = self.record(records.iter().map(|(record, ..)| &**record));
            self.note(outcome.as_ref().err());
            let mut outcome = outcome.map(Vec::into_iter).map_err(|cause| {
                tracing::error!(error = %cause, records = records.len(), "catalogue write failed");
                sqlite::error("Failed to write to the catalogue", &cause)
            });
            let mut claims = Vec::with_capacity(records.len());
            for (_, claim, reply) in records {
                claims.push(claim);
                let answer = match &mut outcome {
                    Ok(recorded) => recorded.next().ok_or_else(stopped),
                    Err(error) => Err(error.clone()),
                };
                // The download may have been given up meanwhile; the record stands all the same.
                let _ = reply.send(answer);
            }
            // Only now, so that nobody waits for what giving them up takes.
            drop(claims);
        }
        if !checkpoints.is_empty() {
            self.write_out();
            for reply in checkpoints {
                // Whoever asked may have given up waiting.
                let _ = reply.send(());
            }
        }
    }

    fn record<'a>(&mut self, records: impl Iterator<Item = &'a Record>) -> rusqlite::Result<Vec<Recorded>> {
        self.settle()?;
        let tx = self.db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        kill_point::pass_or_panic("record.begun");
        let recorded = records.map(|record| sqlite::record(&tx, record)).collect::<Result<_, _>>()?;
        kill_point::pass("record.written");
        tx.commit()?;
        kill_point::pass("record.committed");
        Ok(recorded)
    }

    fn mark_swept(&mut self, blobs: &[Deleted]) -> Result<(), Error> {
        let marked = self.settle().and_then(|()| deletion::mark_swept(&mut self.db, blobs));
        self.note(marked.as_ref().err());
        kill_point::pass("sweep.marked");
        marked.map_err(|cause| sqlite::error("Failed to write to the catalogue", &cause))
    }

    fn tick(&mut self) {
        self.write_accesses();
        match sqlite::data_version(&self.db) {
            Ok(now) => {
                if self.seen.replace(now).is_some_and(|before| before != now) {
                    self.status.generation.fetch_add(1, Ordering::Release);
                }
            }
            Err(cause) => tracing::warn!(error = %cause, "catalogue can't be read"),
        }
        if self.status.read_only.load(Ordering::Relaxed) && self.last_probe.elapsed() >= PROBE_EVERY {
            self.last_probe = Instant::now();
            let written = self.settle().and_then(|()| sqlite::probe(&mut self.db));
            self.note(written.as_ref().err());
        }
        if self.dirty_since.is_some_and(|since| since.elapsed() >= Duration::from_secs(1)) {
            self.checkpoint();
        }
    }

    /// Writes one transaction of access counts, if there are any.
    fn write_accesses(&mut self) {
        if self.counted.is_empty() {
            let accesses = std::mem::take(&mut *self.accesses.lock().unwrap_or_else(PoisonError::into_inner));
            self.counted = accesses.into_iter().collect();
            self.at_a_time = self.counted.len().div_ceil(COUNT_TRANSACTIONS).max(COUNTS);
        }
        if self.counted.is_empty() {
            return;
        }
        let rest = self.counted.len().saturating_sub(self.at_a_time);
        let written = self.settle().and_then(|()| sqlite::add_accesses(&mut self.db, &self.counted[rest..]));
        let is_known = self.status.read_only.load(Ordering::Relaxed);
        self.note(written.as_ref().err());
        if let Err(cause) = written {
            if !is_known {
                tracing::warn!(error = %cause, "access counts not written, will be tried again");
            }
            self.take_back();
        }
        self.counted.truncate(rest);
    }

    /// What is not written yet belongs to what is counted from now on.
    fn take_back(&mut self) {
        let mut accesses = self.accesses.lock().unwrap_or_else(PoisonError::into_inner);
        self.counted.drain(..).for_each(|(id, count)| *accesses.entry(id).or_default() += count);
    }

    /// Keeps in mind what a write came to.
    fn note(&mut self, failure: Option<&rusqlite::Error>) {
        match failure {
            None => {
                self.dirty_since = Some(Instant::now());
                if self.status.read_only.swap(false, Ordering::Relaxed) {
                    tracing::info!("the database can be written again");
                }
            }
            Some(cause) if sqlite::is_unwritable(cause) => {
                self.status.note(cause);
                if sqlite::is_io_failure(cause) {
                    self.status.doubtful.store(true, Ordering::Release);
                }
                if !self.status.read_only.swap(true, Ordering::Relaxed) {
                    self.last_probe = Instant::now();
                    tracing::error!(error = %cause, "the database can't be written: new artifacts are refused");
                }
            }
            Some(_) => {}
        }
    }

    /// Fails while nothing may be written.
    ///
    /// After a failed sync the kernel has marked the lost pages clean: syncing again would succeed without them, and
    /// what is then added to the log behind them would be lost with them in a power cut. So the whole log is first
    /// moved into the database, which writes it anew from what SQLite knows to be committed, and begun again from
    /// nothing.
    fn settle(&mut self) -> rusqlite::Result<()> {
        if self.status.corrupt.load(Ordering::Relaxed) {
            return Err(sqlite::failure(ffi::SQLITE_CORRUPT));
        }
        if self.status.doubtful.load(Ordering::Relaxed) {
            if !sqlite::checkpoint(&self.db)? {
                return Err(sqlite::failure(ffi::SQLITE_BUSY));
            }
            self.status.doubtful.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// The process before this one may have ended after a failed sync; see [`Work::settle`].
    fn checkpoint_first(&mut self) {
        match sqlite::checkpoint(&self.db) {
            Ok(true) => {}
            Ok(false) => tracing::warn!("another program reads the database; its log is emptied later"),
            Err(cause) => self.note(Some(&cause)),
        }
    }

    fn checkpoint(&mut self) {
        if self.status.corrupt.load(Ordering::Relaxed) {
            return;
        }
        match sqlite::checkpoint(&self.db) {
            Ok(true) => self.dirty_since = None,
            // Tried again at the next tick.
            Ok(false) => {}
            Err(cause) => {
                // A disk that fails is told of once, by `note`.
                if !sqlite::is_unwritable(&cause) {
                    tracing::warn!(error = %cause, "WAL checkpoint failed, will be tried again");
                }
                self.note(Some(&cause));
            }
        }
    }

    fn write_out(&mut self) {
        // A tick may be in the midst of its transactions; what was counted since then goes with the rest of them.
        self.take_back();
        self.write_accesses();
        while !self.counted.is_empty() {
            self.write_accesses();
        }
        self.checkpoint();
    }
}
