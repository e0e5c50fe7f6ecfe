//! Reading and writing a data descriptor.

use std::os::fd::BorrowedFd;

use bytes::Bytes;
use rustix::buffer::spare_capacity;
use rustix::io::{Errno, read, retry_on_intr, write};

/// Reads once: at most `max_bytes` into a buffer of that size, which is then handed on. Empty at an end of
/// the stream.
pub(super) fn read_piece(stream: BorrowedFd<'_>, max_bytes: usize) -> Result<Bytes, Errno> {
    let mut buffer = Vec::with_capacity(max_bytes);
    let bytes = retry_on_intr(|| read(stream, spare_capacity(&mut buffer)))?;
    // A small piece must not hold a large buffer while it waits to be sent.
    if bytes < max_bytes / 2 {
        buffer.shrink_to_fit();
    }
    Ok(buffer.into())
}

/// Writes everything, in as many steps as the driver needs. The error has the bytes that it had taken
/// before.
pub(super) fn write_all(stream: BorrowedFd<'_>, data: &[u8]) -> Result<(), (usize, Errno)> {
    let mut taken = 0;
    while let Some(rest) = data.get(taken..).filter(|rest| !rest.is_empty()) {
        match retry_on_intr(|| write(stream, rest)) {
            // It would be 0 for ever.
            Ok(0) => return Err((taken, Errno::IO)),
            Ok(bytes) => taken += bytes,
            Err(errno) => return Err((taken, errno)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write, pipe};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_piece_is_what_one_read_gives_and_empty_at_the_end() {
        let (reader, mut writer) = pipe().unwrap();
        writer.write_all(b"12345").unwrap();
        assert_eq!(read_piece(reader.as_fd(), 3).unwrap(), "123");
        assert_eq!(read_piece(reader.as_fd(), 1 << 20).unwrap(), "45");
        drop(writer);
        assert_eq!(read_piece(reader.as_fd(), 3).unwrap(), "");
    }

    #[test]
    fn all_is_written_even_if_it_is_taken_in_steps() {
        let (mut reader, writer) = pipe().unwrap();
        // More than a pipe holds, so that no single write takes it all.
        let data: Vec<u8> = (0..300_000_u32).map(|number| number.to_le_bytes()[0]).collect();
        let sent = data.clone();
        let sender = std::thread::spawn(move || write_all(writer.as_fd(), &sent));
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        assert_eq!(sender.join().unwrap(), Ok(()));
        assert!(got == data);
    }

    #[test]
    fn an_error_has_the_bytes_that_were_taken() {
        let (reader, writer) = pipe().unwrap();
        assert_eq!(write_all(reader.as_fd(), b"1"), Err((0, Errno::BADF)));
        assert_eq!(read_piece(writer.as_fd(), 1), Err(Errno::BADF));
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let (taken, errno) = write_all(writer.as_fd(), &vec![0; 1 << 21]).unwrap_err();
        assert_eq!(errno, Errno::AGAIN);
        assert!(taken > 0 && taken < 1 << 21, "{taken}");
    }
}
