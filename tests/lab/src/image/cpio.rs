//! Archives in the format of the kernel's initial file system: cpio "newc"
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::{collections::BTreeSet, io};

const REGULAR: u32 = 0o100_000;
const FOLDER: u32 = 0o040_000;
const LINK: u32 = 0o120_000;

/// An archive being written. Parent folders are added when they are first needed.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    /// Adds a file; `path` is relative to the root, without a slash in front.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.folders_to(path)?;
        self.entry(path, REGULAR | mode, content)
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &str, to: &str) -> io::Result<()> {
        self.folders_to(path)?;
        self.entry(path, LINK | 0o777, to.as_bytes())
    }

    /// Adds a folder.
    pub(crate) fn folder(&mut self, path: &str) -> io::Result<()> {
        self.folders_to(path)?;
        if self.folders.insert(path.to_owned()) {
            self.entry(path, FOLDER | 0o755, b"")?;
        }
        Ok(())
    }

    /// The whole archive.
    pub(crate) fn finish(mut self) -> io::Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, b"")?;
        Ok(self.bytes)
    }

    fn folders_to(&mut self, path: &str) -> io::Result<()> {
        match path.rsplit_once('/') {
            Some((folder, _)) => self.folder(folder),
            None => Ok(()),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
        // inode, mode, uid, gid, links, time, size, device and device of a special file, size of the name,
        // checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, process::Command};

    use super::*;

    #[test]
    fn busybox_reads_what_was_written() {
        let mut archive = Archive::default();
        archive.file("a/b/text", 0o640, b"content").unwrap();
        archive.link("a/link", "b/text").unwrap();
        archive.folder("a/empty").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut cpio = Command::new("busybox")
            .args(["cpio", "-idm"])
            .current_dir(&folder)
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&archive.finish().unwrap()).unwrap();
        assert!(cpio.wait().unwrap().success());
        assert_eq!(std::fs::read(folder.path().join("a/link")).unwrap(), b"content");
        assert!(folder.path().join("a/empty").is_dir());
    }
}
