//! Certificates that are renewed, replaced and run out, while both ends run.

use std::os::unix::fs::symlink;

use slackwater_proto::transfer::transfer_client::TransferClient;
use slackwater_proto::transfer::{HandoverRequest, HandoverResponse};

use super::floods::{Destination, serve_destination};
use super::*;

impl Authority {
    /// Valid for so long from now on.
    fn issue_for(&self, name: &str, uri: &str, time: Duration) {
        let since = std::time::UNIX_EPOCH.elapsed().unwrap();
        self.issue(name, uri, |params| {
            params.not_after = rcgen::date_time_ymd(1970, 1, 1) + since + time;
        });
    }

    fn copy(&self, file: &str, folder: &Path, to: &str) {
        std::fs::copy(self.path(file), folder.join(to)).unwrap();
    }
}

const OPERATOR: &str = "spiffe://slackwater.dev/operator";
const NODE_A: &str = "spiffe://slackwater.dev/agent/node-a";

/// A Secret, as Kubernetes mounts it: links through `..data`, which is swapped.
struct Secret {
    mounted: TempDir,
    versions: u32,
}

impl Secret {
    fn new() -> Self {
        let mounted = tempfile::tempdir().unwrap();
        for file in ["tls.crt", "tls.key", "ca.crt"] {
            symlink(format!("..data/{file}"), mounted.path().join(file)).unwrap();
        }
        Self { mounted, versions: 0 }
    }

    fn put(&mut self, issued_by: &Authority, name: &str, trusted: &[&Authority]) {
        self.versions += 1;
        let version = format!("..version-{}", self.versions);
        let folder = self.mounted.path().join(&version);
        std::fs::create_dir(&folder).unwrap();
        issued_by.copy(&format!("{name}.pem"), &folder, "tls.crt");
        issued_by.copy(&format!("{name}.key"), &folder, "tls.key");
        let bundle = trusted.iter().map(|ca| std::fs::read_to_string(ca.path("ca.pem")).unwrap());
        std::fs::write(folder.join("ca.crt"), bundle.collect::<String>()).unwrap();
        symlink(&version, self.mounted.path().join("..data_tmp")).unwrap();
        std::fs::rename(self.mounted.path().join("..data_tmp"), self.mounted.path().join("..data")).unwrap();
    }

    fn read(&self) -> Credentials {
        let path = |file: &str| self.mounted.path().join(file);
        Credentials::read(&path("tls.crt"), &path("tls.key"), &path("ca.crt")).unwrap()
    }
}

