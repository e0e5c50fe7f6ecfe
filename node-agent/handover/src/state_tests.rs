//! [`path`] against the kernel's own table, for every combination of features and every pair of states.

use super::*;

/// `vfio_from_fsm_table` of drivers/vfio/vfio_main.c (Linux 6.12): for a device that has every feature, the
/// next state on the way from the row's state to the column's. Rows and columns in the kernel's numbering.
#[rustfmt::skip]
const KERNEL_NEXT: [[u32; 8]; 8] = [
    // to: ERROR STOP RUNNING STOP_COPY RESUMING RUNNING_P2P PRE_COPY PRE_COPY_P2P
    [      0,    0,   0,      0,        0,       0,          0,       0], // from ERROR
    [      0,    1,   5,      3,        4,       5,          5,       5], // from STOP
    [      0,    5,   2,      5,        5,       5,          6,       5], // from RUNNING
    [      0,    1,   1,      3,        1,       1,          0,       0], // from STOP_COPY
    [      0,    1,   1,      1,        4,       1,          1,       1], // from RESUMING
    [      0,    1,   2,      1,        1,       5,          2,       7], // from RUNNING_P2P
    [      0,    2,   2,      7,        2,       2,          6,       7], // from PRE_COPY
    [      0,    5,   5,      3,        5,       5,          6,       7], // from PRE_COPY_P2P
];

/// What a driver advertises by these flags of `struct vfio_device_feature_migration`.
fn with_flags(flags: u64) -> Features {
    Features { stop_copy: flags & 1 != 0, p2p: flags & 2 != 0, pre_copy: flags & 4 != 0 }
}

/// `state_flags_table`: the feature flags that each state needs.
const KERNEL_NEEDS: [u64; 8] = [u64::MAX, 1, 1, 1, 1, 1 | 2, 1 | 4, 1 | 2 | 4];

/// `vfio_mig_get_next_state`; `None` for EINVAL.
fn kernel_next(flags: u64, cur: u32, new: u32) -> Option<u32> {
    let has = |state: u32| KERNEL_NEEDS[state as usize] & flags == KERNEL_NEEDS[state as usize];
    if !has(cur) || !has(new) {
        return None;
    }
    let mut next = KERNEL_NEXT[cur as usize][new as usize];
    while next != 0 && !has(next) {
        next = KERNEL_NEXT[next as usize][new as usize];
    }
    (next != 0).then_some(next)
}

/// What a driver's `set_state` does with it: step until the device is there.
fn kernel_path(flags: u64, from: u32, to: u32) -> Option<Vec<u32>> {
    let (mut here, mut steps) = (from, Vec::new());
    // The first look also refuses what the loop would not even enter.
    kernel_next(flags, from, to)?;
    while here != to {
        here = kernel_next(flags, here, to)?;
        steps.push(here);
        assert!(steps.len() < 8, "the kernel's table loops from {from} to {to}");
    }
    Some(steps)
}

/// Flags of the drivers that can be: STOP_COPY is mandatory.
const FLAGS: [u64; 4] = [1, 1 | 2, 1 | 4, 1 | 2 | 4];

#[test]
fn every_path_is_the_kernels_for_all_features_and_all_pairs() {
    let mut pairs = 0;
    for flags in FLAGS {
        for from in MigrationState::ALL {
            for to in MigrationState::ALL {
                let ours = path(with_flags(flags), from, to)
                    .ok()
                    .map(|states| states.into_iter().map(MigrationState::number).collect::<Vec<_>>());
                assert_eq!(
                    ours,
                    kernel_path(flags, from.number(), to.number()),
                    "{from} -> {to} with {flags}"
                );
                pairs += 1;
            }
        }
    }
    assert_eq!(pairs, 4 * 8 * 8);
}

#[test]
fn the_arcs_are_exactly_the_pairs_that_the_kernel_crosses_in_one_step() {
    for flags in FLAGS {
        let ours: std::collections::BTreeSet<_> = arcs(with_flags(flags)).collect();
        let mut kernels = std::collections::BTreeSet::new();
        for from in MigrationState::ALL {
            for to in MigrationState::ALL {
                if kernel_path(flags, from.number(), to.number()).is_some_and(|steps| steps.len() == 1) {
                    kernels.insert((from, to));
                }
            }
        }
        assert_eq!(ours, kernels, "flags {flags}");
    }
}

#[test]
fn a_device_without_stop_copy_can_be_asked_for_nothing() {
    for flags in [0, 2, 4, 6] {
        for from in MigrationState::ALL {
            for to in MigrationState::ALL {
                assert!(path(with_flags(flags), from, to).is_err(), "{from} -> {to} with {flags}");
            }
        }
    }
}

#[test]
fn each_refusal_is_named() {
    let all = Features::ALL;
    assert_eq!(path(all, Error, Running), Err(PathError::FromError));
    assert_eq!(path(all, Running, Error), Err(PathError::ToError));
    assert_eq!(path(Features::STOP_COPY, Running, PreCopy), Err(PathError::Unsupported(PreCopy)));
    assert_eq!(path(Features::STOP_COPY, RunningP2p, Stop), Err(PathError::Unsupported(RunningP2p)));
    for to in [PreCopy, PreCopyP2p] {
        assert_eq!(path(all, StopCopy, to), Err(PathError::NoPath { from: StopCopy, to }));
    }
    assert_eq!(PathError::Unsupported(RunningP2p).to_string(), "the driver has no RUNNING_P2P");
}

#[test]
fn pre_copy_to_stop_runs_the_device_again() {
    assert_eq!(path(Features::ALL, PreCopy, Stop), Ok(vec![Running, RunningP2p, Stop]));
    assert_eq!(path(Features::ALL, PreCopy, StopCopy), Ok(vec![PreCopyP2p, StopCopy]));
}

#[test]
fn a_data_stream_opens_where_the_last_arc_of_the_path_opens_one() {
    // The four arcs that return a descriptor, from the header's text.
    let opening = [(Running, PreCopy), (RunningP2p, PreCopyP2p), (Stop, StopCopy), (Stop, Resuming)];
    for flags in FLAGS {
        for from in MigrationState::ALL {
            for to in MigrationState::ALL {
                let Ok(steps) = path(with_flags(flags), from, to) else { continue };
                let walked: Vec<_> = [from].into_iter().chain(steps).collect();
                let last = walked.windows(2).last().map(|arc| (arc[0], arc[1]));
                let expected = last.is_some_and(|arc| opening.contains(&arc));
                assert_eq!(opens_data(from, to), expected, "{from} -> {to} with {flags}");
            }
        }
    }
}
