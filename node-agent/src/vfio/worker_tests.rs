//! The handle with fakes that hang, panic and are abandoned.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use rustix::io::Errno;

use super::*;
use crate::vfio::fake::{Call, CallLog, FakeDevice, FakeWatch, Gate};
use MigrationState::{PreCopy, Resuming, Running, RunningP2p, Stop, StopCopy};

fn serve(device: FakeDevice) -> (DeviceHandle, FakeWatch) {
    let watch = device.watch();
    (DeviceHandle::serve(Box::new(device)).unwrap(), watch)
}

#[tokio::test]
async fn a_change_comes_with_its_time_on_the_monotonic_clock() {
    let (vf0, _) = serve(FakeDevice::new("vf0"));
    let before = monotonic_ns();
    let reached = vf0.set_state(Stop).await.unwrap();
    let after = monotonic_ns();
    assert_eq!((reached.from, reached.to), (Running, Stop));
    assert!((before..=after).contains(&reached.at_ns), "{before} {reached:?} {after}");
    assert!(reached.took <= Duration::from_nanos(after - before));
}

#[tokio::test]
async fn a_refusal_reaches_the_caller_unchanged() {
    let (vf0, _) = serve(FakeDevice::new("vf0").refuse(Stop, Errno::BUSY));
    let error = vf0.set_state(Stop).await.unwrap_err();
    assert_eq!(error.found(), Some(Running));
    assert_eq!(vf0.state().await, Ok(Running));
}

#[tokio::test]
async fn devices_change_state_in_parallel() {
    let (gate_0, gate_1) = (Gate::new(), Gate::new());
    let (vf0, _) = serve(FakeDevice::new("vf0").hang_at(Stop, &gate_0));
    let (vf1, _) = serve(FakeDevice::new("vf1").hang_at(Stop, &gate_1));
    let both_started = async {
        gate_0.reached().await;
        gate_1.reached().await;
        gate_0.open();
        gate_1.open();
    };
    let (first, second, ()) = tokio::join!(vf0.set_state(Stop), vf1.set_state(Stop), both_started);
    assert_eq!((first.unwrap().to, second.unwrap().to), (Stop, Stop));
}

#[tokio::test]
async fn a_device_that_hangs_blocks_neither_the_runtime_nor_the_drop_of_its_handles() {
    let gate = Gate::new();
    let log = CallLog::new();
    let (vf0, watch) = serve(FakeDevice::new("vf0").hang_at(Stop, &gate).log(&log));
    let late = tokio::time::timeout(Duration::from_millis(20), vf0.set_state(Stop)).await;
    assert!(late.is_err(), "it hangs, and the deadline is kept on the only thread of this runtime");
    drop(vf0);
    assert_eq!(watch.state(), Running);
    gate.open();
    watch.dropped().await;
    assert_eq!(watch.state(), Stop, "a change that has begun is finished");
}

#[tokio::test]
async fn a_call_that_was_given_up_before_its_turn_is_not_carried_out() {
    let gate = Gate::new();
    let log = CallLog::new();
    let (vf0, _) = serve(FakeDevice::new("vf0").hang_at(RunningP2p, &gate).log(&log));
    let other = vf0.clone();
    let stuck = tokio::spawn(async move { other.set_state(RunningP2p).await });
    gate.reached().await;
    let late = tokio::time::timeout(Duration::from_millis(20), vf0.set_state(Stop)).await;
    assert!(late.is_err());
    gate.open();
    stuck.await.unwrap().unwrap();
    assert_eq!(vf0.state().await, Ok(RunningP2p));
    assert_eq!(log.first("vf0", Call::Asked(Stop)), None);
}

#[tokio::test]
async fn data_read_for_a_caller_that_has_gone_comes_with_the_next_read() {
    let gate = Gate::new();
    let (vf0, watch) = serve(FakeDevice::new("vf0").blob("12345").hang_in_read(&gate));
    vf0.set_state(StopCopy).await.unwrap();
    {
        let mut abandoned = pin!(vf0.read_data(4));
        let mut context = Context::from_waker(Waker::noop());
        assert!(matches!(abandoned.as_mut().poll(&mut context), Poll::Pending));
        gate.reached().await;
    }
    gate.open();
    assert_eq!(vf0.read_data(3).await, Ok(DataRead::Data(Bytes::from_static(b"123"))));
    assert_eq!(watch.read_bytes(), 4, "the first read has really taken four bytes from the device");
    assert_eq!(vf0.read_data(9).await, Ok(DataRead::Data(Bytes::from_static(b"4"))));
    assert_eq!(vf0.read_data(9).await, Ok(DataRead::Data(Bytes::from_static(b"5"))));
    assert_eq!(vf0.read_data(9).await, Ok(DataRead::End));
}