#[tokio::test]
async fn a_renewed_secret_is_used_by_server_and_client_without_a_restart() {
    let (old, new) = (Authority::new(), Authority::new());
    for (ca, days) in [(&old, 10), (&new, 20)] {
        ca.issue_for("node-a", NODE_A, Duration::from_secs(days * 24 * 3600));
        ca.issue_for("operator", OPERATOR, Duration::from_secs(days * 24 * 3600));
    }
    let (mut agents, mut operators) = (Secret::new(), Secret::new());
    agents.put(&old, "node-a", &[&old]);
    operators.put(&old, "operator", &[&old]);
    let (agent, operator) = (agents.read(), operators.read());
    for credentials in [&agent, &operator] {
        let credentials = credentials.clone();
        tokio::spawn(async move { credentials.follow_files().await });
    }
    let (mut agent_status, mut operator_status) = (agent.status(), operator.status());
    let serving = serve(&agent, SOON).await;
    let mut client =
        NodeAgentClient::new(channel::connect(&operator, &serving.address, "node-a").await.unwrap());
    client.describe(DescribeRequest {}).await.unwrap();

    // The CA changes: nobody who has only the old one gets in any more, and who is in has to come again.
    tokio::task::yield_now().await;
    operators.put(&new, "operator", &[&new]);
    agents.put(&new, "node-a", &[&new]);
    let renewed = async { tokio::join!(agent_status.changed(), operator_status.changed()) };
    let (one, other) = tokio::time::timeout(Duration::from_secs(10), renewed).await.expect("not renewed");
    one.and(other).unwrap();
    let error = channel::connect(&old.read("operator").unwrap(), &serving.address, "node-a").await;
    assert!(matches!(error, Err(ConnectError::TheirCertificate { .. })), "{error:?}");
    channel::connect(&new.read("operator").unwrap(), &serving.address, "node-a").await.unwrap();
    channel::connect(&operator, &serving.address, "node-a").await.unwrap();

    // A channel that was open connects again, with the new certificate.
    tokio::time::timeout(SOON, async {
        while client.describe(DescribeRequest {}).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("the channel does not come back");
}

#[tokio::test]
async fn files_that_cannot_be_used_are_refused_in_words_and_change_nothing() {
    let (log, _guard) = Log::capture();
    let (ca, other) = (Authority::new(), Authority::new());
    let agent = ca.agent("node-a");
    let serving = serve(&agent, SOON).await;
    let status = agent.status();
    let refused = || {
        agent.read_again();
        let refused = status.borrow().refused.clone();
        refused.map(|why| why.replace(&ca.dir.path().display().to_string(), "DIR"))
    };
    assert_eq!(refused(), None);

    let good = std::fs::read(ca.path("node-a.key")).unwrap();
    other.issue("node-a", NODE_A, |_| {});
    std::fs::copy(other.path("node-a.key"), ca.path("node-a.key")).unwrap();
    let mismatch = "the key DIR/node-a.key does not belong to the certificate DIR/node-a.pem";
    assert_eq!((refused().as_deref(), refused().as_deref()), (Some(mismatch), Some(mismatch)));
    assert_eq!(log.text().matches("does not belong to the certificate").count(), 1, "it is said once");
    std::fs::remove_file(ca.path("node-a.key")).unwrap();
    assert!(refused().unwrap().starts_with("cannot read the key DIR/node-a.key: No such file"));
    std::fs::write(ca.path("node-a.key"), good).unwrap();
    assert_eq!(refused(), None, "the files are as they were");

    ca.issue("node-a", "spiffe://slackwater.dev/agent/node-b", |_| {});
    let role = "the certificate DIR/node-a.pem is for the agent of node node-b, and this is the agent of node \
                node-a";
    assert_eq!(refused().as_deref(), Some(role));
    channel::connect(&ca.operator(), &serving.address, "node-a").await.unwrap();

    ca.issue("node-a", NODE_A, |_| {});
    let before = status.borrow().validity;
    assert_eq!(refused(), None);
    assert_eq!(status.borrow().validity, before);
    assert!(log.text().contains("the certificates were renewed"), "{}", log.text());
}

#[tokio::test]
async fn a_connection_does_not_outlive_the_certificate_of_either_end() {
    const LIFE: Duration = Duration::from_secs(3);
    // The grace of 5 s, and what the clock's whole seconds cost.
    const END: Duration = Duration::from_secs(11);
    let ca = Authority::new();
    ca.issue_for("node-a", NODE_A, LIFE);
    let short_server = ca.read("node-a").unwrap();
    ca.issue_for("operator", OPERATOR, LIFE);
    let short_client = ca.read("operator").unwrap();
    let first = serve(&short_server, SOON).await;
    let second = serve(&ca.agent("node-a"), SOON).await;
    let long_client = ca.operator();
    for (client, serving) in [(&long_client, &first), (&short_client, &second)] {
        channel::connect(client, &serving.address, "node-a").await.unwrap();
    }
    let watched = |client: Credentials, address: String| async move {
        let channel = channel::connect(&client, &address, "node-a").await.unwrap();
        let mut client = NodeAgentClient::new(channel);
        let mut watch = client.watch(WatchRequest {}).await.unwrap().into_inner();
        let ended = tokio::time::timeout(END, watch.message()).await.expect("the watch goes on");
        assert!(channel::is_lost(&ended.unwrap_err()));
        channel::words(&client.describe(DescribeRequest {}).await.expect_err("it has run out"))
    };
    let (server_ended, client_ended) = tokio::join!(
        watched(long_client.clone(), first.address.clone()),
        watched(short_client.clone(), second.address.clone())
    );
    let refused = "showed a certificate that is refused here: it has expired";
    assert!(server_ended.contains(refused), "{server_ended}");
    // The server refuses it after the handshake, as TLS 1.3 has it.
    assert!(client_ended.starts_with("connection lost"), "{client_ended}");
}

#[tokio::test]
async fn a_hand_over_that_is_open_when_its_certificate_runs_out_goes_on() {
    let ca = Authority::new();
    let destination = Destination::default();
    ca.issue_for("node-a", NODE_A, Duration::from_secs(2));
    let serving = serve_destination(&ca.read("node-a").unwrap(), &destination).await;
    let agent = ca.agent("node-b");
    let channel = channel::connect_for_hand_over(&agent, &serving.address, "node-a").await.unwrap();
    let (_requests, stream) = mpsc::channel::<HandoverRequest>(1);
    let mut answers = TransferClient::new(channel.clone())
        .handover(ReceiverStream::new(stream))
        .await
        .unwrap()
        .into_inner();
    let to_source = destination.open.lock().unwrap().pop().unwrap();
    // Longer than the certificate, and the grace that other calls have.
    tokio::time::sleep(Duration::from_secs(9)).await;
    to_source.send(Ok(HandoverResponse::default())).await.unwrap();
    let answer = tokio::time::timeout(SOON, answers.message()).await.unwrap().unwrap();
    assert_eq!(answer, Some(HandoverResponse::default()));
    // But no new call begins on it.
    let (_requests, stream) = mpsc::channel::<HandoverRequest>(1);
    TransferClient::new(channel).handover(ReceiverStream::new(stream)).await.unwrap_err();
}

#[tokio::test]
async fn a_connection_ends_when_the_ca_of_its_caller_is_not_trusted_any_more_and_not_before() {
    // Without one, a line of the log that is first written here would be lost to the test beside this one.
    let (_log, _guard) = Log::capture();
    let (old, new) = (Authority::new(), Authority::new());
    for ca in [&old, &new] {
        ca.issue("node-a", NODE_A, |_| {});
    }
    let mut agents = Secret::new();
    agents.put(&old, "node-a", &[&old]);
    let agent = agents.read();
    let serving = serve(&agent, SOON).await;
    let channel = channel::connect(&old.operator(), &serving.address, "node-a").await.unwrap();
    let mut watch = NodeAgentClient::new(channel).watch(WatchRequest {}).await.unwrap().into_inner();
    agents.put(&new, "node-a", &[&old, &new]);
    agent.read_again();
    let goes_on = tokio::time::timeout(Duration::from_millis(300), watch.message()).await;
    assert!(goes_on.is_err(), "both are trusted: {goes_on:?}");
    agents.put(&new, "node-a", &[&new]);
    agent.read_again();
    let ended = tokio::time::timeout(Duration::from_secs(11), watch.message()).await;
    assert!(channel::is_lost(&ended.expect("the watch goes on").unwrap_err()));
}

#[test]
fn a_certificate_that_should_have_been_renewed_is_said_to_end_soon() {
    let ca = Authority::new();
    ca.issue_for("node-a", NODE_A, Duration::from_secs(3600));
    assert!(ca.read("node-a").unwrap().status().borrow().ends_soon);
    assert!(!ca.agent("node-a").status().borrow().ends_soon);
}
