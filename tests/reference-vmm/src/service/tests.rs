//! The contract over its real transport, with a machine that only counts its steps.

use std::time::Duration;

use futures::StreamExt;
use slackwater_proto::channel::connect_unix;
use slackwater_proto::limits::{vmm_client, vmm_server};
use slackwater_proto::server::{ServeError, bind_unix, serve_unix};
use slackwater_proto::tonic::service::Routes;
use slackwater_proto::tonic::transport::Channel;
use slackwater_proto::tonic::{Code, Streaming};
use slackwater_proto::vmm::vmm_client::VmmClient;
use slackwater_proto::vmm::{RunState, StartSaveResponse};
use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::vcpu::tests::Fake;

const RAM_BYTES: u64 = 16 << 20;

struct Fixture {
    client: VmmClient<Channel>,
    machine: Fake,
    ram: Arc<GuestRam>,
    quit: CancellationToken,
    server: tokio::task::JoinHandle<Result<(), ServeError>>,
    _folder: TempDir,
}

impl Fixture {
    async fn new(state: State) -> Self {
        let machine = Fake::default();
        let ram = Arc::new(GuestRam::new(RAM_BYTES).unwrap());
        let vcpu = Vcpu::spawn(machine.clone(), Duration::from_secs(3600)).unwrap();
        if state == State::Running {
            // No byte that is zero, so that all of it travels.
            let bytes: Vec<u8> = (0..RAM_BYTES).map(|at| (at % 251) as u8 + 1).collect();
            ram.write(0, &bytes).unwrap();
            vcpu.resume().await.unwrap();
        }
        let device =
            |name: &str| Device { name: name.into(), descriptor: 9, guest_address: "pio 0x1000".into() };
        let vm = Vm { vcpu, ram: ram.clone(), devices: vec![device("a"), device("b")] };
        let quit = CancellationToken::new();
        let routes = Routes::new(vmm_server(ReferenceVmm::new(vm, state, quit.clone())));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmm.sock");
        let listener = bind_unix(&path).unwrap();
        let serving = serve_unix(listener, routes, quit.clone().cancelled_owned(), Duration::from_secs(60));
        let server = tokio::spawn(serving);
        let client = vmm_client(connect_unix(&path).await.unwrap());
        Self { client, machine, ram, quit, server, _folder: folder }
    }

    async fn run_state(&mut self) -> RunState {
        self.client.describe(DescribeRequest {}).await.unwrap().into_inner().run_state()
    }

    async fn start_save(&mut self) -> Streaming<StartSaveResponse> {
        self.client.start_save(StartSaveRequest { live: false }).await.unwrap().into_inner()
    }

    async fn call(&mut self, call: Call) -> Result<(), Status> {
        let client = &mut self.client;
        match call {
            Call::StartSave => client.start_save(StartSaveRequest { live: false }).await.map(|_| ()),
            Call::SaveProgress => client.save_progress(SaveProgressRequest {}).await.map(|_| ()),
            Call::Pause => client.pause(PauseRequest {}).await.map(|_| ()),
            Call::FinishSave => client.finish_save(FinishSaveRequest {}).await.map(|_| ()),
            Call::AbortSave => client.abort_save(AbortSaveRequest {}).await.map(|_| ()),
            Call::StartLoad => client.start_load(pieces(&[])).await.map(|_| ()),
            Call::FinishLoad => client.finish_load(FinishLoadRequest {}).await.map(|_| ()),
            Call::Resume => client.resume(ResumeRequest {}).await.map(|_| ()),
        }
    }

    fn ram_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; RAM_BYTES as usize];
        self.ram.read(0, &mut bytes).unwrap();
        bytes
    }

    fn finish_save(&self) -> tokio::task::JoinHandle<Result<(), Status>> {
        let mut client = self.client.clone();
        tokio::spawn(async move { client.finish_save(FinishSaveRequest {}).await.map(|_| ()) })
    }

    /// Pauses the VM and saves it.
    async fn saved(&mut self) -> Vec<u8> {
        let stream = self.start_save().await;
        self.call(Call::Pause).await.unwrap();
        let finished = self.finish_save();
        let bytes = read_all(stream).await.unwrap();
        finished.await.unwrap().unwrap();
        bytes
    }
}

async fn read_all(mut stream: Streaming<StartSaveResponse>) -> Result<Vec<u8>, Status> {
    let mut bytes = vec![];
    while let Some(piece) = stream.message().await? {
        assert!((1..=1 << 20).contains(&piece.data.len()));
        bytes.extend_from_slice(&piece.data);
    }
    Ok(bytes)
}

/// The bytes as a stream, cut at odd places.
fn pieces(bytes: &[u8]) -> impl futures::Stream<Item = StartLoadRequest> + Send + 'static + use<> {
    let pieces: Vec<_> =
        bytes.chunks(77_777).map(|piece| StartLoadRequest { data: piece.to_vec().into() }).collect();
    futures::stream::iter(pieces)
}

