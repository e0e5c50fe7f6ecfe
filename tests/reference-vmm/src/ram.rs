//! Guest RAM: a memfd, mapped into this process for KVM and the devices.
//!
//! The VMM itself reads and writes it through the descriptor, so that no Rust reference to memory that a
//! guest changes exists.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use memmap2::MmapRaw;
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use rustix::io::Errno;

/// The name of the memfd: `/proc/PID/fd` shows it as `/memfd:guest-ram (deleted)`.
pub const MEMFD_NAME: &str = "guest-ram";

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;

/// Guest RAM, as a save reads it.
pub trait RamSource {
    /// The first address from `gpa` on that may hold a byte other than zero. `None`: all is zero up to the
    /// end.
    ///
    /// # Errors
    /// The kernel's error.
    fn next_used(&self, gpa: u64) -> io::Result<Option<u64>>;

    /// Fills `bytes` from guest physical address `gpa` on.
    ///
    /// # Errors
    /// UnexpectedEof if that is beyond the end of RAM.
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> io::Result<()>;
}

/// Guest RAM from guest physical address 0, zero at first.
#[derive(Debug)]
pub struct GuestRam {
    file: File,
    mapping: MmapRaw,
    bytes: u64,
}

impl GuestRam {
    /// RAM of `bytes` bytes, a multiple of [`PAGE_BYTES`].
    ///
    /// # Errors
    /// If the memory cannot be allocated.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let file = File::from(memfd_create(MEMFD_NAME, MemfdFlags::CLOEXEC)?);
        file.set_len(bytes)?;
        let mapping = MmapRaw::map_raw(&file)?;
        Ok(Self { file, mapping, bytes })
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where it is mapped in this process; [`Self::bytes`] long, for as long as `self` lives.
    pub fn address(&self) -> *mut u8 {
        self.mapping.as_mut_ptr()
    }

    /// Fills `bytes` from guest physical address `gpa` on.
    ///
    /// # Errors
    /// UnexpectedEof if that is beyond the end of RAM.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, gpa)
    }

    /// Writes `bytes` from guest physical address `gpa` on.
    ///
    /// # Errors
    /// InvalidInput if that is beyond the end of RAM; nothing has been written then.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        // A memfd would grow.
        if gpa.checked_add(bytes.len() as u64).is_none_or(|end| end > self.bytes) {
            let text = format!("{} bytes at {gpa:#x}: guest RAM ends at {:#x}", bytes.len(), self.bytes);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        self.file.write_all_at(bytes, gpa)
    }

    /// Sets all of it to zero.
    ///
    /// # Errors
    /// If reading or writing fails.
    pub fn clear(&self) -> io::Result<()> {
        // Do not punch a hole: a page that a device has pinned would then differ from the guest's.
        let zero = [0; PAGE_BYTES];
        let mut gpa = 0;
        while let Some(used) = self.next_used(gpa)? {
            gpa = used - used % PAGE_BYTES as u64;
            self.write(gpa, &zero)?;
            gpa += PAGE_BYTES as u64;
        }
        Ok(())
    }
}

impl RamSource for GuestRam {
    /// The kernel knows which pages were never written: a guest that uses little of its RAM is saved quickly.
    fn next_used(&self, gpa: u64) -> io::Result<Option<u64>> {
        match seek(&self.file, SeekFrom::Data(gpa)) {
            Ok(used) => Ok(Some(used)),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn read(&self, gpa: u64, bytes: &mut [u8]) -> io::Result<()> {
        Self::read(self, gpa, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_beyond_the_end_is_refused_and_does_not_grow_the_ram() {
        let ram = GuestRam::new(8192).unwrap();
        ram.write(8191, &[1]).unwrap();
        assert_eq!(ram.write(8191, &[1, 2]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(ram.write(u64::MAX, &[1, 2]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(ram.read(8192, &mut [0]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn pages_that_were_never_written_are_known() {
        let ram = GuestRam::new(16 << 20).unwrap();
        assert_eq!(ram.next_used(0).unwrap(), None);
        ram.write(5 << 20, &[0]).unwrap();
        assert!((4 << 20..=5 << 20).contains(&ram.next_used(0).unwrap().unwrap()));
        assert_eq!(ram.next_used(15 << 20).unwrap(), None);
        assert_eq!(ram.next_used(16 << 20).unwrap(), None);
    }

    #[test]
    fn cleared_ram_is_zero_everywhere() {
        let ram = GuestRam::new(8192).unwrap();
        ram.write(4095, &[1, 2]).unwrap();
        ram.clear().unwrap();
        let mut bytes = [9; 8192];
        ram.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 8192]);
    }
}
