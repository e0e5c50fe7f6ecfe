//! Lines of bounded length.

use std::mem;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

/// The longest line that is read. The longest that QEMU 10.0 writes (its own schema) has about 230 KiB.
pub(super) const LINE_LIMIT_BYTES: usize = 4 << 20;

/// Reads line after line.
#[derive(Debug)]
pub(super) struct Lines<R> {
    from: BufReader<R>,
    line: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(super) fn new(from: R) -> Self {
        Self { from: BufReader::with_capacity(64 << 10, from), line: Vec::new() }
    }

    /// The next line that is not blank, without its end.
    ///
    /// # Errors
    /// Why there is none, in words: the stream has ended, or the line has no end.
    pub(super) async fn next(&mut self) -> Result<Vec<u8>, String> {
        loop {
            let piece = self.from.fill_buf().await.map_err(|error| format!("reading failed: {error}"))?;
            if piece.is_empty() {
                return Err(match self.line.len() {
                    0 => "the connection was closed".to_owned(),
                    bytes => format!("the connection was closed within a line, after {bytes} bytes of it"),
                });
            }
            let end = piece.iter().position(|byte| *byte == b'\n');
            let text = end.and_then(|end| piece.get(..end)).unwrap_or(piece);
            if self.line.len().saturating_add(text.len()) > LINE_LIMIT_BYTES {
                return Err(format!(
                    "a line has more than {LINE_LIMIT_BYTES} bytes, which is no QMP message"
                ));
            }
            self.line.extend_from_slice(text);
            let taken = end.map_or(piece.len(), |end| end.saturating_add(1));
            self.from.consume(taken);
            if end.is_some() {
                let line = mem::take(&mut self.line);
                if !line.trim_ascii().is_empty() {
                    return Ok(line);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn blank_lines_are_skipped_and_a_torn_line_is_told() {
        let mut lines = Lines::new(&b"\r\n\n{}\r\n  \nab\ncd"[..]);
        assert_eq!(lines.next().await.unwrap(), b"{}\r");
        assert_eq!(lines.next().await.unwrap(), b"ab");
        assert_eq!(
            lines.next().await.unwrap_err(),
            "the connection was closed within a line, after 2 bytes of it"
        );
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
            lines.next().await.unwrap_err(),
            "a line has more than 4194304 bytes, which is no QMP message"
        );
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_not_kept() {
        let mut lines = Lines::new(tokio::io::repeat(b'x'));
        lines.next().await.unwrap_err();
        assert!(lines.line.len() <= LINE_LIMIT_BYTES);
        assert!(lines.line.capacity() <= 2 * LINE_LIMIT_BYTES);
    }
}
