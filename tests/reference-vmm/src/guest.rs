//! The guest: its program, the layout of its data, and its report.
//!
//! The program runs in real mode, with interrupts off and all segments at 0, in an endless loop:
//! ```text
//! write the low byte of `count` to every device's register
//! for ever:
//!     old = low byte of count;  count += 1;  new = low byte of count
//!     the stamp in RAM page (count mod 128) must be count - 128: else ram_errors += 1;  stamp it with count
//!     for every device:
//!         its register must be old: else the device's errors += 1
//!         write new, read it back into the device's record; it must be new: else the device's errors += 1
//!     write to the pace port: the VMM may idle here
//! ```
//! So a lost, duplicated or swapped register, a lost page, or a count that does not match the registers shows
//! as an error within one round, wherever in the round the vCPU was stopped.
//!
//! The register is the scratch register of a 16550 UART, which keeps any byte (and does nothing else).

use serde::{Deserialize, Serialize};

/// Guest physical address of the first instruction.
pub const CODE: u64 = 0x1000;
/// Guest physical address of the guest's data: [`MAGIC`], then the fields below.
pub const DATA: u64 = 0x2000;
/// The bytes at [`DATA`] once the guest has been set up.
pub const MAGIC: [u8; 8] = *b"SLKWGST1";
/// u16: how many devices the guest has.
const DEVICES: u64 = 0x2008;
/// u64: rounds begun.
const COUNT: u64 = 0x2010;
/// u32: pages of RAM with an unexpected stamp.
const RAM_ERRORS: u64 = 0x2018;
/// One record of [`RECORD_BYTES`] for each device: u8 the register as read back last, 3 bytes nothing, u32
/// errors.
const RECORDS: u64 = 0x2020;
const RECORD_BYTES: usize = 8;
/// The pages that the guest stamps in turn: 128 of 4 KiB.
const STAMPS: u64 = 0x1_0000;
const STAMP_PAGES: u32 = 128;
/// Bytes of RAM that the guest needs.
pub const MIN_RAM_BYTES: u64 = STAMPS + STAMP_PAGES as u64 * 4096;

/// The most devices that a guest can have.
pub const MAX_DEVICES: usize = 16;
/// The guest's port of the first device's first register; the next device is [`PORT_STRIDE`] further.
pub const PORT_BASE: u16 = 0x1000;
/// Ports from one device to the next.
pub const PORT_STRIDE: u16 = 0x10;
/// The register that the guest uses, counted from the device's first: the scratch register of a 16550.
pub const SCRATCH_REGISTER: u16 = 7;
/// The guest writes here when a round has ended.
pub const PACE_PORT: u16 = 0x80;

