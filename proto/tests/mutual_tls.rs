//! Which callers mutual TLS admits, which it refuses, and the error that each side gets.

#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use slackwater_proto::channel::{self, ConnectError};
use slackwater_proto::identity::{Role, require_agent, require_operator};
use slackwater_proto::limits::{KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT};
use slackwater_proto::node::node_agent_client::NodeAgentClient;
use slackwater_proto::node::node_agent_server::{NodeAgent, NodeAgentServer};
use slackwater_proto::node::*;
use slackwater_proto::server;
use slackwater_proto::tls::{Credentials, CredentialsError};
use slackwater_proto::tonic::service::Routes;
use slackwater_proto::tonic::{Code, Request, Response, Status};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

#[path = "mutual_tls/floods.rs"]
mod floods;
#[path = "mutual_tls/renewal.rs"]
mod renewal;

/// A certificate authority and what it has issued, in files of a directory of its own.
struct Authority {
    dir: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { dir, issuer: Issuer::new(params, key) }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// Writes `<name>.pem` and `<name>.key`.
    fn issue(&self, name: &str, uri: &str, change: impl FnOnce(&mut CertificateParams)) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.subject_alt_names.push(SanType::URI(uri.try_into().unwrap()));
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(self.path(&format!("{name}.pem")), certificate.pem()).unwrap();
        std::fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    fn read(&self, name: &str) -> Result<Credentials, CredentialsError> {
        let (certificate, key) = (self.path(&format!("{name}.pem")), self.path(&format!("{name}.key")));
        Credentials::read(&certificate, &key, &self.path("ca.pem"))
    }

    fn agent(&self, node: &str) -> Credentials {
        self.issue(node, &format!("spiffe://slackwater.dev/agent/{node}"), |_| {});
        self.read(node).unwrap()
    }

    fn operator(&self) -> Credentials {
        self.issue("operator", "spiffe://slackwater.dev/operator", |_| {});
        self.read("operator").unwrap()
    }
}

type Streamed<T> = ReceiverStream<Result<T, Status>>;

type Watchers = Arc<Mutex<Vec<mpsc::Sender<Result<WatchResponse, Status>>>>>;

/// An agent that lets the operator describe it and (for this test alone) agents reserve; a watch never ends.
#[derive(Default)]
struct Stub {
    watchers: Watchers,
    kernel_release: String,
}

#[slackwater_proto::tonic::async_trait]
impl NodeAgent for Stub {
    async fn describe(
        &self,
        request: Request<DescribeRequest>,
    ) -> Result<Response<DescribeResponse>, Status> {
        require_operator(&request)?;
        let node = NodeDescription {
            node: "node-a".to_owned(),
            kernel_release: self.kernel_release.clone(),
            ..Default::default()
        };
        Ok(Response::new(DescribeResponse { node: Some(node) }))
    }

    type WatchStream = Streamed<WatchResponse>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (sender, receiver) = mpsc::channel(1);
        self.watchers.lock().unwrap().push(sender);
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn reserve(&self, request: Request<ReserveRequest>) -> Result<Response<ReserveResponse>, Status> {
        Err(Status::aborted(format!("node {}", require_agent(&request)?)))
    }

    type MigrateStream = Streamed<MigrateResponse>;

