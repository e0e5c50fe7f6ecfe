//! Checks that a blob is what its sender says it is. Pure.

use super::CHUNK_MAX_BYTES;

/// The length and digest of a whole blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its length.
    pub length_bytes: u64,
    /// BLAKE3 of its bytes.
    pub digest: blake3::Hash,
}

/// How a blob differs from what was announced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// A chunk is missing, doubled or out of order.
    #[error("a chunk says that it begins at byte {announced}, but {received} bytes have come before it")]
    Offset {
        /// As the chunk says.
        announced: u64,
        /// As counted here.
        received: u64,
    },
    /// Empty, or larger than agreed.
    #[error("a chunk has {0} bytes; 1 to {CHUNK_MAX_BYTES} are allowed")]
    ChunkSize(usize),
    /// The blob is shorter or longer than the trailer says.
    #[error("the blob has {received} bytes, but its sender read {announced}")]
    Length {
        /// As the trailer says.
        announced: u64,
        /// As counted here.
        received: u64,
    },
    /// The bytes are not those that were sent.
    #[error("the blob's digest is {received}, but its sender computed {announced}")]
    Digest {
        /// As the trailer says, in hexadecimal.
        announced: String,
        /// As computed here, in hexadecimal.
        received: String,
    },
}

/// Counts and hashes a blob while it passes.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    length_bytes: u64,
    hasher: blake3::Hasher,
}

impl Tally {
    /// Adds the sender's next bytes. Returns the offset at which they begin.
    pub fn add(&mut self, data: &[u8]) -> u64 {
        let offset = self.length_bytes;
        self.length_bytes = offset.saturating_add(data.len() as u64);
        self.hasher.update(data);
        offset
    }

    /// Adds a chunk that has arrived.
    ///
    /// # Errors
    /// If it is not the next one, or has an invalid size. Nothing is added then.
    pub fn accept(&mut self, announced_offset: u64, data: &[u8]) -> Result<(), Mismatch> {
        if data.is_empty() || data.len() > CHUNK_MAX_BYTES {
            return Err(Mismatch::ChunkSize(data.len()));
        }
        if announced_offset != self.length_bytes {
            return Err(Mismatch::Offset { announced: announced_offset, received: self.length_bytes });
        }
        self.add(data);
        Ok(())
    }

    /// Bytes so far.
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// The summary of the blob, if it ends here.
    pub fn summary(&self) -> Summary {
        Summary { length_bytes: self.length_bytes, digest: self.hasher.finalize() }
    }

    /// Compares the whole blob with the sender's trailer.
    ///
    /// # Errors
    /// If the length or the digest differs.
    pub fn verify(&self, announced_length_bytes: u64, announced_digest: &[u8]) -> Result<Summary, Mismatch> {
        let summary = self.summary();
        if summary.length_bytes != announced_length_bytes {
            return Err(Mismatch::Length {
                announced: announced_length_bytes,
                received: summary.length_bytes,
            });
        }
        if summary.digest.as_bytes() != announced_digest {
            return Err(Mismatch::Digest {
                announced: hexadecimal(announced_digest),
                received: summary.digest.to_hex().to_string(),
            });
        }
        Ok(summary)
    }
}

/// At most 32 bytes are shown: no digest is longer.
fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().take(32).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sent(blob: &[u8], chunk: usize) -> (Vec<(u64, Vec<u8>)>, Summary) {
        let mut tally = Tally::default();
        let chunks = blob.chunks(chunk).map(|data| (tally.add(data), data.to_vec())).collect();
        (chunks, tally.summary())
    }

    fn received(chunks: &[(u64, Vec<u8>)], summary: Summary) -> Result<Summary, Mismatch> {
        let mut tally = Tally::default();
        for (offset, data) in chunks {
            tally.accept(*offset, data)?;
        }
        tally.verify(summary.length_bytes, summary.digest.as_bytes())
    }

    proptest! {
        #[test]
        fn what_was_sent_is_accepted_however_it_was_cut(
            blob in proptest::collection::vec(any::<u8>(), 0..2000), chunk in 1..300_usize,
        ) {
            let (chunks, summary) = sent(&blob, chunk);
            prop_assert_eq!(received(&chunks, summary), Ok(summary));
        }

        #[test]
        fn a_chunk_lost_doubled_or_swapped_is_noticed(
            blob in proptest::collection::vec(any::<u8>(), 100..2000),
            chunk in 1..50_usize,
            at in any::<proptest::sample::Index>(),
        ) {
            let (chunks, summary) = sent(&blob, chunk);
            let at = at.index(chunks.len());
            let mut lost = chunks.clone();
            lost.remove(at);
            prop_assert!(received(&lost, summary).is_err());
            let mut doubled = chunks.clone();
            doubled.insert(at, chunks[at].clone());
            prop_assert!(received(&doubled, summary).is_err());
            let mut swapped = chunks.clone();
            swapped.swap(at, (at + 1) % chunks.len());
            prop_assert!(received(&swapped, summary).is_err());
        }

        #[test]
        fn a_flipped_bit_is_noticed(
            blob in proptest::collection::vec(any::<u8>(), 1..2000),
            at in any::<proptest::sample::Index>(),
            bit in 0..8_u8,
        ) {
            let (mut chunks, summary) = sent(&blob, 64);
            let at = at.index(blob.len());
            chunks[at / 64].1[at % 64] ^= 1 << bit;
            let noticed = matches!(received(&chunks, summary), Err(Mismatch::Digest { .. }));
            prop_assert!(noticed);
        }
    }

    #[test]
    fn empty_and_oversized_chunks_are_refused_and_not_counted() {
        let mut tally = Tally::default();
        assert_eq!(tally.accept(0, &[]), Err(Mismatch::ChunkSize(0)));
        let large = vec![0; CHUNK_MAX_BYTES + 1];
        assert_eq!(tally.accept(0, &large), Err(Mismatch::ChunkSize(CHUNK_MAX_BYTES + 1)));
        assert_eq!(tally.length_bytes(), 0);
    }

    #[test]
    fn a_digest_of_another_length_is_refused() {
        let error = Tally::default().verify(0, b"abc").unwrap_err();
        assert!(error.to_string().starts_with("the blob's digest is af1349b9"), "{error}");
    }
}