/// The program. Offsets are from [`CODE`]; a relative jump counts from the instruction after it.
#[rustfmt::skip] // The comments are in columns.
const PROGRAM: &[&[u8]] = &[
    // start: every device's register := low byte of count
    &[0xa0, 0x10, 0x20],                   // 00 mov   al, [COUNT]
    &[0x8b, 0x0e, 0x08, 0x20],             // 03 mov   cx, [DEVICES]
    &[0xba, 0x07, 0x10],                   // 07 mov   dx, PORT_BASE + SCRATCH_REGISTER
    // first:
    &[0xee],                               // 0a out   dx, al
    &[0x83, 0xc2, 0x10],                   // 0b add   dx, PORT_STRIDE
    &[0xe2, 0xfa],                         // 0e loop  first (0a), cx times
    // round:
    &[0x8a, 0x1e, 0x10, 0x20],             // 10 mov   bl, [COUNT]           old
    &[0x66, 0x83, 0x06, 0x10, 0x20, 0x01], // 14 add   dword [COUNT], 1
    &[0x66, 0x83, 0x16, 0x14, 0x20, 0x00], // 1a adc   dword [COUNT + 4], 0
    &[0x8a, 0x3e, 0x10, 0x20],             // 20 mov   bh, [COUNT]           new
    // this round's page: es := (STAMPS + count mod 128 pages) / 16
    &[0xa1, 0x10, 0x20],                   // 24 mov   ax, [COUNT]
    &[0x83, 0xe0, 0x7f],                   // 27 and   ax, 127
    &[0xc1, 0xe0, 0x08],                   // 2a shl   ax, 8                 a page is 256 paragraphs
    &[0x05, 0x00, 0x10],                   // 2d add   ax, STAMPS / 16
    &[0x8e, 0xc0],                         // 30 mov   es, ax
    &[0x66, 0xa1, 0x10, 0x20],             // 32 mov   eax, [COUNT]
    &[0x67, 0x66, 0x8d, 0x50, 0x80],       // 36 lea   edx, [eax - 128]
    &[0x26, 0x66, 0x39, 0x16, 0x00, 0x00], // 3b cmp   es:[0], edx
    &[0x74, 0x05],                         // 41 je    stamp (48)
    &[0x66, 0xff, 0x06, 0x18, 0x20],       // 43 inc   dword [RAM_ERRORS]
    // stamp:
    &[0x26, 0x66, 0xa3, 0x00, 0x00],       // 48 mov   es:[0], eax
    &[0x8b, 0x0e, 0x08, 0x20],             // 4d mov   cx, [DEVICES]
    &[0xba, 0x07, 0x10],                   // 51 mov   dx, PORT_BASE + SCRATCH_REGISTER
    &[0xbe, 0x20, 0x20],                   // 54 mov   si, RECORDS
    // device:
    &[0xec],                               // 57 in    al, dx
    &[0x38, 0xd8],                         // 58 cmp   al, bl                still old?
    &[0x74, 0x04],                         // 5a je    write (60)
    &[0x66, 0xff, 0x44, 0x04],             // 5c inc   dword [si + 4]
    // write:
    &[0x88, 0xf8],                         // 60 mov   al, bh
    &[0xee],                               // 62 out   dx, al
    &[0xec],                               // 63 in    al, dx
    &[0x88, 0x04],                         // 64 mov   [si], al
    &[0x38, 0xf8],                         // 66 cmp   al, bh                new now?
    &[0x74, 0x04],                         // 68 je    next (6e)
    &[0x66, 0xff, 0x44, 0x04],             // 6a inc   dword [si + 4]
    // next:
    &[0x83, 0xc2, 0x10],                   // 6e add   dx, PORT_STRIDE
    &[0x83, 0xc6, 0x08],                   // 71 add   si, RECORD_BYTES
    &[0xe2, 0xe1],                         // 74 loop  device (57), cx times
    &[0xe6, 0x80],                         // 76 out   PACE_PORT, al
    &[0xeb, 0x96],                         // 78 jmp   round (10)
];

/// The RAM content of a fresh guest with `devices` devices: pieces, each with its guest physical address.
pub fn image(devices: u16) -> Vec<(u64, Vec<u8>)> {
    let mut data = MAGIC.to_vec();
    data.extend_from_slice(&devices.to_le_bytes());
    let stamps = (0..STAMP_PAGES).map(|page| {
        // The round before the first that uses the page. Round 0 is never run, so page 0 comes first in round
        // 128.
        let stamp = if page == 0 { 0 } else { page.wrapping_sub(STAMP_PAGES) };
        (STAMPS + u64::from(page) * 4096, stamp.to_le_bytes().to_vec())
    });
    [(CODE, PROGRAM.concat()), (DATA, data)].into_iter().chain(stamps).collect()
}

/// The guest's report, as it keeps it in its RAM.
///
/// Read while the vCPU runs, `count` may be ahead of a device's `register`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Rounds that the guest has begun.
    pub count: u64,
    /// All errors that the guest found: `ram_errors` and all devices' errors.
    pub errors: u64,
    /// RAM pages that did not hold what the guest had written.
    pub ram_errors: u32,
    /// In the order of the VMM's devices.
    pub devices: Vec<DeviceReport>,
}

/// The guest's report about one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// The register as it was read back last: the low byte of a count.
    pub register: u8,
    /// How often the register did not hold what the guest had written.
    pub errors: u32,
}

/// Why there is no report in a guest's data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// The data could not be read.
    #[error("cannot read the guest's data")]
    Read(#[source] std::io::Error),
    /// There is no guest of this VMM in that RAM, or it has not been loaded yet.
    #[error("no guest here: {found:02x?} at {DATA:#x}, expected {MAGIC:02x?}")]
    NoGuest {
        /// The eight bytes at [`DATA`].
        found: [u8; 8],
    },
    /// More devices than a guest can have.
    #[error("the guest reports {found} devices; {MAX_DEVICES} is the most")]
    Devices {
        /// The number in its data.
        found: u16,
    },
}