#[tokio::test]
async fn data_that_has_arrived_but_was_not_polled_comes_with_the_next_read() {
    let gate = Gate::new();
    let (vf0, _) = serve(FakeDevice::new("vf0").blob("12345").hang_in_read(&gate));
    vf0.set_state(StopCopy).await.unwrap();
    {
        let mut abandoned = pin!(vf0.read_data(2));
        let mut context = Context::from_waker(Waker::noop());
        assert!(matches!(abandoned.as_mut().poll(&mut context), Poll::Pending));
        gate.open();
        // A call that is answered after the read shows that the read's answer lies ready.
        vf0.estimate_bytes().await.unwrap();
    }
    assert_eq!(vf0.read_data(9).await, Ok(DataRead::Data(Bytes::from_static(b"12"))));
    assert_eq!(vf0.read_data(9).await, Ok(DataRead::Data(Bytes::from_static(b"345"))));
}

#[tokio::test]
async fn data_kept_from_one_stream_does_not_turn_up_in_the_next() {
    let gate = Gate::new();
    let (vf0, watch) = serve(FakeDevice::new("vf0").pre_copy("12").blob("345").hang_in_read(&gate));
    vf0.set_state(PreCopy).await.unwrap();
    {
        let mut abandoned = pin!(vf0.read_data(2));
        let mut context = Context::from_waker(Waker::noop());
        assert!(matches!(abandoned.as_mut().poll(&mut context), Poll::Pending));
        gate.reached().await;
    }
    gate.open();
    vf0.set_state(Running).await.unwrap();
    assert_eq!(watch.read_bytes(), 2);
    vf0.set_state(StopCopy).await.unwrap();
    assert_eq!(vf0.read_data(1).await, Ok(DataRead::Data(Bytes::from_static(b"1"))));
    assert_eq!(watch.read_bytes(), 1, "it comes from the new stream");
}

#[tokio::test]
async fn a_device_that_panics_is_an_error_for_its_callers_only() {
    let (vf0, watch) = serve(FakeDevice::new("vf0").panic_at(Stop));
    let error = vf0.set_state(Stop).await.unwrap_err();
    assert_eq!(error, SetStateError::WorkerEnded { device: "vf0".into(), asked: Stop });
    watch.dropped().await;
    assert_eq!(vf0.state().await, Err(DeviceError::WorkerEnded { device: "vf0".into() }));
    vf0.release().await;
}

#[tokio::test]
async fn the_last_handle_drops_the_device_and_changes_nothing_in_it() {
    let log = CallLog::new();
    let (vf0, watch) = serve(FakeDevice::new("vf0").in_state(PreCopy).log(&log));
    let other = vf0.clone();
    drop(vf0);
    assert_eq!(other.state().await, Ok(PreCopy));
    drop(other);
    watch.dropped().await;
    assert_eq!(watch.state(), PreCopy);
    assert_eq!(log.changes(), [""; 0]);
}

#[tokio::test]
async fn when_release_returns_the_device_is_gone_for_every_handle() {
    let log = CallLog::new();
    let (vf0, watch) = serve(FakeDevice::new("vf0").in_state(PreCopy).log(&log));
    let other = vf0.clone();
    vf0.release().await;
    assert!(log.first("vf0", Call::Dropped).is_some());
    assert_eq!(watch.state(), PreCopy);
    assert_eq!(other.reset().await, Err(DeviceError::WorkerEnded { device: "vf0".into() }));
}

#[tokio::test]
async fn a_whole_move_from_device_to_device_copies_no_buffer_on_the_way() {
    let blob = Bytes::from_static(b"the state of a device");
    let (source, _) = serve(FakeDevice::new("vf0").blob(blob.clone()));
    let (target, watch) = serve(FakeDevice::new("vf1"));
    source.set_state(StopCopy).await.unwrap();
    target.set_state(Resuming).await.unwrap();
    while let DataRead::Data(data) = source.read_data(8).await.unwrap() {
        assert!(data.len() <= 8);
        assert!(blob.as_ptr_range().contains(&data.as_ptr()), "it is the device's own buffer");
        target.write_data(data).await.unwrap();
    }
    source.close_data().await.unwrap();
    target.set_state(Stop).await.unwrap();
    assert_eq!(watch.loaded().unwrap(), blob);
    assert_eq!(source.estimate_bytes().await, Ok(Some(21)));
}

#[tokio::test]
async fn a_device_that_has_been_closed_does_not_hang_in_being_closed() {
    for is_released in [true, false] {
        let vf0 = DeviceHandle::serve_impatiently(Box::new(FakeDevice::new("vf0")), Duration::ZERO).unwrap();
        let mut watch = vf0.watch();
        if is_released {
            vf0.release().await;
        } else {
            drop(vf0);
        }
        while watch.in_flight.changed().await.is_ok() {}
        assert!(watch.in_flight.borrow().is_some(), "its last call was to close it");
        assert!(watch.hangs_now().is_none());
    }
}
