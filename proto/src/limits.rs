//! Message sizes, windows and keep-alive: the same at both ends, so they are in one place.

use std::time::Duration;

use tonic::transport::Channel;

use crate::transfer::transfer_client::TransferClient;
use crate::transfer::transfer_server::{Transfer, TransferServer};
use crate::vmm::vmm_client::VmmClient;
use crate::vmm::vmm_server::{Vmm, VmmServer};

/// The most data that one chunk of a blob, or one piece of a VMM's state, may carry, in bytes.
pub const CHUNK_LIMIT_BYTES: usize = 1 << 20;

/// The largest message of the services that move state, in bytes: a full chunk and the fields around it.
pub const MESSAGE_LIMIT_BYTES: usize = CHUNK_LIMIT_BYTES + (16 << 10);

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