    async fn migrate(&self, _: Request<MigrateRequest>) -> Result<Response<Self::MigrateStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn release(&self, _: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn acknowledge_end(
        &self,
        _: Request<AcknowledgeEndRequest>,
    ) -> Result<Response<AcknowledgeEndResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn resolve(&self, _: Request<ResolveRequest>) -> Result<Response<ResolveResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

struct Serving {
    address: String,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

async fn serve(credentials: &Credentials, drain: Duration) -> Serving {
    serve_stub(credentials, drain, Stub::default()).await
}

async fn serve_stub(credentials: &Credentials, drain: Duration, stub: Stub) -> Serving {
    serve_routes(credentials, drain, Routes::new(NodeAgentServer::new(stub))).await
}

async fn serve_routes(credentials: &Credentials, drain: Duration, routes: Routes) -> Serving {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (stop, stopped) = oneshot::channel::<()>();
    let credentials = credentials.clone();
    let task = tokio::spawn(async move {
        server::serve(listener, &credentials, routes, async { stopped.await.unwrap_or_default() }, drain)
            .await
    });
    Serving { address, stop, task }
}

const SOON: Duration = Duration::from_secs(2);

/// What is logged by this thread (each test has a runtime of one thread).
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn capture() -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn told(error: &ConnectError, serving: &Serving) -> String {
    error.to_string().replace(&serving.address, "ADDRESS")
}

#[tokio::test]
async fn the_operator_and_an_agent_get_in_and_are_told_apart() {
    let ca = Authority::new();
    let serving = serve(&ca.agent("node-a"), SOON).await;

    let operator = channel::connect(&ca.operator(), &serving.address, "node-a").await.unwrap();
    let mut operator = NodeAgentClient::new(operator);
    let described = operator.describe(DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!(described.node.unwrap().node, "node-a");
    let refused = operator.reserve(ReserveRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(refused.message(), "called by the operator, but only the agent of a node may do this");

    let agent = channel::connect(&ca.agent("node-b"), &serving.address, "node-a").await.unwrap();
    let mut agent = NodeAgentClient::new(agent);
    let refused = agent.describe(DescribeRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(refused.message(), "called by the agent of node node-b, but only the operator may do this");
    assert_eq!(agent.reserve(ReserveRequest::default()).await.unwrap_err().message(), "node node-b");
}

#[tokio::test]
async fn a_caller_of_another_ca_is_refused_by_both_sides_in_words() {
    let (log, _guard) = Log::capture();
    let (ours, theirs) = (Authority::new(), Authority::new());
    let serving = serve(&ours.agent("node-a"), SOON).await;

    // Neither knows the other's CA: the caller refuses first.
    let error = channel::connect(&theirs.operator(), &serving.address, "node-a").await.unwrap_err();
    assert_eq!(
        told(&error, &serving),
        "node-a at ADDRESS showed a certificate that is refused here: it was issued by a CA that is not trusted here"
    );

    // The caller trusts our CA, but shows a certificate of its own.
    std::fs::copy(ours.path("ca.pem"), theirs.path("ca.pem")).unwrap();
    let error = channel::connect(&theirs.operator(), &serving.address, "node-a").await.unwrap_err();
    assert!(matches!(error, ConnectError::OurCertificate { .. }), "{error}");
    assert_eq!(
        told(&error, &serving),
        "node-a at ADDRESS refuses our certificate: it was issued by a CA that is not trusted there"
    );
    let log = log.text();
    assert!(log.contains("the caller does not accept this server's certificate"), "{log}");
    assert!(
        log.contains("TLS handshake refused peer=127.0.0.1:")
            && log.contains("the caller's certificate: it was issued by a CA that is not trusted here"),
        "{log}"
    );
}

#[tokio::test]
async fn a_caller_without_a_certificate_is_refused_and_logged() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
    use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};

    let (log, _guard) = Log::capture();
    let ca = Authority::new();
    let serving = serve(&ca.agent("node-a"), SOON).await;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca.path("ca.pem")).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = tokio::net::TcpStream::connect(&serving.address).await.unwrap();
    let name = ServerName::try_from("node-a").unwrap();
    let mut tls = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap();
    // More than the server reads before it decides. Were its socket closed at once, it would be reset: a
    // caller that goes on writing, as HTTP/2 does, would get "connection reset" and never read the alert.
    tls.write_all(&vec![0; 256 << 10]).await.unwrap();
    tokio::time::timeout(SOON, async {
        while !log.text().contains("refused") {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    tls.write_all(b"more").await.unwrap();
    tls.flush().await.unwrap();
    let error = tls.read(&mut [0; 16]).await.unwrap_err().to_string();
    assert!(error.contains("CertificateRequired"), "{error}");
    let log = log.text();
    assert!(log.contains("the caller's certificate: it showed no certificate"), "{log}");
}

#[tokio::test]
async fn an_agent_that_is_another_node_is_not_taken_for_the_one_that_was_called() {
    let ca = Authority::new();
    let serving = serve(&ca.agent("node-a"), SOON).await;
    let error = channel::connect(&ca.operator(), &serving.address, "node-b").await.unwrap_err();
    assert_eq!(told(&error, &serving), "ADDRESS is not node-b: its certificate is for node-a");
}

#[tokio::test]
async fn a_server_that_is_not_the_agent_of_the_node_is_refused_even_if_its_dns_name_fits() {
    let ca = Authority::new();
    let operator = ca.operator();
    for (node, names, role, told_role) in [
        ("node-a", "node-a", "operator", "the operator"),
        ("node-a", "node-a", "agent/node-b", "the agent of node node-b"),
        ("node-a", "NODE-A", "agent/node-b", "the agent of node node-b"),
        ("a.lab.example", "*.lab.example", "agent/b.lab.example", "the agent of node b.lab.example"),
    ] {
        ca.issue("impostor", &format!("spiffe://slackwater.dev/{role}"), |params| {
            params.subject_alt_names.push(SanType::DnsName(names.try_into().unwrap()));
        });
        let serving = serve(&ca.read("impostor").unwrap(), SOON).await;
        let error = channel::connect(&operator, &serving.address, node).await.unwrap_err();
        assert_eq!(
            told(&error, &serving),
            format!("ADDRESS is not the agent of {node}: its certificate is for {told_role}"),
            "{names} {role}"
        );
        // A source agent asks in the same way.
        let agent = ca.agent("node-c");
        let error = channel::connect(&agent, &serving.address, node).await.unwrap_err();
        assert!(matches!(error, ConnectError::WrongRole { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_certificate_without_a_role_connects_and_may_do_nothing() {
    let ca = Authority::new();
    let serving = serve(&ca.agent("node-a"), SOON).await;
    // What Credentials refuses to read, TLS would still accept: the caller's good behaviour is not what
    // protects us.
    ca.issue("nobody", "spiffe://slackwater.dev/root", |_| {});
    let error = ca.read("nobody").unwrap_err().to_string();
    let reason = "`spiffe://slackwater.dev/root` is no role: spiffe://slackwater.dev/operator or \
                  spiffe://slackwater.dev/agent/<node> would be one";
    assert!(error.ends_with(reason), "{error}");

    use slackwater_proto::tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
    let pem = |file: &str| std::fs::read(ca.path(file)).unwrap();
    let tls = ClientTlsConfig::new()
        .domain_name("node-a")
        .ca_certificate(Certificate::from_pem(pem("ca.pem")))
        .identity(Identity::from_pem(pem("nobody.pem"), pem("nobody.key")));
    let endpoint =
        Endpoint::from_shared(format!("https://{}", serving.address)).unwrap().tls_config(tls).unwrap();
    let mut client = NodeAgentClient::new(endpoint.connect().await.unwrap());
    let refused = client.describe(DescribeRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().contains("`spiffe://slackwater.dev/root` is no role"), "{refused}");
}

#[tokio::test]
async fn a_certificate_that_may_not_be_used_by_clients_is_refused_with_the_remedy() {
    let (log, _guard) = Log::capture();
    let ca = Authority::new();
    let serving = serve(&ca.agent("node-a"), SOON).await;
    ca.issue("node-b", "spiffe://slackwater.dev/agent/node-b", |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    let error = channel::connect(&ca.read("node-b").unwrap(), &serving.address, "node-a").await.unwrap_err();
    assert!(matches!(error, ConnectError::OurCertificate { .. }), "{error}");
    let log = log.text();
    assert!(log.contains("an agent's needs server and client authentication"), "{log}");
}

#[tokio::test]
async fn the_error_says_that_no_process_listens_or_another_one_does() {
    let ca = Authority::new();
    let operator = ca.operator();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let error = channel::connect(&operator, &closed, "node-a").await.unwrap_err().to_string();
    assert_eq!(error, format!("cannot connect to node-a at {closed}: Connection refused (os error 111)"));

    let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = plain.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut tcp, _) = plain.accept().await.unwrap();
        tcp.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await.unwrap();
        while tcp.read(&mut [0; 512]).await.is_ok_and(|n| n > 0) {}
    });
    let error = channel::connect(&operator, &address, "node-a").await.unwrap_err().to_string();
    assert_eq!(
        error,
        format!("node-a at {address} does not answer as an agent: the other end does not speak TLS")
    );

    for address in ["node-a", "", ":7443", "http://a:1", "a b:1", "user@a:1"] {
        let error = channel::connect(&operator, address, "node-a").await.unwrap_err();
        assert!(matches!(error, ConnectError::Address { .. }), "{address}: {error}");
    }
    let error = channel::connect(&operator, "127.0.0.1:1", "Node A").await.unwrap_err().to_string();
    assert_eq!(error, "`Node A` is no node name: it must be a DNS name in lower case");
}

#[tokio::test]
async fn a_server_that_stops_drains_and_breaks_off_what_does_not_end() {
    let ca = Authority::new();
    let operator = ca.operator();
    let idle = serve(&ca.agent("node-a"), Duration::from_secs(60)).await;
    let channel = channel::connect(&operator, &idle.address, "node-a").await.unwrap();
    let begun = Instant::now();
    idle.stop.send(()).unwrap();
    idle.task.await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(30), "an idle connection delayed the end");
    NodeAgentClient::new(channel).describe(DescribeRequest {}).await.unwrap_err();

    let busy = serve(&ca.agent("node-a"), Duration::from_millis(300)).await;
    let channel = channel::connect(&operator, &busy.address, "node-a").await.unwrap();
    let _watch = NodeAgentClient::new(channel).watch(WatchRequest {}).await.unwrap();
    let begun = Instant::now();
    busy.stop.send(()).unwrap();
    busy.task.await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(300), "a call under way was not given its time");
}

/// Forwards one connection to `address` until it is to stop, and then keeps both halves open: a cut
/// link, not a closed one.
async fn link_to(address: String) -> (String, oneshot::Sender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = listener.local_addr().unwrap().to_string();
    let (cut, is_cut) = oneshot::channel::<()>();
    tokio::spawn(async move {
        let (mut caller, _) = listener.accept().await.unwrap();
        let mut called = tokio::net::TcpStream::connect(address).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut caller, &mut called) => {}
            _ = is_cut => std::future::pending().await,
        }
    });
    (here, cut)
}

#[tokio::test]
async fn both_ends_notice_a_cut_link_within_interval_and_timeout() {
    let ca = Authority::new();
    let stub = Stub::default();
    let watchers = Arc::clone(&stub.watchers);
    let serving = serve_stub(&ca.agent("node-a"), SOON, stub).await;
    let (address, cut) = link_to(serving.address.clone()).await;
    let channel = channel::connect(&ca.operator(), &address, "node-a").await.unwrap();
    let mut watch = NodeAgentClient::new(channel).watch(WatchRequest {}).await.unwrap().into_inner();
    let watcher = watchers.lock().unwrap().pop().unwrap();

    cut.send(()).unwrap();
    let limit = KEEP_ALIVE_INTERVAL + KEEP_ALIVE_TIMEOUT + Duration::from_secs(3);
    let (caller, called) = tokio::join!(
        tokio::time::timeout(limit, watch.message()),
        tokio::time::timeout(limit, watcher.closed())
    );
    let error = caller.expect("the caller still waits").unwrap_err();
    assert!(channel::is_lost(&error), "{error:?}");
    assert!(channel::words(&error).starts_with("connection lost: "), "{}", channel::words(&error));
    called.expect("the agent still serves it");
}

#[tokio::test]
async fn a_channel_connects_again_after_the_agent_has_been_restarted() {
    let ca = Authority::new();
    let agent = ca.agent("node-a");
    let first = serve(&agent, SOON).await;
    let mut client =
        NodeAgentClient::new(channel::connect(&ca.operator(), &first.address, "node-a").await.unwrap());
    client.describe(DescribeRequest {}).await.unwrap();
    first.stop.send(()).unwrap();
    first.task.await.unwrap();

    let error = client.describe(DescribeRequest {}).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(channel::is_lost(&error));
    let told = channel::words(&error);
    assert!(told.starts_with("connection lost: cannot connect"), "{told}");
    assert!(told.contains("cannot connect to node-a at 127.0.0.1:") && told.contains("refused"), "{told}");

    let listener = TcpListener::bind(&first.address).await.unwrap();
    let (_stop, stopped) = oneshot::channel::<()>();
    tokio::spawn(async move {
        let routes = Routes::new(NodeAgentServer::new(Stub::default()));
        server::serve(listener, &agent, routes, async { stopped.await.unwrap_or_default() }, SOON).await
    });
    client.describe(DescribeRequest {}).await.unwrap();
}

#[tokio::test]
async fn a_unix_socket_is_its_owners_alone_and_has_no_callers_with_a_role() {
    use std::os::unix::fs::PermissionsExt;

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    let told = |error: ConnectError| error.to_string().replace(&path.display().to_string(), "SOCKET");
    let error = channel::connect_unix(&path).await.unwrap_err();
    assert_eq!(told(error), "cannot connect to the socket SOCKET: it does not exist");

    let listener = server::bind_unix(&path).unwrap();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        let routes = Routes::new(NodeAgentServer::new(Stub::default()));
        server::serve_unix(listener, routes, async { stopped.await.unwrap_or_default() }, SOON).await
    });
    let mut client = NodeAgentClient::new(channel::connect_unix(&path).await.unwrap());
    let refused = client.describe(DescribeRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert_eq!(refused.message(), "the caller showed no certificate: this service needs mutual TLS");

    stop.send(()).unwrap();
    task.await.unwrap().unwrap();
    let ended = channel::words(&client.describe(DescribeRequest {}).await.unwrap_err());
    assert!(ended.contains("the process has closed its socket"), "{ended}");
    let error = channel::connect_unix(&path).await.unwrap_err();
    assert_eq!(told(error), "cannot connect to the socket SOCKET: no process listens on it (it has ended)");
}

#[test]
fn credentials_that_do_not_fit_are_refused_by_file_and_fault() {
    let ca = Authority::new();
    assert_eq!(ca.agent("node-a").role(), &Role::Agent { node: "node-a".to_owned() });
    ca.operator();
    ca.issue("old", "spiffe://slackwater.dev/operator", |params| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    });
    std::fs::write(ca.path("text"), "not PEM at all").unwrap();
    std::fs::write(ca.path("torn"), "-----BEGIN CERTIFICATE-----\nAAAA").unwrap();

    let error = |certificate: &str, key: &str, authority: &str| {
        let read = Credentials::read(&ca.path(certificate), &ca.path(key), &ca.path(authority));
        let error = read.unwrap_err().to_string();
        error.replace(&ca.dir.path().display().to_string(), "DIR")
    };
    assert_eq!(error("none.pem", "operator.key", "ca.pem"), "cannot read the certificate DIR/none.pem");
    assert_eq!(
        error("text", "operator.key", "ca.pem"),
        "the certificate DIR/text is not usable: it holds no certificate in PEM"
    );
    assert!(error("torn", "operator.key", "ca.pem").starts_with("the certificate DIR/torn is not usable: "));
    assert_eq!(
        error("operator.pem", "operator.pem", "ca.pem"),
        "the key DIR/operator.pem is not usable: it holds no private key in PEM"
    );
    assert_eq!(
        error("operator.pem", "node-a.key", "ca.pem"),
        "the key DIR/node-a.key does not belong to the certificate DIR/operator.pem"
    );
    let old = error("old.pem", "old.key", "ca.pem");
    assert!(
        old.starts_with("the certificate DIR/old.pem is valid from ") && old.ends_with(", and not now"),
        "{old}"
    );
    assert_eq!(
        error("operator.pem", "operator.key", "text"),
        "the CA certificate DIR/text is not usable: it holds no certificate in PEM"
    );
    assert_eq!(
        error("ca.pem", "operator.key", "ca.pem"),
        "the certificate DIR/ca.pem is not usable: the certificate names no role: it has no URI in its \
         alternative names that begins with spiffe://slackwater.dev/"
    );
    let file = |name: &str| ca.path(name);
    let read =
        Credentials::read_for(&Role::Operator, &file("node-a.pem"), &file("node-a.key"), &file("ca.pem"));
    assert_eq!(
        read.unwrap_err().to_string().replace(&ca.dir.path().display().to_string(), "DIR"),
        "the certificate DIR/node-a.pem is for the agent of node node-a, and this is the operator"
    );
    let debug = format!("{:?}", ca.read("operator").unwrap());
    assert_eq!(debug, "Credentials { role: Operator, .. }", "no key may get into a log");
    assert!(Path::new(&ca.path("operator.key")).exists());
}
