//! Callers that flood: without a certificate, and with one.

use futures::future::join_all;
use slackwater_proto::tonic::Streaming;
use slackwater_proto::transfer::transfer_client::TransferClient;
use slackwater_proto::transfer::transfer_server::{Transfer, TransferServer};
use slackwater_proto::transfer::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;

/// What a hand-over answers.
type Answers = mpsc::Sender<Result<HandoverResponse, Status>>;

/// A destination whose hand-overs say Ready and stay open.
#[derive(Default, Clone)]
pub(crate) struct Destination {
    pub(crate) open: Arc<Mutex<Vec<Answers>>>,
}

#[slackwater_proto::tonic::async_trait]
impl Transfer for Destination {
    type HandoverStream = Streamed<HandoverResponse>;

    async fn handover(
        &self,
        _: Request<Streaming<HandoverRequest>>,
    ) -> Result<Response<Self::HandoverStream>, Status> {
        let (sender, receiver) = mpsc::channel(4);
        self.open.lock().unwrap().push(sender);
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn send_blob(
        &self,
        _: Request<Streaming<SendBlobRequest>>,
    ) -> Result<Response<SendBlobResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn settle(&self, _: Request<SettleRequest>) -> Result<Response<SettleResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

pub(crate) async fn serve_destination(credentials: &Credentials, destination: &Destination) -> Serving {
    let routes = Routes::new(NodeAgentServer::new(Stub::default()))
        .add_service(TransferServer::new(destination.clone()));
    serve_routes(credentials, SOON, routes).await
}

#[tokio::test]
async fn idle_connections_without_a_certificate_keep_nobody_out() {
    let ca = Authority::new();
    let serving = serve(&ca.agent("node-a"), SOON).await;
    let mut idle = Vec::new();
    for number in 0..601 {
        let mut tcp = TcpStream::connect(&serving.address).await.unwrap();
        if number % 2 == 0 {
            // The beginning of a TLS record of 8 KiB that goes on byte by byte, if at all.
            tcp.write_all(&[0x16, 0x03, 0x01, 0x20, 0x00, 0x01, 0x00, 0x1f, 0xfc]).await.unwrap();
        }
        idle.push(tcp);
    }
    let begun = Instant::now();
    let operator = ca.operator();
    for _ in 0..3 {
        channel::connect(&operator, &serving.address, "node-a").await.unwrap();
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "the operator waited {:?}", begun.elapsed());

    // Nobody stays without a certificate for long, however slowly it talks.
    let last = idle.last_mut().unwrap();
    let dripping = async {
        while last.write_all(&[0]).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(8), dripping).await.expect("it may still talk");
    for tcp in &mut idle {
        let gone = tokio::time::timeout(Duration::from_secs(2), tcp.read(&mut [0; 64])).await;
        assert!(!matches!(gone, Err(_) | Ok(Ok(1..))), "{gone:?}");
    }
}

#[tokio::test]
async fn an_agent_that_opens_thousands_of_streams_gets_its_share_and_the_operator_is_served() {
    let ca = Authority::new();
    let destination = Destination::default();
    let serving = serve_destination(&ca.agent("node-a"), &destination).await;
    let agent = ca.agent("node-b");
    let mut connections = Vec::new();
    for _ in 0..7 {
        let more = join_all((0..20).map(|_| channel::connect(&agent, &serving.address, "node-a"))).await;
        connections.extend(more.into_iter().map(Result::unwrap));
    }
    // The senders of their requests stay open.
    let (forever, _) = tokio::sync::broadcast::channel::<()>(1);
    let refused = Arc::new(Mutex::new(0));
    for connection in &connections {
        for _ in 0..20 {
            let mut client = TransferClient::new(connection.clone());
            let (refused, mut forever) = (Arc::clone(&refused), forever.subscribe());
            tokio::spawn(async move {
                let (_requests, stream) = mpsc::channel::<HandoverRequest>(1);
                match client.handover(ReceiverStream::new(stream)).await {
                    Ok(answers) => {
                        let _ = forever.recv().await;
                        drop(answers);
                    }
                    Err(status) => {
                        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                        *refused.lock().unwrap() += 1;
                    }
                }
            });
        }
    }
    // 20 of each of 140 connections were asked for.
    let open = || destination.open.lock().unwrap().len();
    tokio::time::timeout(Duration::from_secs(30), async {
        while open() < 1024 && open() + *refused.lock().unwrap() < 2800 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("not even its share");
    let operator = channel::connect(&ca.operator(), &serving.address, "node-a").await.unwrap();
    NodeAgentClient::new(operator).describe(DescribeRequest {}).await.unwrap();
    let other = channel::connect(&ca.agent("node-c"), &serving.address, "node-a").await.unwrap();
    let (_requests, stream) = mpsc::channel::<HandoverRequest>(1);
    TransferClient::new(other).handover(ReceiverStream::new(stream)).await.unwrap();
    assert!(open() <= 1025, "{} streams are open", open());
}

#[tokio::test]
async fn a_caller_has_a_share_of_the_connections_and_gets_it_back() {
    use slackwater_proto::tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
    let ca = Authority::new();
    let serving = serve(&ca.agent("node-a"), SOON).await;
    ca.issue("nobody", "spiffe://slackwater.dev/root", |_| {});
    let pem = |file: &str| std::fs::read(ca.path(file)).unwrap();
    let tls = ClientTlsConfig::new()
        .domain_name("node-a")
        .ca_certificate(Certificate::from_pem(pem("ca.pem")))
        .identity(Identity::from_pem(pem("nobody.pem"), pem("nobody.key")));
    let endpoint =
        Endpoint::from_shared(format!("https://{}", serving.address)).unwrap().tls_config(tls).unwrap();
    let ask = async || {
        let mut client = NodeAgentClient::new(endpoint.connect().await.map_err(|error| error.to_string())?);
        let status = client.describe(DescribeRequest {}).await.unwrap_err();
        match status.code() {
            Code::Unauthenticated => Ok(client),
            _ => Err(status.to_string()),
        }
    };
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(ask().await.unwrap());
    }
    ask().await.expect_err("more than its share");
    channel::connect(&ca.operator(), &serving.address, "node-a").await.unwrap();
    held.clear();
    tokio::time::timeout(SOON, async {
        while ask().await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("its share stays taken");
}

/// An agent that answers and asks with as many bytes as it is told.
#[tokio::test]
async fn a_message_of_an_agents_own_service_is_limited_at_both_ends() {
    use slackwater_proto::limits::{ANSWER_LIMIT_BYTES, MESSAGE_LIMIT_BYTES, node_client, node_server};
    let ca = Authority::new();
    let serving = serve_routes(&ca.agent("node-a"), SOON, Routes::new(node_server(Stub::default()))).await;
    let channel = channel::connect(&ca.agent("node-b"), &serving.address, "node-a").await.unwrap();
    let ask = |mut client: NodeAgentClient<_>, bytes| async move {
        let request = ReserveRequest { vm_json: "x".repeat(bytes), ..ReserveRequest::default() };
        client.reserve(request).await.unwrap_err().code()
    };
    // The stub answers ABORTED to what reaches it.
    assert_eq!(ask(NodeAgentClient::new(channel.clone()), MESSAGE_LIMIT_BYTES - 64).await, Code::Aborted);
    assert_eq!(ask(NodeAgentClient::new(channel.clone()), MESSAGE_LIMIT_BYTES).await, Code::OutOfRange);
    assert_ne!(ask(node_client(channel.clone()), MESSAGE_LIMIT_BYTES).await, Code::Aborted);

    let big = |bytes| {
        let stub = Stub { kernel_release: "x".repeat(bytes), ..Stub::default() };
        Routes::new(NodeAgentServer::new(stub).max_encoding_message_size(usize::MAX))
    };
    for (bytes, fits) in [(ANSWER_LIMIT_BYTES - 64, true), (ANSWER_LIMIT_BYTES, false)] {
        let serving = serve_routes(&ca.agent("node-a"), SOON, big(bytes)).await;
        let channel = channel::connect(&ca.operator(), &serving.address, "node-a").await.unwrap();
        let described = node_client(channel).describe(DescribeRequest {}).await;
        assert_eq!(described.is_ok(), fits, "{bytes}");
    }
}