impl Report {
    /// Reads the guest's report. `read(gpa, bytes)` fills `bytes` from guest RAM.
    ///
    /// # Errors
    /// If reading fails, or there is no guest of this VMM.
    pub fn read(read: impl Fn(u64, &mut [u8]) -> std::io::Result<()>) -> Result<Self, ReportError> {
        fn field<const N: usize>(
            read: &impl Fn(u64, &mut [u8]) -> std::io::Result<()>,
            gpa: u64,
        ) -> Result<[u8; N], ReportError> {
            let mut bytes = [0; N];
            read(gpa, &mut bytes).map_err(ReportError::Read)?;
            Ok(bytes)
        }
        let found = field(&read, DATA)?;
        if found != MAGIC {
            return Err(ReportError::NoGuest { found });
        }
        let count = u64::from_le_bytes(field(&read, COUNT)?);
        let ram_errors = u32::from_le_bytes(field(&read, RAM_ERRORS)?);
        let found = u16::from_le_bytes(field(&read, DEVICES)?);
        if usize::from(found) > MAX_DEVICES {
            return Err(ReportError::Devices { found });
        }
        let devices = (0..u64::from(found))
            .map(|device| {
                let record: [u8; RECORD_BYTES] = field(&read, RECORDS + device * RECORD_BYTES as u64)?;
                let [register, _, _, _, errors @ ..] = record;
                Ok(DeviceReport { register, errors: u32::from_le_bytes(errors) })
            })
            .collect::<Result<Vec<_>, ReportError>>()?;
        let errors =
            u64::from(ram_errors) + devices.iter().map(|device| u64::from(device.errors)).sum::<u64>();
        Ok(Self { count, errors, ram_errors, devices })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram(devices: u16) -> Vec<u8> {
        let mut ram = vec![0; MIN_RAM_BYTES as usize];
        for (gpa, bytes) in image(devices) {
            ram[gpa as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        ram
    }

    fn report(ram: &[u8]) -> Result<Report, ReportError> {
        Report::read(|gpa, bytes| {
            bytes.copy_from_slice(&ram[gpa as usize..][..bytes.len()]);
            Ok(())
        })
    }

    #[test]
    fn the_program_fits_before_its_data_and_its_pieces_do_not_overlap() {
        assert_eq!(PROGRAM.concat().len(), 0x7a, "the offsets in the comments");
        let mut end = 0;
        for (gpa, bytes) in image(MAX_DEVICES as u16) {
            assert!(gpa >= end, "{gpa:#x} overlaps what ends at {end:#x}");
            end = gpa + bytes.len() as u64;
        }
        assert!(end <= MIN_RAM_BYTES);
        assert!(RECORDS + (MAX_DEVICES * RECORD_BYTES) as u64 <= STAMPS);
    }

    #[test]
    fn a_fresh_guest_has_counted_nothing() {
        let report = report(&ram(2)).unwrap();
        let device = DeviceReport { register: 0, errors: 0 };
        assert_eq!(report, Report { count: 0, errors: 0, ram_errors: 0, devices: vec![device; 2] });
    }

    #[test]
    fn errors_of_ram_and_of_every_device_add_up() {
        let mut ram = ram(2);
        ram[COUNT as usize..][..8].copy_from_slice(&0x1_0000_0002_u64.to_le_bytes());
        ram[RAM_ERRORS as usize] = 5;
        ram[RECORDS as usize..][..16].copy_from_slice(&[2, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 0, 1, 0, 0]);
        let report = report(&ram).unwrap();
        assert_eq!(report.count, 0x1_0000_0002);
        assert_eq!(report.errors, 5 + 1 + 256);
        assert_eq!(report.devices[1], DeviceReport { register: 7, errors: 256 });
    }

    #[test]
    fn ram_without_a_guest_is_refused() {
        assert!(matches!(report(&vec![0; MIN_RAM_BYTES as usize]), Err(ReportError::NoGuest { .. })));
        let mut many = ram(2);
        many[DEVICES as usize] = 17;
        assert!(matches!(report(&many), Err(ReportError::Devices { found: 17 })));
    }
}
