use std::io::{self, Read};

use proptest::prelude::*;

use super::*;
use strum::VariantArray;

use crate::machine_state::{MachineState, StatePart};
use crate::ram::RamSource;

const SHAPE: Shape = Shape { ram_bytes: 600 * 4096, devices: 2 };

fn machine() -> MachineState {
    let mut machine = MachineState::default();
    machine.regs.rip = 0x1057;
    machine.clock.clock = 77;
    machine
}

fn ram(pages: &[(usize, u8)]) -> Vec<u8> {
    let mut ram = vec![0; SHAPE.ram_bytes as usize];
    for &(page, byte) in pages {
        ram[page * 4096 + usize::from(byte)] = byte;
    }
    ram
}

/// RAM that knows from its 300th page on which pages are zero, and reports all others as used.
struct Bytes<'a>(&'a [u8]);

impl RamSource for Bytes<'_> {
    fn next_used(&self, gpa: u64) -> io::Result<Option<u64>> {
        let from = gpa as usize;
        let used = |at: &usize| *at < 300 * 4096 || self.0[*at] != 0;
        Ok((from..self.0.len()).find(used).map(|at| at as u64))
    }
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.copy_from_slice(&self.0[gpa as usize..][..bytes.len()]);
        Ok(())
    }
}

fn saved(ram: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut progress = Vec::new();
    write(&mut out, SHAPE, &machine(), &Bytes(ram), |bytes| progress.push(bytes)).unwrap();
    assert!(progress.is_sorted() && progress.last() == Some(&SHAPE.ram_bytes));
    out
}

fn loaded(mut input: impl Read, shape: Shape) -> Result<(Vec<u8>, MachineState), ReadError> {
    let mut ram = vec![0; SHAPE.ram_bytes as usize];
    let machine = read(&mut input, shape, |gpa, pages| {
        ram[gpa as usize..][..pages.len()].copy_from_slice(pages);
        Ok(())
    })?;
    Ok((ram, machine))
}

fn refusal(input: &[u8]) -> String {
    loaded(input, SHAPE).unwrap_err().to_string()
}

const HEADER: usize = 24;

#[test]
fn a_vm_is_loaded_as_it_was_saved() {
    // Single pages, a run across the border of two blocks, the first page and the last.
    let ram = ram(&[(0, 1), (7, 2), (254, 3), (255, 4), (256, 5), (257, 6), (599, 255)]);
    let bytes = saved(&ram);
    let (found, found_machine) = loaded(bytes.as_slice(), SHAPE).unwrap();
    assert!(found == ram);
    for &part in StatePart::VARIANTS {
        assert_eq!(found_machine.part(part), machine().part(part), "{part:?}");
    }
    assert!(bytes.len() < 7 * 4096 + 4 * 16 + 8192, "pages that are zero do not travel: {}", bytes.len());
}

#[test]
fn a_state_cut_off_anywhere_is_refused() {
    let bytes = saved(&ram(&[(3, 3)]));
    for length in (0..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
        let message = refusal(&bytes[..length]);
        assert!(message.starts_with(&format!("the state ends after {length} bytes, within ")), "{message}");
    }
}

