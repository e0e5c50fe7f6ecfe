//! Lines of bounded length.

use std::io;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use tokio::io::AsyncRead;
use tokio_util::codec::{AnyDelimiterCodec, AnyDelimiterCodecError, Decoder, FramedRead};

/// The longest line that is read. The longest that QEMU 10.0 writes (its own schema) has about 230 KiB.
const LINE_LIMIT_BYTES: usize = 4 << 20;

/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;

/// Why there is no further line.
#[derive(Debug, thiserror::Error)]
pub(super) enum LineError {
    #[error("reading failed: {0}")]
    Read(#[from] io::Error),
    #[error("the connection was closed")]
    Closed,
    #[error("the connection was closed within a line, after {bytes} bytes of it")]
    ClosedWithinLine { bytes: usize },
    #[error("a line has more than {LINE_LIMIT_BYTES} bytes, which is not a QMP message")]
    TooLong,
}

impl From<AnyDelimiterCodecError> for LineError {
    fn from(error: AnyDelimiterCodecError) -> Self {
        match error {
            AnyDelimiterCodecError::MaxChunkLengthExceeded => Self::TooLong,
            AnyDelimiterCodecError::Io(error) => Self::Read(error),
        }
    }
}

/// [`AnyDelimiterCodec`] takes the rest of a closed connection for a line. Here it is an error: an answer may
/// have been cut. (`LinesCodec` would lose a line that is not UTF-8, which the caller is to quote.)
#[derive(Debug)]
struct WholeLines(AnyDelimiterCodec);

impl Decoder for WholeLines {
    type Item = Bytes;
    type Error = LineError;

    fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Bytes>, LineError> {
        self.0.decode(buffer).map_err(|error| {
            // Nothing of the line is of use.
            buffer.clear();
            error.into()
        })
    }

    fn decode_eof(&mut self, buffer: &mut BytesMut) -> Result<Option<Bytes>, LineError> {
        match self.decode(buffer)? {
            None if !buffer.is_empty() => Err(LineError::ClosedWithinLine { bytes: buffer.len() }),
            line => Ok(line),
        }
    }
}

/// Reads line after line.
#[derive(Debug)]
pub(super) struct Lines<R>(FramedRead<R, WholeLines>);

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(super) fn new(from: R) -> Self {
        let codec =
            WholeLines(AnyDelimiterCodec::new_with_max_length(b"\n".to_vec(), Vec::new(), LINE_LIMIT_BYTES));
        Self(FramedRead::with_capacity(from, codec, READ_BYTES))
    }

    /// The next line that is not blank, without its newline.
    ///
    /// # Errors
    /// If the stream has ended or the line is too long. There are no more lines then.
    pub(super) async fn next(&mut self) -> Result<Bytes, LineError> {
        loop {
            let line = self.0.next().await.unwrap_or(Err(LineError::Closed))?;
            if !line.trim_ascii().is_empty() {
                return Ok(line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn blank_lines_are_skipped_and_a_torn_line_is_an_error() {
        let mut lines = Lines::new(&b"\r\n\n{}\r\n  \nab\ncd"[..]);
        assert_eq!(lines.next().await.unwrap(), "{}\r");
        assert_eq!(lines.next().await.unwrap(), "ab");
        assert_eq!(
            lines.next().await.unwrap_err().to_string(),
            "the connection was closed within a line, after 2 bytes of it"
        );
    }

    #[tokio::test]
    async fn a_line_that_is_not_utf_8_reaches_the_caller() {
        let mut lines = Lines::new(&b"\xff\xfe\n"[..]);
        assert_eq!(lines.next().await.unwrap(), &b"\xff\xfe"[..]);
    }

    #[tokio::test]
    async fn a_line_of_the_limit_is_read_and_a_longer_one_is_not() {
        let mut text = vec![b'x'; LINE_LIMIT_BYTES];
        text.push(b'\n');
        let mut lines = Lines::new(&text[..]);
        assert_eq!(lines.next().await.unwrap().len(), LINE_LIMIT_BYTES);

        text.insert(0, b'x');
        let mut lines = Lines::new(&text[..]);
        assert_eq!(
            lines.next().await.unwrap_err().to_string(),
            "a line has more than 4194304 bytes, which is not a QMP message"
        );
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_not_kept() {
        let mut lines = Lines::new(tokio::io::repeat(b'x'));
        lines.next().await.unwrap_err();
        assert!(lines.0.read_buffer().len() <= LINE_LIMIT_BYTES);
        assert!(lines.0.read_buffer().capacity() <= 2 * LINE_LIMIT_BYTES);
    }
}
