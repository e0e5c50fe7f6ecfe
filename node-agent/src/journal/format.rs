//! The format of a record in its file. Pure.
//!
//! ```text
//!  0        8          12         16        20
//!  SLKWJRNL ┊ version  ┊ length   ┊ CRC-32  ┊ content ┊ anything, up to the allocated size
//! ```
//!
//! Numbers are little endian. The CRC-32 (IEEE 802.3) covers the four bytes of the length and the content. A
//! finished journal ends soon after its content, with room for the mark that its end has been acknowledged.
//!
//! The version says how the content is to be read; the header is the same in all versions. An agent reads
//! every version up to [`NEWEST_VERSION`]. A change of the content of a journal raises that version, and
//! needs a reader for the one before (`attempt/entry/`).

const MAGIC: [u8; 8] = *b"SLKWJRNL";

/// The version of a migration's journal that is written, and the newest that is read.
pub(super) const NEWEST_VERSION: u32 = 2;

/// The version of the file with the operator's epoch. It has not changed: an agent that is downgraded must be
/// able to read it.
pub(super) const EPOCH_VERSION: u32 = 1;

/// Bytes before the content.
pub(super) const HEADER_BYTES: usize = 20;

/// After the content of a finished journal: the operator has acknowledged how it ended. Until then, zeroes.
pub(super) const ACKNOWLEDGED: &[u8] = b"ACKNOWLEDGED";

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// They do not begin with the magic, or have version 0, which never existed.
    NotAJournal,
    /// They have a version that this agent does not know.
    NewerVersion(u32),
    /// Bytes are missing.
    Truncated { needs_bytes: u64 },
    /// The content is not what was written.
    ChecksumMismatch,
}

/// A record, as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Decoded<'a> {
    /// How the content is to be read.
    pub(super) version: u32,
    /// What was written.
    pub(super) content: &'a [u8],
}

/// The content with its header before it, without zeroes. `None` if the header cannot state its length.
pub(super) fn encode(version: u32, content: &[u8]) -> Option<Vec<u8>> {
    let length = u32::try_from(content.len()).ok()?.to_le_bytes();
    let mut bytes = Vec::with_capacity(HEADER_BYTES + content.len());
    bytes.extend(MAGIC);
    bytes.extend(version.to_le_bytes());
    bytes.extend(length);
    bytes.extend(checksum(length, content).to_le_bytes());
    bytes.extend(content);
    Some(bytes)
}

/// The record, if these bytes are complete and undamaged. Bytes after the content are ignored.
pub(super) fn decode(bytes: &[u8]) -> Result<Decoded<'_>, Refusal> {
    // Bytes that begin like the magic and end early are truncated; others are not a journal.
    if bytes.iter().zip(MAGIC).any(|(is, should_be)| *is != should_be) {
        return Err(Refusal::NotAJournal);
    }
    let too_short = Refusal::Truncated { needs_bytes: HEADER_BYTES as u64 };
    let (_, rest) = bytes.split_first_chunk::<8>().ok_or(too_short)?;
    let (version, rest) = rest.split_first_chunk::<4>().ok_or(too_short)?;
    // Checked first: the rest may have another meaning in a newer format.
    let version = u32::from_le_bytes(*version);
    match version {
        0 => return Err(Refusal::NotAJournal),
        1..=NEWEST_VERSION => {}
        newer => return Err(Refusal::NewerVersion(newer)),
    }
    let (length, rest) = rest.split_first_chunk::<4>().ok_or(too_short)?;
    let (stated, rest) = rest.split_first_chunk::<4>().ok_or(too_short)?;
    let announced = u32::from_le_bytes(*length);
    let content = usize::try_from(announced)
        .ok()
        .and_then(|announced| rest.get(..announced))
        .ok_or(Refusal::Truncated { needs_bytes: HEADER_BYTES as u64 + u64::from(announced) })?;
    if checksum(*length, content) != u32::from_le_bytes(*stated) {
        return Err(Refusal::ChecksumMismatch);
    }
    Ok(Decoded { version, content })
}

fn checksum(length: [u8; 4], content: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&length);
    hasher.update(content);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_record_has_the_documented_format() {
        let bytes = encode(1, b"{}").unwrap();
        assert_eq!(&bytes[..16], b"SLKWJRNL\x01\0\0\0\x02\0\0\0");
        // CRC-32 of 02 00 00 00 7b 7d, by Python's zlib.
        assert_eq!(u32::from_le_bytes(bytes[16..20].try_into().unwrap()), 0x1e75_ad14);
        assert_eq!(&bytes[20..], b"{}");
    }

    #[test]
    fn every_version_up_to_the_newest_is_read_and_names_itself() {
        for version in 1..=NEWEST_VERSION {
            let bytes = encode(version, b"{}").unwrap();
            assert_eq!(decode(&bytes), Ok(Decoded { version, content: b"{}" }));
        }
    }

    #[test]
    fn a_newer_version_is_distinguished_from_damage_whatever_follows_it() {
        let newer = NEWEST_VERSION + 1;
        let mut bytes = encode(newer, b"{}").unwrap();
        bytes[17] ^= 1;
        assert_eq!(decode(&bytes), Err(Refusal::NewerVersion(newer)));
        bytes.truncate(12);
        assert_eq!(decode(&bytes), Err(Refusal::NewerVersion(newer)));
    }

    #[test]
    fn every_truncation_is_distinguished_from_damage() {
        let bytes = encode(NEWEST_VERSION, b"{\"record\":\"LOADED\"}").unwrap();
        for kept in 0..bytes.len() {
            assert!(matches!(decode(&bytes[..kept]), Err(Refusal::Truncated { .. })), "{kept} bytes kept");
        }
    }

    #[test]
    fn bytes_without_the_magic_are_not_a_journal() {
        for foreign in [&b"{\"record\":\"LOADED\"}"[..], &[0; 64], b"x", b"SLKWJRNL\0\0\0\0________"] {
            assert_eq!(decode(foreign), Err(Refusal::NotAJournal));
        }
    }

    proptest! {
        #[test]
        fn encoded_content_is_decoded_whatever_follows(
            version in 1..=NEWEST_VERSION, content: Vec<u8>, behind: Vec<u8>,
        ) {
            let mut bytes = encode(version, &content).unwrap();
            bytes.extend(behind);
            prop_assert_eq!(decode(&bytes), Ok(Decoded { version, content: &content }));
        }

        #[test]
        fn a_flipped_bit_is_never_read_as_content(
            version in 1..=NEWEST_VERSION, content: Vec<u8>, at: prop::sample::Index, bit in 0..8_u32,
        ) {
            let mut bytes = encode(version, &content).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(decode(&bytes).is_err());
        }
    }
}
