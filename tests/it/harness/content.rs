//! Bytes that need no memory: a seeded block, repeated, with its number stamped into each copy.

use std::sync::Arc;

use sha2::Digest as _;

const BLOCK: usize = 1 << 20;

/// Deterministic content of any length; two seeds give two contents.
#[derive(Clone)]
pub struct Content {
    block: Arc<[u8]>,
    len: u64,
}

impl Content {
    /// `len` bytes made from `seed`.
    pub fn new(seed: u64, len: u64) -> Content {
        let size = (len as usize).min(BLOCK).next_multiple_of(8).max(8);
        let block: Vec<u8> = (0..size as u64 / 8).flat_map(|i| scramble(seed, i).to_le_bytes()).collect();
        Content { block: block.into(), len }
    }

    /// Just these bytes.
    pub fn of(bytes: &[u8]) -> Content {
        assert!(bytes.len() < BLOCK, "longer content is generated");
        Content { block: bytes.into(), len: bytes.len() as u64 }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The bytes from `start` on, at most up to `end`, and at most one block of them.
    pub fn piece(&self, start: u64, end: u64) -> Vec<u8> {
        let end = end.min(self.len);
        let (number, offset) = (start / BLOCK as u64, (start % BLOCK as u64) as usize);
        let mut copy = self.block.to_vec();
        if number > 0 {
            copy[..8].copy_from_slice(&scramble(number, 0).to_le_bytes());
        }
        let stop = (offset as u64 + end.saturating_sub(start)).min(copy.len() as u64) as usize;
        copy[offset..stop].to_vec()
    }

    /// Hands all bytes of `start..end` to `sink`, block by block.
    pub fn each<E>(
        &self,
        start: u64,
        end: u64,
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut at, end) = (start, end.min(self.len));
        while at < end {
            let piece = self.piece(at, end);
            sink(&piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Everything in memory: for small contents.
    pub fn bytes(&self) -> Vec<u8> {
        let mut all = Vec::new();
        let _ = self.each(0, self.len, |piece| {
            all.extend_from_slice(piece);
            Ok::<(), ()>(())
        });
        all
    }

    /// SHA-256 in lower-case hex.
    pub fn sha256(&self) -> String {
        let mut hasher = sha2::Sha256::new();
        let _ = self.each(0, self.len, |piece| {
            hasher.update(piece);
            Ok::<(), ()>(())
        });
        hex(&hasher.finalize())
    }
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of `bytes` in lower-case hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&sha2::Sha256::digest(bytes))
}

/// The output function of SplitMix64, at position `index` of the sequence that `seed` begins.
fn scramble(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
