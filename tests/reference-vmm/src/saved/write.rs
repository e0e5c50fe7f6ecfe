//! Writing a saved VM.

use std::io::{self, Write};

use super::{END, MACHINE, MAGIC, PAGES, RECORD_BYTES, Shape, VERSION};
use strum::VariantArray;

use crate::machine_state::{MachineState, StatePart};
use crate::ram::{PAGE_BYTES, RamSource};

/// Writes a paused VM to `out`. `scanned(bytes)` is called with how much of the RAM has been scanned.
///
/// # Errors
/// The error of `out` or `ram`.
pub fn write(
    out: &mut impl Write,
    shape: Shape,
    machine: &MachineState,
    ram: &impl RamSource,
    mut scanned: impl FnMut(u64),
) -> io::Result<()> {
    out.write_all(&MAGIC)?;
    out.write_all(&VERSION.to_le_bytes())?;
    out.write_all(&shape.devices.to_le_bytes())?;
    out.write_all(&shape.ram_bytes.to_le_bytes())?;

    let mut block = Vec::new();
    let mut gpa = 0;
    while let Some(used) = ram.next_used(gpa)?.filter(|used| *used < shape.ram_bytes) {
        gpa = used - used % PAGE_BYTES as u64;
        let bytes = (shape.ram_bytes - gpa).min(RECORD_BYTES as u64);
        block.resize(bytes as usize, 0);
        ram.read(gpa, &mut block)?;
        pages(out, gpa, &block)?;
        gpa += bytes;
        scanned(gpa);
    }
    scanned(shape.ram_bytes);

    out.write_all(&MACHINE.to_le_bytes())?;
    out.write_all(&(StatePart::VARIANTS.len() as u32).to_le_bytes())?;
    for &part in StatePart::VARIANTS {
        let bytes = machine.part(part);
        out.write_all(&(part as u32).to_le_bytes())?;
        out.write_all(&(bytes.len() as u32).to_le_bytes())?;
        out.write_all(bytes)?;
    }
    out.write_all(&END.to_le_bytes())
}

/// One record for each run of pages of `block`, which begins at `gpa`, that are not zero.
fn pages(out: &mut impl Write, gpa: u64, block: &[u8]) -> io::Result<()> {
    // One memory comparison: byte by byte, an emulated CPU would spend most of a blackout here.
    let is_zero = |page: &[u8]| page == [0; PAGE_BYTES];
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
