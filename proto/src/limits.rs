//! Message sizes, windows and keep-alive: the same at both ends, so they are in one place.

use std::time::Duration;

use tonic::transport::Channel;

use crate::admission::Allowance;
use crate::identity::Role;
use crate::node::node_agent_client::NodeAgentClient;
use crate::node::node_agent_server::{NodeAgent, NodeAgentServer};
use crate::transfer::transfer_client::TransferClient;
use crate::transfer::transfer_server::{Transfer, TransferServer};
use crate::vmm::vmm_client::VmmClient;
use crate::vmm::vmm_server::{Vmm, VmmServer};

/// The most data that one chunk of a blob, or one piece of a VMM's state, may carry, in bytes.
pub const CHUNK_LIMIT_BYTES: usize = 1 << 20;

/// The largest message of the services that move state, and the largest request to an agent, in bytes: a full
/// chunk and the fields around it.
pub const MESSAGE_LIMIT_BYTES: usize = CHUNK_LIMIT_BYTES + (16 << 10);

/// The largest answer of `node.v1`, in bytes: the description of a node with all its VMs, each with its
/// vm.json. Requests are limited by [`MESSAGE_LIMIT_BYTES`].
pub const ANSWER_LIMIT_BYTES: usize = 4 << 20;

/// A question whether the server is well, or its answer, in bytes.
pub(crate) const HEALTH_LIMIT_BYTES: usize = 1024;

/// HTTP/2 flow-control window of one stream, in bytes: some chunks ahead, and the bound of what waits unread.
pub const STREAM_WINDOW_BYTES: u32 = 4 << 20;

/// HTTP/2 flow-control window of a connection, in bytes: several devices' streams at full window.
pub const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// How often each end asks whether the other is still there.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);

/// How long an answer to that may take. A cut link is noticed after at most interval plus timeout.
pub const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection may take to come up: TCP, TLS and the first answer, each.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Callers whose TLS handshake is under way, at a time. Each has [`CONNECT_TIMEOUT`]; one too many pushes out
/// the oldest of the address that has the most.
pub const HANDSHAKES: usize = 256;

/// The headers of a call, in bytes; ours take a few hundred.
pub const HEADER_LIMIT_BYTES: u32 = 16 << 10;

/// Streams that were reset by the caller before they were looked at: more end the connection (HTTP/2 rapid
/// reset, CVE-2023-44487).
pub const RESETS_PENDING: usize = 20;

/// How long a call may go on after a certificate of its connection has run out.
pub const EXPIRED_GRACE: Duration = Duration::from_secs(5);

/// The same for a hand-over, which is bounded by its own limits for each phase.
pub const HAND_OVER_GRACE: Duration = Duration::from_secs(3600);

/// How long a caller may take for the first message of a stream that it has opened.
pub const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// How much a caller of this role may hold of a server.
pub(crate) fn allowance(role: Option<&Role>) -> Allowance {
    match role {
        // All operators, and the command line, are one caller. They share a connection for all calls to a
        // node: one Watch, and a stream for each migration.
        Some(Role::Operator) => {
            Allowance { connections: 64, calls: 4096, calls_of_a_connection: 1024, window_bytes: 2 << 20 }
        }
        // A source has a connection for each blob and each further channel, and one for the decisions.
        Some(Role::Agent { .. }) => Allowance {
            connections: 512,
            calls: 1024,
            calls_of_a_connection: 8,
            window_bytes: STREAM_WINDOW_BYTES,
        },
        None => Allowance { connections: 4, calls: 4, calls_of_a_connection: 1, window_bytes: 64 << 10 },
    }
}

/// A client of an agent's own service that refuses answers above [`ANSWER_LIMIT_BYTES`].
pub fn node_client(channel: Channel) -> NodeAgentClient<Channel> {
    NodeAgentClient::new(channel)
        .max_decoding_message_size(ANSWER_LIMIT_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES)
}

/// A server of an agent's own service that refuses requests above [`MESSAGE_LIMIT_BYTES`].
pub fn node_server<N: NodeAgent>(service: N) -> NodeAgentServer<N> {
    NodeAgentServer::new(service)
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
        .max_encoding_message_size(ANSWER_LIMIT_BYTES)
}

/// A client of the agent-to-agent service that refuses messages above [`MESSAGE_LIMIT_BYTES`].
pub fn transfer_client(channel: Channel) -> TransferClient<Channel> {
    TransferClient::new(channel)
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES)
}

/// A server of the agent-to-agent service that refuses messages above [`MESSAGE_LIMIT_BYTES`].
pub fn transfer_server<T: Transfer>(service: T) -> TransferServer<T> {
    TransferServer::new(service)
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES)
}

/// A client of the VMM contract that refuses messages above [`MESSAGE_LIMIT_BYTES`].
pub fn vmm_client(channel: Channel) -> VmmClient<Channel> {
    VmmClient::new(channel)
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES)
}

/// A server of the VMM contract that refuses messages above [`MESSAGE_LIMIT_BYTES`].
pub fn vmm_server<V: Vmm>(service: V) -> VmmServer<V> {
    VmmServer::new(service)
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES)
}
