//! Where log lines wait for standard output: one buffer, emptied by a thread of its own.
//!
//! A request only appends to the buffer, and wakes the thread only with the first line of a batch: handing each line over
//! by itself cost a twentieth of the throughput of small hits. The buffer is bounded; when the output does not keep up,
//! lines are dropped and counted, and no request waits.

use std::{
    fs::File,
    io::Write,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

/// How long lines gather before they are written.
const GATHER: Duration = Duration::from_millis(20);
/// How long a clean stop waits for the output.
const LONGEST_GOODBYE: Duration = Duration::from_secs(1);
/// What may wait; past that lines are dropped.
const MOST_BYTES: usize = 4 << 20;

/// A handle to the buffer; clones share it.
#[derive(Debug, Clone)]
pub(super) struct Sink(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    wake: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    closed: bool,
}

/// Writes out what is waiting when it is dropped, and ends the thread.
#[derive(Debug)]
pub(super) struct SinkGuard {
    sink: Sink,
    /// Disconnects when the thread has ended.
    ended: mpsc::Receiver<()>,
}

impl Sink {
    /// Starts the thread that writes to `output`.
    pub(super) fn start(output: File) -> std::io::Result<(Sink, SinkGuard)> {
        let sink = Sink(Arc::default());
        let source = sink.clone();
        let (running, ended) = mpsc::channel();
        thread::Builder::new().name("log".into()).spawn(move || {
            source.drain(output);
            drop(running);
        })?;
        Ok((sink.clone(), SinkGuard { sink, ended }))
    }

    /// Appends a whole line.
    pub(super) fn write(&self, line: &[u8]) {
        let mut waiting = self.waiting();
        if waiting.lines.len() + line.len() > MOST_BYTES {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let is_first = waiting.lines.is_empty();
        waiting.lines.extend_from_slice(line);
        drop(waiting);
        if is_first {
            self.0.wake.notify_one();
        }
    }

    /// Lines dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    fn drain(&self, mut output: File) {
        let mut batch = Vec::new();
        loop {
            let is_idle = |waiting: &mut Waiting| waiting.lines.is_empty() && !waiting.closed;
            let waiting =
                self.0.wake.wait_while(self.waiting(), is_idle).unwrap_or_else(PoisonError::into_inner);
            let closed = waiting.closed;
            drop(waiting);
            if !closed {
                thread::sleep(GATHER);
            }
            std::mem::swap(&mut batch, &mut self.waiting().lines);
            if output.write_all(&batch).is_err() {
                let lost = batch.iter().filter(|&&byte| byte == b'\n').count();
                self.0.dropped.fetch_add(lost as u64, Ordering::Relaxed);
            }
            batch.clear();
            if closed {
                return;
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SinkGuard {
    fn drop(&mut self) {
        self.sink.waiting().closed = true;
        self.sink.0.wake.notify_one();
        // An output that takes nothing must not keep the process.
        let _ = self.ended.recv_timeout(LONGEST_GOODBYE);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn a_clean_stop_loses_no_line() {
        let mut file = tempfile::tempfile().unwrap();
        let (sink, guard) = Sink::start(file.try_clone().unwrap()).unwrap();
        for number in 0..1000 {
            sink.write(format!("{number}\n").as_bytes());
        }
        drop(guard);
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text.lines().count(), 1000);
        assert!(text.ends_with("\n999\n"));
        assert_eq!(sink.dropped(), 0);
    }

    #[test]
    fn a_blocked_output_drops_and_counts_and_never_waits() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let (sink, guard) = Sink::start(File::from(std::os::fd::OwnedFd::from(writer))).unwrap();
        let line = [b'x'; 1024];
        for _ in 0..3 * MOST_BYTES / line.len() {
            sink.write(&line);
        }
        assert!(sink.dropped() > 0);
        // Nobody will ever read, and this ends all the same.
        drop(guard);
    }
}
