//! The fake keeps to the rules of a device, and [`Device::set_state`] keeps its contract with it.

use super::*;
use crate::vfio::device::Change;
use crate::vfio::error::{Found, SetStateError};
use MigrationState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
use slackwater_handover::state::PathError;

fn read_all(device: &mut FakeDevice) -> Vec<u8> {
    let mut all = Vec::new();
    while let DataRead::Data(data) = device.read_data(MAX_READ_BYTES).unwrap() {
        all.extend_from_slice(&data);
    }
    all
}

#[test]
fn a_change_is_asked_once_and_read_back() {
    let log = CallLog::new();
    let mut vf0 = FakeDevice::new("vf0").log(&log);
    assert_eq!(vf0.set_state(StopCopy), Ok(Change { from: Running, to: StopCopy }));
    let calls: Vec<_> = log.entries().into_iter().map(|entry| (entry.call, entry.state)).collect();
    assert_eq!(
        calls,
        [
            (Call::ReadState, Running),
            (Call::Asked(StopCopy), Running),
            (Call::Reached(StopCopy), StopCopy),
            (Call::ReadState, StopCopy)
        ]
    );
}

#[test]
fn a_refusal_says_what_was_requested_which_state_the_device_is_in_and_why() {
    let mut vf0 = FakeDevice::new("vf0").in_state(StopCopy).refuse(Stop, Errno::INVAL);
    let error = vf0.set_state(Stop).unwrap_err();
    assert_eq!(
        error.to_string(),
        "vf0: the driver refused STOP_COPY -> STOP: Invalid argument (EINVAL); the device is in STOP_COPY"
    );
    assert_eq!((error.device(), error.asked(), error.found()), ("vf0", Stop, Some(StopCopy)));
}

#[test]
fn a_refusal_may_leave_the_device_along_the_path_or_in_error() {
    for left_in in [RunningP2p, Stop, Error] {
        let mut vf0 = FakeDevice::new("vf0").refuse_leaving_in(StopCopy, Errno::IO, left_in);
        assert_eq!(vf0.set_state(StopCopy).unwrap_err().found(), Some(left_in));
    }
}

#[test]
fn a_state_that_cannot_be_read_back_is_reported_as_unknown() {
    let mut vf0 = FakeDevice::new("vf0").refuse_state(Errno::NOTCONN, usize::MAX);
    let error = vf0.set_state(Stop).unwrap_err();
    assert!(matches!(error, SetStateError::StateUnknown { .. }), "{error}");
    assert_eq!(error.found(), None);
    assert!(error.to_string().ends_with("(ENOTCONN)"), "{error}");
}