#[test]
fn each_wrong_field_is_named_with_its_value_and_what_was_expected() {
    let bytes = saved(&ram(&[(3, 3), (9, 9)]));
    let second = HEADER + 16 + 4096;
    let machine = second + 16 + 4096;
    let cases: &[(usize, &[u8], &str)] = &[
        (0, b"QEVM", r#"the magic is "QEVMLAB\x00", expected "SLKWLAB\x00" (at byte 0)"#),
        (8, &[2], "the version is 2, expected 1 (at byte 8)"),
        (12, &[3], "the number of devices is 3, expected 2 (at byte 12)"),
        (16, &[1], "the size of RAM is 2457601, expected 2457600 (at byte 16)"),
        (HEADER, &[9], "the kind of a record is 9, expected 1 (pages) or 2 (machine) (at byte 24)"),
        (HEADER, &[3], "the kind of a record is 3, expected 1 (pages) or 2 (machine) (at byte 24)"),
        (HEADER + 4, &[0], "a number of pages is 0, expected 1 to 256 (at byte 28)"),
        (HEADER + 4, &[1, 1], "a number of pages is 257, expected 1 to 256 (at byte 28)"),
        (
            HEADER + 8,
            &[1],
            "the address of pages is 0x3001, expected a multiple of 4096, 0x0 to 0x257000, \
             for 1 page(s) (at byte 32)",
        ),
        (
            HEADER + 8,
            &[0, 0x80, 0x25],
            "the address of pages is 0x258000, expected a multiple of 4096, 0x0 to 0x257000, \
             for 1 page(s) (at byte 32)",
        ),
        (
            second + 8,
            &[0, 0x30],
            "the address of pages is 0x3000, expected a multiple of 4096, 0x4000 to 0x257000, \
             for 1 page(s) (at byte 4144)",
        ),
        (machine + 4, &[8], "the number of machine parts is 8, expected 9 (at byte 8252)"),
        (machine + 8, &[2], "the number of a machine part is 2, expected 1 (at byte 8256)"),
        (machine + 12, &[143], "the length of the registers is 143, expected 144 (at byte 8260)"),
        (
            bytes.len() - 4,
            &[4],
            &format!("the kind of the last record is 4, expected 3 (at byte {})", bytes.len() - 4),
        ),
    ];
    for (at, with, expected) in cases {
        let mut wrong = bytes.clone();
        wrong[*at..][..with.len()].copy_from_slice(with);
        assert_eq!(&refusal(&wrong), expected);
    }
}

#[test]
fn an_msr_that_is_not_on_the_list_is_refused() {
    let bytes = saved(&ram(&[]));
    // TSC = 0x10: the first entry of the MSRs, which are before the clock and the end.
    let clock = 8 + machine().part(StatePart::Clock).len() + 4;
    let at = bytes.len() - clock - machine().part(StatePart::Msrs).len();
    let mut wrong = bytes.clone();
    assert_eq!(wrong[at], 0x10);
    wrong[at] = 0x11;
    assert!(refusal(&wrong).starts_with("the list of MSRs is for [\n    0x11,"), "{}", refusal(&wrong));
}

#[test]
fn what_follows_the_end_is_refused() {
    let mut bytes = saved(&ram(&[]));
    let end = bytes.len();
    bytes.push(0);
    assert_eq!(
        refusal(&bytes),
        format!("more data follows the end of the state, which is at byte {end}; expected none")
    );
}

#[test]
fn another_shape_is_refused() {
    let bytes = saved(&ram(&[]));
    let devices = loaded(bytes.as_slice(), Shape { devices: 1, ..SHAPE }).unwrap_err();
    assert_eq!(devices.to_string(), "the number of devices is 2, expected 1 (at byte 12)");
    let ram = loaded(bytes.as_slice(), Shape { ram_bytes: 4096, ..SHAPE }).unwrap_err();
    assert_eq!(ram.to_string(), "the size of RAM is 2457600, expected 4096 (at byte 16)");
}

#[test]
fn a_failed_input_is_not_mistaken_for_its_end() {
    struct Failing;
    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::ConnectionReset.into())
        }
    }
    let bytes = saved(&ram(&[]));
    for length in [0, 30, bytes.len()] {
        let input = bytes[..length].chain(Failing);
        assert!(matches!(loaded(input, SHAPE), Err(ReadError::Receive { at, .. }) if at == length as u64));
    }
}

proptest! {
    #[test]
    fn any_ram_is_restored(pages in prop::collection::vec((0..600_usize, 1..=255_u8), 0..40)) {
        let ram = ram(&pages);
        let (found, _) = loaded(saved(&ram).as_slice(), SHAPE).unwrap();
        prop_assert!(found == ram);
    }

    #[test]
    fn garbage_is_refused_and_never_written_beyond_the_ram(
        header in prop::bool::ANY,
        garbage in prop::collection::vec(0..4_u8, 0..3000),
    ) {
        let mut bytes = if header { saved(&ram(&[]))[..HEADER].to_vec() } else { vec![] };
        bytes.extend(garbage);
        // Writing beyond the RAM would panic in `loaded`.
        prop_assert!(loaded(bytes.as_slice(), SHAPE).is_err());
    }
}
