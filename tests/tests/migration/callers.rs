use slackwater_lab::cluster::Cluster;
use slackwater_lab::{NodeConfig, Pki};
use slackwater_proto::channel::connect;
use slackwater_proto::limits::transfer_client;
use slackwater_proto::node::node_agent_client::NodeAgentClient;
use slackwater_proto::node::{DescribeRequest, ReleaseRequest};
use slackwater_proto::tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use slackwater_proto::tonic::{Code, Request};
use slackwater_proto::transfer::{Attempt, HandoverRequest, Hello, handover_request};

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_serves_only_authorised_callers_and_gives_the_reason_of_a_refusal() {
    let cluster = Cluster::start([NodeConfig::new("node-a", ["mtty-1"])]).await.unwrap();
    let address = cluster.lab.node("node-a").unwrap().agent_address().unwrap().to_string();

    // Without a certificate.
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(cluster.pki.ca_pem()))
        .domain_name("node-a");
    let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap().tls_config(tls).unwrap();
    let bare = match endpoint.connect().await {
        Err(_) => None,
        Ok(channel) => NodeAgentClient::new(channel).describe(DescribeRequest {}).await.ok(),
    };
    assert!(bare.is_none(), "a caller without a certificate was served");

    // With a certificate of another CA.
    let stranger = Pki::new("another-ca").unwrap().operator().unwrap();
    let error = match cluster.credentials(&stranger) {
        Ok(credentials) => connect(&credentials, &address, "node-a").await.unwrap_err(),
        Err(error) => panic!("{error:#}"),
    };
    assert!(error.to_string().contains("node-a"), "{error}");

    // As an agent, where only the operator may call.
    let agent = cluster.pki.agent("node-b").unwrap();
    let mut client = cluster.agent_client("node-a", &agent).await.unwrap();
    let refused = client.describe(DescribeRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("node-b") && refused.message().contains("operator"), "{refused}");

    // As the operator, where only agents may call.
    let operator = cluster.credentials(&cluster.pki.operator().unwrap()).unwrap();
    let channel = connect(&operator, &address, "node-a").await.unwrap();
    let hello = Hello { attempt: Some(Attempt { migration_id: "m".to_owned(), attempt: 1 }) };
    let hello = HandoverRequest { message: Some(handover_request::Message::Hello(hello)) };
    let requests = || Request::new(tokio_stream::iter([hello.clone()]));
    let refused = transfer_client(channel).handover(requests()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");

    // As an agent without a reservation.
    let channel = connect(&cluster.credentials(&agent).unwrap(), &address, "node-a").await.unwrap();
    let refused = transfer_client(channel).handover(requests()).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");

    // To a node whose name differs from the agent's.
    let error = connect(&operator, &address, "node-b").await.unwrap_err().to_string();
    assert!(error.contains("node-b"), "{error}");

    // The operator, with an invalid request.
    let issued = cluster.pki.operator().unwrap();
    let mut client = cluster.agent_client("node-a", &issued).await.unwrap();
    let refused = client.release(ReleaseRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().starts_with("migration is"), "{refused}");
}