fn assert_refused(result: Result<(), Status>, code: Code, message: &str) {
    let status = result.unwrap_err();
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().starts_with(message), "{}", status.message());
}

#[tokio::test]
async fn a_vm_moves() {
    let (mut source, mut target) = (Fixture::new(State::Running).await, Fixture::new(State::Incoming).await);
    assert_eq!((source.run_state().await, target.run_state().await), (RunState::Running, RunState::Incoming));
    source.machine.steps_beyond(1000).await;
    let bytes = source.saved().await;
    assert_eq!(source.run_state().await, RunState::Paused);
    let steps = source.machine.steps();

    target.client.start_load(pieces(&bytes)).await.unwrap();
    assert_eq!(target.run_state().await, RunState::Incoming);
    target.call(Call::FinishLoad).await.unwrap();
    assert_eq!(target.run_state().await, RunState::Paused);
    assert!(target.ram_bytes() == source.ram_bytes());
    assert_eq!(target.machine.steps(), steps, "the vCPU is where it was paused");

    target.call(Call::Resume).await.unwrap();
    target.machine.steps_beyond(steps).await;
    assert_eq!(target.run_state().await, RunState::Running);
    assert_eq!(source.machine.steps(), steps);
}

#[tokio::test]
async fn describe_shows_devices_ram_and_that_there_is_no_dirty_tracking() {
    let mut vmm = Fixture::new(State::Running).await;
    let found = vmm.client.describe(DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!(found.devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(found.ram, [RamRange { gpa: 0, iova: 0, bytes: RAM_BYTES }]);
    assert_eq!(found.dirty_tracking(), DirtyTracking::None);
}

#[tokio::test]
async fn nothing_is_sent_before_finish_save_which_answers_when_all_has_been_read() {
    let mut vmm = Fixture::new(State::Running).await;
    let mut stream = vmm.start_save().await;
    let progress = vmm.client.save_progress(SaveProgressRequest {}).await.unwrap().into_inner();
    assert_eq!(progress, SaveProgressResponse { remaining_bytes: RAM_BYTES, dirty_rate_bytes_per_second: 0 });
    vmm.call(Call::Pause).await.unwrap();
    let brief = Duration::from_millis(200);
    assert!(timeout(brief, stream.next()).await.is_err(), "nothing before FinishSave");

    let mut finished = vmm.finish_save();
    // More than all buffers hold: an answer now would be wrong.
    assert!(timeout(brief, &mut finished).await.is_err(), "answered before the stream was read");
    let waiting = vmm.client.save_progress(SaveProgressRequest {}).await.unwrap().into_inner();
    assert!(
        (1..RAM_BYTES).contains(&waiting.remaining_bytes),
        "{waiting:?}: a slow reader holds the writer up"
    );
    read_all(stream).await.unwrap();
    finished.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_live_save_is_refused_with_a_reason() {
    let mut vmm = Fixture::new(State::Running).await;
    let refused = vmm.client.start_save(StartSaveRequest { live: true }).await.map(|_| ());
    assert_refused(
        refused,
        Code::FailedPrecondition,
        "live is true, expected false: this VMM has no dirty tracking",
    );
    vmm.call(Call::StartSave).await.unwrap();
}

#[tokio::test]
async fn calls_out_of_order_are_refused_with_a_reason_and_change_nothing() {
    let mut running = Fixture::new(State::Running).await;
    for call in [Call::FinishSave, Call::SaveProgress, Call::StartLoad, Call::FinishLoad] {
        let message =
            format!("{call:?} is out of order: the VM is running and no save has begun; expected: ");
        assert_refused(running.call(call).await, Code::FailedPrecondition, &message);
    }
    let stream = running.start_save().await;
    for call in [Call::StartSave, Call::FinishSave, Call::Resume] {
        let message = format!("{call:?} is out of order: a save has begun and the VM is running; expected: ");
        assert_refused(running.call(call).await, Code::FailedPrecondition, &message);
    }
    assert_eq!(running.run_state().await, RunState::Running);
    drop(stream);

    let mut incoming = Fixture::new(State::Incoming).await;
    for call in [Call::StartSave, Call::Pause, Call::AbortSave, Call::FinishLoad, Call::Resume] {
        let message = format!(
            "{call:?} is out of order: the VMM was started to take over a VM, of which nothing has been received"
        );
        assert_refused(incoming.call(call).await, Code::FailedPrecondition, &message);
    }
    assert_eq!(incoming.machine.steps(), 0);
}

#[tokio::test]
async fn an_aborted_save_leaves_the_vm_paused_and_a_resume_rolls_it_back() {
    let mut vmm = Fixture::new(State::Running).await;
    let stream = vmm.start_save().await;
    vmm.call(Call::Pause).await.unwrap();
    let finished = vmm.finish_save();
    vmm.call(Call::AbortSave).await.unwrap();
    assert_eq!(
        read_all(stream).await.unwrap_err().code(),
        Code::Aborted,
        "an end that does not look like a complete save"
    );
    let status = finished.await.unwrap().unwrap_err();
    assert!(matches!(status.code(), Code::Aborted | Code::FailedPrecondition), "{status}");
    assert_eq!(vmm.run_state().await, RunState::Paused);

    let steps = vmm.machine.steps();
    vmm.call(Call::Resume).await.unwrap();
    vmm.machine.steps_beyond(steps).await;
    // A second attempt.
    assert!(vmm.saved().await.len() as u64 > RAM_BYTES);
}

#[tokio::test]
async fn an_abort_before_the_pause_leaves_the_vm_running() {
    let mut vmm = Fixture::new(State::Running).await;
    let stream = vmm.start_save().await;
    vmm.call(Call::AbortSave).await.unwrap();
    assert_eq!(read_all(stream).await.unwrap_err().message(), "the save was aborted");
    assert_eq!(vmm.run_state().await, RunState::Running);
    vmm.call(Call::AbortSave).await.unwrap();
}

#[tokio::test]
async fn a_save_ends_when_its_stream_is_closed() {
    let mut vmm = Fixture::new(State::Running).await;
    let mut stream = vmm.start_save().await;
    vmm.call(Call::Pause).await.unwrap();
    let finished = vmm.finish_save();
    stream.message().await.unwrap().unwrap();
    drop(stream);
    let status = finished.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "{status}");
    vmm.call(Call::Resume).await.unwrap();
}

#[tokio::test]
async fn garbage_is_refused_and_the_twin_can_still_be_loaded() {
    let (mut source, mut twin) = (Fixture::new(State::Running).await, Fixture::new(State::Incoming).await);
    let bytes = source.saved().await;
    let mut wrong = bytes.clone();
    wrong[8] = 2;
    let mut long = bytes.clone();
    long.push(0);
    let garbage: [(&[u8], &str); 5] = [
        (&[], "the state ends after 0 bytes, within the magic"),
        (b"garbage!", "the magic is \"garbage!\", expected \"SLKWLAB\\x00\""),
        (&wrong, "the version is 2, expected 1"),
        (&bytes[..bytes.len() - 1], "the state ends after "),
        (&long, "more data follows the end of the state"),
    ];
    for (bytes, message) in garbage {
        let refused = twin.client.start_load(pieces(bytes)).await.map(|_| ());
        assert_refused(refused, Code::InvalidArgument, message);
        assert_eq!(twin.run_state().await, RunState::Incoming);
        assert_refused(
            twin.call(Call::FinishLoad).await,
            Code::FailedPrecondition,
            "FinishLoad is out of order",
        );
    }
    assert!(twin.ram_bytes().iter().all(|&byte| byte == 0), "nothing is left of the refused state");
    twin.client.start_load(pieces(&bytes)).await.unwrap();
    twin.call(Call::FinishLoad).await.unwrap();
    assert!(twin.ram_bytes() == source.ram_bytes());
}

#[tokio::test]
async fn a_piece_above_the_limit_is_refused() {
    let mut twin = Fixture::new(State::Incoming).await;
    let piece = StartLoadRequest { data: vec![0; (1 << 20) + 1].into() };
    let refused = twin.client.start_load(futures::stream::iter([piece])).await.map(|_| ());
    assert_refused(refused, Code::InvalidArgument, "data is 1048577 bytes, expected at most 1048576");
}

#[tokio::test]
async fn a_caller_that_disconnects_while_loading_leaves_a_twin_that_can_be_loaded() {
    let (mut source, mut twin) = (Fixture::new(State::Running).await, Fixture::new(State::Incoming).await);
    let bytes = source.saved().await;
    let unending = pieces(&bytes[..bytes.len() / 2]).chain(futures::stream::pending());
    let loading = twin.client.clone();
    let call = tokio::spawn(async move { loading.clone().start_load(unending).await.map(|_| ()) });
    while twin.ram_bytes()[0] == 0 {
        tokio::task::yield_now().await;
    }
    call.abort();
    let mut loaded = twin.client.start_load(pieces(&bytes)).await;
    while loaded
        .as_ref()
        .is_err_and(|status| status.message().starts_with("StartLoad is out of order: StartLoad is"))
    {
        loaded = twin.client.start_load(pieces(&bytes)).await;
    }
    loaded.unwrap();
    twin.call(Call::FinishLoad).await.unwrap();
    assert!(twin.ram_bytes() == source.ram_bytes());
}

#[tokio::test]
async fn quit_stops_the_vcpu_ends_a_save_and_answers() {
    let mut vmm = Fixture::new(State::Running).await;
    let stream = vmm.start_save().await;
    vmm.client.quit(QuitRequest {}).await.unwrap();
    assert!(vmm.quit.is_cancelled());
    let steps = vmm.machine.steps();
    // Although the save's stream is not read.
    timeout(Duration::from_secs(10), &mut vmm.server)
        .await
        .expect("the server does not end")
        .unwrap()
        .unwrap();
    assert_eq!(read_all(stream).await.unwrap_err().code(), Code::Aborted);
    assert_eq!(vmm.machine.steps(), steps);
}
