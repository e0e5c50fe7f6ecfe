//! A log that a program writes for as long as it lives, kept short: its beginning and its end stay.
//!
//! The program has the file open for appending, and outlives the agent: there is no pipe between them, and
//! nothing can be refused to it. So the agent looks now and then, and takes out the middle.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

/// A log that is longer than this is cut.
pub(crate) const LIMIT_BYTES: u64 = 1 << 20;
/// What stays of its beginning, and of its end, each.
const KEPT_BYTES: u64 = 256 << 10;

/// Takes out the middle of a log that is too long. How much was taken out, if it was.
///
/// `log` is open for reading and appending. What the program writes between the reading of the end and the
/// cut, which is a moment, is lost as well.
///
/// # Errors
/// If the file cannot be read or written. At worst its end is lost then.
pub(crate) fn shorten(log: &mut File) -> io::Result<Option<u64>> {
    let length = log.metadata()?.len();
    if length <= LIMIT_BYTES {
        return Ok(None);
    }
    let mut end = vec![0; usize::try_from(KEPT_BYTES).unwrap_or(usize::MAX)];
    let read = log.read_at(&mut end, length - KEPT_BYTES)?;
    end.truncate(read);
    let cut = length - 2 * KEPT_BYTES;
    log.set_len(KEPT_BYTES)?;
    let mut rest = format!("\n[slackwater: {cut} bytes of this log were cut out here]\n").into_bytes();
    rest.append(&mut end);
    log.write_all(&rest)?;
    Ok(Some(cut))
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    #[test]
    fn a_log_that_grows_without_end_keeps_its_beginning_and_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("twin.log");
        let open = || OpenOptions::new().create(true).read(true).append(true).open(&path).unwrap();
        let (mut twin, mut agent) = (open(), open());
        twin.write_all(b"first words\n").unwrap();
        for round in 0..40 {
            twin.write_all(&vec![b'a' + (round % 26) as u8; 100_000]).unwrap();
            twin.write_all(format!("\nround {round}\n").as_bytes()).unwrap();
            shorten(&mut agent).unwrap();
            assert!(path.metadata().unwrap().len() <= LIMIT_BYTES, "{round}");
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("first words\na") && text.ends_with("\nround 39\n"));
        assert!(text.contains("bytes of this log were cut out here]\n"));
        assert!(!text.contains('\0'));
    }

    #[test]
    fn a_log_that_a_program_has_made_huge_with_a_hole_is_cut_and_a_short_one_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("twin.log");
        let mut log = OpenOptions::new().create(true).read(true).append(true).open(&path).unwrap();
        log.write_all(b"short").unwrap();
        assert_eq!(shorten(&mut log).unwrap(), None);
        assert_eq!(std::fs::read(&path).unwrap(), b"short");
        log.set_len(1 << 40).unwrap();
        assert_eq!(shorten(&mut log).unwrap(), Some((1 << 40) - 2 * KEPT_BYTES));
        assert!(path.metadata().unwrap().len() <= LIMIT_BYTES);
    }
}
