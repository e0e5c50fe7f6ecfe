//! The format of a saved VM, version 1. All integers are little-endian.
//!
//! ```text
//! header    magic "SLKWLAB\0", u32 version, u32 devices, u64 bytes of RAM
//! pages *   u32 1, u32 pages (1 to 256), u64 guest physical address, then the pages of 4096 bytes;
//!           in ascending order, pages that are zero left out
//! machine   u32 2, u32 parts, then for each part, in the order of `StatePart`:
//!           u32 number, u32 bytes, the bytes
//! end       u32 3
//! ```
//! [`write`] and [`read`] need memory for one record, for any size of the RAM. [`read`] accepts exactly this
//! format: an error names the wrong field, its value and the expected value. A change of the layout needs a
//! new version. Other versions are not read, since both ends of the lab are from one build.

mod read;
mod write;

pub use read::{ReadError, read};
pub use write::write;

use super::ram::PAGE_BYTES;

/// What every saved VM begins with.
pub const MAGIC: [u8; 8] = *b"SLKWLAB\0";
/// The version that is written and read here.
pub const VERSION: u32 = 1;

const PAGES: u32 = 1;
const MACHINE: u32 = 2;
const END: u32 = 3;

/// The most pages in a record.
const RECORD_PAGES: usize = 256;
/// The most data in a record of pages, in bytes.
const RECORD_BYTES: usize = RECORD_PAGES * PAGE_BYTES;

/// What must be the same at both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of guest RAM, a multiple of 4096.
    pub ram_bytes: u64,
    /// How many devices the VM has.
    pub devices: u32,
}

#[cfg(test)]
mod tests;
