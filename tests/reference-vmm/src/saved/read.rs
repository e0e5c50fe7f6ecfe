//! Reading a saved VM, strictly.

use std::fmt::Display;
use std::io::{self, Read};

use super::{END, MACHINE, MAGIC, PAGES, RECORD_BYTES, RECORD_PAGES, Shape, VERSION};
use strum::VariantArray;

use crate::machine_state::{MSRS, MachineState, StatePart};
use crate::ram::PAGE_BYTES;

/// Why a saved VM was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The input failed.
    #[error("the state could not be received after {at} bytes")]
    Receive {
        /// Bytes received.
        at: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The input ended too early.
    #[error("the state ends after {at} bytes, within {field}, which needs {missing} more")]
    Truncated {
        /// What was being read.
        field: &'static str,
        /// Bytes received.
        at: u64,
        /// Bytes that the field lacks.
        missing: usize,
    },
    /// A field does not hold what it must.
    #[error("{field} is {found}, expected {expected} (at byte {at})")]
    Field {
        /// Which field.
        field: String,
        /// What it holds.
        found: String,
        /// What it should hold.
        expected: String,
        /// Where it begins.
        at: u64,
    },
    /// Data follow the end.
    #[error("more data follows the end of the state, which is at byte {at}; expected none")]
    Trailing {
        /// Where the state ends.
        at: u64,
    },
    /// The page could not be written to guest RAM.
    #[error("cannot write guest RAM at {gpa:#x}")]
    WriteRam {
        /// Guest physical address.
        gpa: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Reads a VM of this `shape` from `input`, to its end.
///
/// `put(gpa, pages)` is called to write to guest RAM, in ascending order, while the input is read. RAM must
/// be zero before, and holds a part of the VM if this fails.
///
/// # Errors
/// If the input is anything but one whole saved VM of this version and shape, or `put` fails.
pub fn read(
    input: &mut impl Read,
    shape: Shape,
    mut put: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> Result<MachineState, ReadError> {
    let mut input = Input { input, at: 0 };
    input.expect_magic()?;
    input.expect("the version", VERSION)?;
    input.expect("the number of devices", shape.devices)?;
    let found = input.number::<8>("the size of RAM").map(u64::from_le_bytes)?;
    if found != shape.ram_bytes {
        return Err(input.wrong::<8>("the size of RAM", found, shape.ram_bytes));
    }

    let mut block = Vec::new();
    let mut next = 0;
    loop {
        match input.u32("the kind of a record")? {
            PAGES => {
                let gpa = input.pages(&mut block, next, shape.ram_bytes)?;
                put(gpa, &block).map_err(|source| ReadError::WriteRam { gpa, source })?;
                next = gpa + block.len() as u64;
            }
            MACHINE => break,
            found => {
                let expected = format!("{PAGES} (pages) or {MACHINE} (machine)");
                return Err(input.wrong::<4>("the kind of a record", found, expected));
            }
        }
    }
    let machine = input.machine()?;
    input.expect("the kind of the last record", END)?;
    input.expect_nothing()?;
    Ok(machine)
}

struct Input<'a, R> {
    input: &'a mut R,
    /// Bytes read.
    at: u64,
}

impl<R: Read> Input<'_, R> {
    fn fill(&mut self, field: &'static str, mut bytes: &mut [u8]) -> Result<(), ReadError> {
        while !bytes.is_empty() {
            let read = match self.input.read(bytes) {
                Ok(0) => return Err(ReadError::Truncated { field, at: self.at, missing: bytes.len() }),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(ReadError::Receive { at: self.at, source }),
            };
            self.at += read as u64;
            bytes = bytes.get_mut(read..).unwrap_or_default();
        }
        Ok(())
    }

    fn number<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], ReadError> {
        let mut bytes = [0; N];
        self.fill(field, &mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, ReadError> {
        self.number(field).map(u32::from_le_bytes)
    }

    /// The error for a wrong field of N bytes that was just read.
    fn wrong<const N: usize>(
        &self,
        field: impl Into<String>,
        found: impl Display,
        expected: impl Display,
    ) -> ReadError {
        let at = self.at.saturating_sub(N as u64);
        ReadError::Field { field: field.into(), found: found.to_string(), expected: expected.to_string(), at }
    }

    fn expect(&mut self, field: &'static str, expected: u32) -> Result<(), ReadError> {
        let found = self.u32(field)?;
        if found == expected { Ok(()) } else { Err(self.wrong::<4>(field, found, expected)) }
    }

    fn expect_magic(&mut self) -> Result<(), ReadError> {
        let found: [u8; MAGIC.len()] = self.number("the magic")?;
        if found == MAGIC {
            return Ok(());
        }
        let (found, expected) = (found.escape_ascii(), MAGIC.escape_ascii());
        Err(self.wrong::<{ MAGIC.len() }>("the magic", format!("\"{found}\""), format!("\"{expected}\"")))
    }

    fn expect_nothing(&mut self) -> Result<(), ReadError> {
        let at = self.at;
        match self.fill("the end", &mut [0]) {
            Err(ReadError::Truncated { .. }) => Ok(()),
            Ok(()) => Err(ReadError::Trailing { at }),
            Err(error) => Err(error),
        }
    }

    /// Reads the rest of a record of pages into `block`: at or above `next`, within RAM. Returns where they
    /// belong.
    fn pages(&mut self, block: &mut Vec<u8>, next: u64, ram_bytes: u64) -> Result<u64, ReadError> {
        let pages = self.u32("a number of pages")?;
        let bytes = (pages as usize).saturating_mul(PAGE_BYTES);
        if pages == 0 || bytes > RECORD_BYTES {
            return Err(self.wrong::<4>("a number of pages", pages, format!("1 to {RECORD_PAGES}")));
        }
        let gpa = self.number("the address of pages").map(u64::from_le_bytes)?;
        let highest = ram_bytes.saturating_sub(bytes as u64);
        if gpa % PAGE_BYTES as u64 != 0 || !(next..=highest).contains(&gpa) {
            let expected =
                format!("a multiple of {PAGE_BYTES}, {next:#x} to {highest:#x}, for {pages} page(s)");
            return Err(self.wrong::<8>("the address of pages", format!("{gpa:#x}"), expected));
        }
        block.resize(bytes, 0);
        self.fill("pages", block)?;
        Ok(gpa)
    }

    fn machine(&mut self) -> Result<MachineState, ReadError> {
        let mut machine = MachineState::default();
        self.expect("the number of machine parts", StatePart::VARIANTS.len() as u32)?;
        for &part in StatePart::VARIANTS {
            self.expect("the number of a machine part", part as u32)?;
            let found = self.u32("the length of a machine part")?;
            let expected = machine.part(part).len();
            if found as usize != expected {
                return Err(self.wrong::<4>(format!("the length of the {}", part.name()), found, expected));
            }
            let mut bytes = vec![0; expected];
            self.fill(part.name(), &mut bytes)?;
            machine.set_part(part, &bytes);
        }
        let indices = machine.msrs.map(|msr| msr.index);
        if indices != MSRS {
            let found = format!("for {indices:#x?}");
            return Err(self.wrong::<0>("the list of MSRs", found, format!("one for {MSRS:#x?}")));
        }
        Ok(machine)
    }
}
