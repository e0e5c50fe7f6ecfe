use std::sync::Mutex;
use std::time::Instant;

use super::*;

/// A machine that notes what is done with it.
#[derive(Clone, Default)]
pub(crate) struct Fake(Arc<Mutex<Notes>>);

#[derive(Default)]
pub(crate) struct Notes {
    steps: u64,
    settled: u64,
    settling_takes: Duration,
    /// A step waits for a signal, as KVM_RUN does while the guest has no exit.
    sticks: bool,
    idles: bool,
    crashes: bool,
}

impl Machine for Fake {
    fn step(&mut self) -> Result<Step, MachineError> {
        let (sticks, idles) = {
            let mut notes = self.0.lock().unwrap();
            notes.steps += 1;
            if notes.crashes {
                return Err(MachineError::UnexpectedExit { exit: "Shutdown".into() });
            }
            (notes.sticks, notes.idles)
        };
        if sticks {
            rustix::event::pause();
        }
        Ok(if idles { Step::Idle } else { Step::Next })
    }
    fn settle(&mut self) -> Result<(), MachineError> {
        let takes = self.0.lock().unwrap().settling_takes;
        std::thread::sleep(takes);
        self.0.lock().unwrap().settled += 1;
        Ok(())
    }
    fn state(&mut self) -> Result<MachineState, MachineError> {
        let mut state = MachineState::default();
        state.regs.rip = self.0.lock().unwrap().steps;
        Ok(state)
    }
    fn restore(&mut self, state: &MachineState) -> Result<(), MachineError> {
        self.0.lock().unwrap().steps = state.regs.rip;
        Ok(())
    }
}

impl Fake {
    pub(crate) fn steps(&self) -> u64 {
        self.0.lock().unwrap().steps
    }
    pub(crate) async fn steps_beyond(&self, steps: u64) {
        while self.steps() <= steps {
            tokio::task::yield_now().await;
        }
    }
}

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn a_vcpu_runs_only_between_resume_and_pause() {
    let fake = Fake::default();
    let vcpu = Vcpu::spawn(fake.clone(), HOUR).unwrap();
    assert_eq!(vcpu.state().await.unwrap().regs.rip, 0, "nothing runs before the first resume");
    vcpu.resume().await.unwrap();
    fake.steps_beyond(100).await;
    vcpu.pause().await.unwrap();
    let paused_at = fake.steps();
    assert_eq!(vcpu.state().await.unwrap().regs.rip, paused_at);
    assert_eq!(vcpu.state().await.unwrap().regs.rip, paused_at);
    vcpu.resume().await.unwrap();
    fake.steps_beyond(paused_at).await;
}

#[tokio::test]
async fn a_pause_settles_the_machine_once_and_a_second_pause_does_not_touch_it() {
    let fake = Fake::default();
    let vcpu = Vcpu::spawn(fake.clone(), HOUR).unwrap();
    vcpu.pause().await.unwrap();
    assert_eq!(fake.0.lock().unwrap().settled, 0);
    vcpu.resume().await.unwrap();
    vcpu.pause().await.unwrap();
    vcpu.pause().await.unwrap();
    assert_eq!(fake.0.lock().unwrap().settled, 1);
}

#[tokio::test]
async fn a_pause_is_answered_only_when_the_machine_has_settled() {
    let fake = Fake::default();
    fake.0.lock().unwrap().settling_takes = Duration::from_millis(100);
    let vcpu = Vcpu::spawn(fake.clone(), HOUR).unwrap();
    vcpu.resume().await.unwrap();
    vcpu.pause().await.unwrap();
    assert_eq!(fake.0.lock().unwrap().settled, 1);
}

#[tokio::test]
async fn a_vcpu_that_does_not_leave_the_guest_is_kicked_out_of_it() {
    let fake = Fake::default();
    fake.0.lock().unwrap().sticks = true;
    let vcpu = Vcpu::spawn(fake.clone(), HOUR).unwrap();
    vcpu.resume().await.unwrap();
    fake.steps_beyond(0).await;
    timeout(Duration::from_secs(5), vcpu.pause()).await.expect("the vCPU was not kicked").unwrap();
}

#[tokio::test]
async fn a_pause_does_not_wait_for_the_end_of_the_guests_pace() {
    let fake = Fake::default();
    fake.0.lock().unwrap().idles = true;
    let vcpu = Vcpu::spawn(fake.clone(), HOUR).unwrap();
    vcpu.resume().await.unwrap();
    fake.steps_beyond(0).await;
    let since = Instant::now();
    vcpu.pause().await.unwrap();
    assert!(since.elapsed() < Duration::from_secs(5));
    assert_eq!(fake.steps(), 1, "an idle guest does not run");
}

#[tokio::test]
async fn a_crash_ends_the_thread_and_is_reported() {
    let fake = Fake::default();
    fake.0.lock().unwrap().crashes = true;
    let vcpu = Vcpu::spawn(fake, HOUR).unwrap();
    vcpu.resume().await.unwrap();
    let crash = vcpu.ended().await.unwrap_err();
    assert_eq!(
        crate::error_text::with_sources(&crash),
        "the machine failed: the vCPU left the guest unexpectedly: Shutdown"
    );
    assert!(matches!(vcpu.pause().await, Err(VcpuError::Ended)));
    vcpu.stop().await;
}

#[tokio::test]
async fn a_stopped_vcpu_has_dropped_its_machine() {
    let fake = Fake::default();
    let vcpu = Vcpu::spawn(fake.clone(), HOUR).unwrap();
    vcpu.resume().await.unwrap();
    vcpu.stop().await;
    assert_eq!(Arc::strong_count(&fake.0), 1);
    vcpu.ended().await.unwrap();
}

#[tokio::test]
async fn a_state_travels_to_another_machine() {
    let (from, to) = (Fake::default(), Fake::default());
    let source = Vcpu::spawn(from.clone(), HOUR).unwrap();
    source.resume().await.unwrap();
    from.steps_beyond(10).await;
    source.pause().await.unwrap();
    let target = Vcpu::spawn(to.clone(), HOUR).unwrap();
    target.restore(Arc::new(source.state().await.unwrap())).await.unwrap();
    assert_eq!(to.steps(), from.steps());
}