#[test]
fn a_state_that_the_features_do_not_allow_is_never_requested() {
    let log = CallLog::new();
    let mut vf0 = FakeDevice::new("vf0").with_features(Features::STOP_COPY).log(&log);
    let reason_of = |vf0: &mut FakeDevice, to| match vf0.set_state(to) {
        Err(SetStateError::Impossible { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(reason_of(&mut vf0, PreCopy), PathError::Unsupported(PreCopy));
    assert_eq!(reason_of(&mut vf0, RunningP2p), PathError::Unsupported(RunningP2p));
    assert_eq!(reason_of(&mut vf0, Error), PathError::ToError);
    assert_eq!(log.changes(), [""; 0]);
}

#[test]
fn a_driver_that_accepts_and_stays_in_its_state_is_detected() {
    let error = FakeDevice::new("vf0").pretend(Stop).set_state(Stop).unwrap_err();
    let expected = Found::State(Running);
    assert!(matches!(&error, SetStateError::Elsewhere { found, .. } if *found == expected), "{error}");
}

#[test]
fn a_saving_session_drains_in_pre_copy_and_ends_in_stop_copy() {
    let mut vf0 = FakeDevice::new("vf0").pre_copy("early").blob("late").piece_bytes(2);
    vf0.set_state(PreCopy).unwrap();
    assert_eq!(vf0.precopy_info().unwrap(), PrecopyInfo { initial_bytes: 5, dirty_bytes: 0 });
    assert_eq!(read_all(&mut vf0), b"early");
    assert_eq!(vf0.precopy_info().unwrap().initial_bytes, 0);
    assert_eq!(vf0.read_data(8).unwrap(), DataRead::Drained);
    vf0.set_state(PreCopyP2p).unwrap();
    assert_eq!(vf0.read_data(8).unwrap(), DataRead::Drained);
    vf0.set_state(StopCopy).unwrap();
    assert_eq!(read_all(&mut vf0), b"late");
    assert_eq!(vf0.read_data(8).unwrap(), DataRead::End);
    vf0.set_state(Stop).unwrap();
    assert!(matches!(vf0.read_data(8), Err(DeviceError::NoDataStream { .. })));
}

#[test]
fn a_load_ends_up_in_the_device_only_when_it_leaves_resuming() {
    let mut vf1 = FakeDevice::new("vf1");
    let watch = vf1.watch();
    vf1.set_state(Resuming).unwrap();
    vf1.write_data(b"ab").unwrap();
    vf1.write_data(b"c").unwrap();
    assert_eq!((watch.written().as_ref(), watch.loaded()), (b"abc".as_slice(), None));
    vf1.set_state(Stop).unwrap();
    assert_eq!(watch.loaded().unwrap(), "abc");
}

#[test]
fn after_a_failed_write_only_a_reset_leads_out_of_resuming() {
    let log = CallLog::new();
    let mut vf1 = FakeDevice::new("vf1").write_fails_after(3, Errno::FAULT).log(&log);
    vf1.set_state(Resuming).unwrap();
    vf1.write_data(b"ab").unwrap();
    let error = vf1.write_data(b"cd").unwrap_err();
    assert_eq!(
        error.to_string(),
        "vf1: loading its state: Bad address (EFAULT) (after 1 of 2 bytes of this piece)"
    );
    let error = vf1.set_state(Stop).unwrap_err();
    assert!(matches!(error, SetStateError::LoadFailed { .. }), "{error}");
    assert_eq!(error.found(), Some(Resuming));
    assert_eq!(log.first("vf1", Call::Asked(Stop)), None, "the driver must not be asked");
    vf1.reset().unwrap();
    vf1.set_state(Stop).unwrap();
}

#[test]
fn each_fault_hits_where_it_was_scripted() {
    let mut vf0 = FakeDevice::new("vf0").refuse_nth(2, Stop, Errno::BUSY);
    vf0.set_state(Stop).unwrap();
    vf0.set_state(Running).unwrap();
    vf0.set_state(Stop).unwrap_err();
    vf0.set_state(Stop).unwrap();

    let mut short = FakeDevice::new("vf0").blob("12345").ends_after(3);
    short.set_state(StopCopy).unwrap();
    assert_eq!(read_all(&mut short), b"123");

    let mut failing = FakeDevice::new("vf0").blob("12345").read_fails_after(3, Errno::IO);
    failing.set_state(StopCopy).unwrap();
    assert_eq!(failing.read_data(64).unwrap(), DataRead::Data(Bytes::from_static(b"123")));
    let error = failing.read_data(64).unwrap_err();
    assert_eq!(error.to_string(), "vf0: reading its state: Input/output error (EIO)");

    let mut picky = FakeDevice::new("vf1").expects_bytes(3).in_state(Resuming);
    picky.write_data(b"12").unwrap();
    assert_eq!(picky.set_state(RunningP2p).unwrap_err().found(), Some(Resuming));
    picky.write_data(b"34").unwrap_err();
    picky.reset().unwrap();

    let mut refusing = FakeDevice::new("vf1").refuse_load(Errno::INVAL).in_state(Resuming);
    assert_eq!(refusing.set_state(Stop).unwrap_err().found(), Some(Resuming));
}

#[test]
fn entries_of_devices_that_share_a_log_are_distinct_and_ordered() {
    let log = CallLog::new();
    let mut vf0 = FakeDevice::new("vf0").log(&log);
    let mut vf1 = FakeDevice::new("vf1").log(&log).refuse(Stop, Errno::IO);
    vf0.set_state(RunningP2p).unwrap();
    vf1.set_state(Stop).unwrap_err();
    vf0.reset().unwrap();
    assert_eq!(
        log.changes(),
        [
            "vf0 asked RUNNING_P2P",
            "vf0 reached RUNNING_P2P",
            "vf1 asked STOP",
            "vf1 refused STOP in RUNNING",
            "vf0 reset"
        ]
    );
}
