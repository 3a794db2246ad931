//! The digest of a file while it is written: beside the writing, once there is enough of it to be worth a thread.
//!
//! Hashing 1 GiB takes half a second, writing it nearly as long; one after the other that was most of a large download
//! (`docs/performance.md`).

use std::{
    io,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
};

use super::spool::Chunk;
use crate::artifact::digest::Hasher;

/// From here on a file is hashed by a thread of its own; most files are shorter.
const BESIDE_FROM: u64 = 4 << 20;

/// What is hashed so far, or who hashes it.
#[derive(Debug)]
pub(super) enum Hashing {
    /// Not enough yet for a thread.
    Short(Hasher),
    /// By who writes the file, to the end.
    Here(Hasher),
    /// By a thread of its own.
    Beside { orders: mpsc::Sender<Order>, thread: JoinHandle<Hasher> },
}

/// What that thread is told.
pub(super) enum Order {
    /// The next bytes; their share of the memory goes back when they are hashed.
    Update(Arc<Chunk>),
    /// Asks for the hash of all that came before.
    Tell(mpsc::SyncSender<Hasher>),
}

impl Hashing {
    /// Goes on from what is hashed already.
    pub(super) fn new(hasher: Hasher) -> Hashing {
        Hashing::Short(hasher)
    }

    /// Takes in the bytes that come after the first `before`.
    pub(super) fn update(&mut self, chunk: &Arc<Chunk>, before: u64) {
        if let Hashing::Short(hasher) = self
            && before >= BESIDE_FROM
        {
            *self = Hashing::long(hasher.clone());
        }
        match self {
            Hashing::Short(hasher) | Hashing::Here(hasher) => hasher.update(&chunk.bytes),
            // If the thread is gone, whoever asks for the hash is told.
            Hashing::Beside { orders, .. } => drop(orders.send(Order::Update(chunk.clone()))),
        }
    }

    /// The hash of all bytes so far. Waits until they are hashed.
    ///
    /// # Errors
    /// When the thread is gone, which would be a bug.
    pub(super) fn hasher(&self) -> io::Result<Hasher> {
        match self {
            Hashing::Short(hasher) | Hashing::Here(hasher) => Ok(hasher.clone()),
            Hashing::Beside { orders, .. } => {
                let (teller, told) = mpsc::sync_channel(1);
                drop(orders.send(Order::Tell(teller)));
                told.recv().map_err(io::Error::other)
            }
        }
    }

    /// The hash of all bytes. Waits until they are hashed.
    ///
    /// # Errors
    /// As [`Hashing::hasher`].
    pub(super) fn finish(self) -> io::Result<Hasher> {
        match self {
            Hashing::Short(hasher) | Hashing::Here(hasher) => Ok(hasher),
            Hashing::Beside { orders, thread } => {
                drop(orders);
                thread.join().map_err(|_| io::Error::other("hashing panicked"))
            }
        }
    }

    /// By a thread, except on one processor, where it would only be in the way, or where there is none to be had.
    fn long(hasher: Hasher) -> Hashing {
        if thread::available_parallelism().is_ok_and(|processors| processors.get() == 1) {
            return Hashing::Here(hasher);
        }
        let (orders, incoming) = mpsc::channel();
        let mut beside = hasher.clone();
        let thread = thread::Builder::new().name("spool hash".to_owned()).spawn(move || {
            for order in incoming {
                match order {
                    Order::Update(chunk) => beside.update(&chunk.bytes),
                    // Who asked may have given up.
                    Order::Tell(teller) => drop(teller.send(beside.clone())),
                }
            }
            beside
        });
        match thread {
            Ok(thread) => Hashing::Beside { orders, thread },
            Err(_) => Hashing::Here(hasher),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn beside_the_writing_it_is_the_same_hash() {
        let mut hashing = Hashing::new(Hasher::new());
        let mut expected = Hasher::new();
        let mut written = 0;
        for at in 0..10_u8 {
            let bytes = vec![at; 1 << 20];
            expected.update(&bytes);
            hashing.update(&Arc::new(Chunk::of(bytes.into())), written);
            written += 1 << 20;
            assert_eq!(
                hashing.hasher().unwrap().finish(),
                expected.clone().finish(),
                "after {written} bytes"
            );
        }
        let has_two = thread::available_parallelism().unwrap().get() > 1;
        assert_eq!(matches!(hashing, Hashing::Beside { .. }), has_two);
        hashing.update(&Arc::new(Chunk::of(Bytes::from_static(b"end"))), written);
        expected.update(b"end");
        assert_eq!(hashing.finish().unwrap().finish(), expected.finish());
    }

    #[test]
    fn what_is_short_is_hashed_here() {
        let mut hashing = Hashing::new(Hasher::new());
        hashing.update(&Arc::new(Chunk::of(vec![7; BESIDE_FROM as usize].into())), 0);
        assert!(matches!(hashing, Hashing::Short(_)));
    }
}
