//! Writing a saved VM.

use std::io::{self, Write};

use super::{END, MACHINE, MAGIC, PAGES, RECORD_BYTES, Shape, VERSION};
use crate::vmm::machine_state::{MachineState, Part};
use crate::vmm::ram::PAGE_BYTES;

/// Writes a VM that stands still to `out`.
///
/// `ram(gpa, bytes)` fills `bytes` from guest RAM. `scanned(bytes)` is told how far the RAM has been written.
///
/// # Errors
/// What `out` or `ram` say.
pub fn write(
    out: &mut impl Write,
    shape: Shape,
    machine: &MachineState,
    ram: impl Fn(u64, &mut [u8]) -> io::Result<()>,
    mut scanned: impl FnMut(u64),
) -> io::Result<()> {
    out.write_all(&MAGIC)?;
    out.write_all(&VERSION.to_le_bytes())?;
    out.write_all(&shape.devices.to_le_bytes())?;
    out.write_all(&shape.ram_bytes.to_le_bytes())?;

    let mut block = vec![0; RECORD_BYTES];
    let mut gpa = 0;
    while gpa < shape.ram_bytes {
        let bytes = (shape.ram_bytes - gpa).min(RECORD_BYTES as u64);
        block.truncate(bytes as usize);
        ram(gpa, &mut block)?;
        pages(out, gpa, &block)?;
        gpa += bytes;
        scanned(gpa);
    }

    out.write_all(&MACHINE.to_le_bytes())?;
    out.write_all(&(Part::ALL.len() as u32).to_le_bytes())?;
    for part in Part::ALL {
        let bytes = machine.part(part);
        out.write_all(&(part as u32).to_le_bytes())?;
        out.write_all(&(bytes.len() as u32).to_le_bytes())?;
        out.write_all(bytes)?;
    }
    out.write_all(&END.to_le_bytes())
}

/// One record for each run of pages of `block`, which begins at `gpa`, that are not zero.
fn pages(out: &mut impl Write, gpa: u64, block: &[u8]) -> io::Result<()> {
    let is_zero = |page: &[u8]| page.iter().all(|&byte| byte == 0);
    let all: Vec<&[u8]> = block.chunks(PAGE_BYTES).collect();
    let mut at = gpa;
    for run in all.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        if run.first().is_some_and(|page| !is_zero(page)) {
            out.write_all(&PAGES.to_le_bytes())?;
            out.write_all(&(run.len() as u32).to_le_bytes())?;
            out.write_all(&at.to_le_bytes())?;
            for page in run {
                out.write_all(page)?;
            }
        }
        at += (run.len() * PAGE_BYTES) as u64;
    }
    Ok(())
}
