//! Slackwater's gRPC services, and all that knows tonic: channels, servers, TLS and who the caller is.

#![forbid(unsafe_code)]

pub use tonic;

/// The generated messages, clients and servers. Units, errors and meanings stand in the .proto files.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, clippy::pedantic)]
mod generated {
    pub mod node {
        tonic::include_proto!("slackwater.node.v1");
    }
    pub mod transfer {
        tonic::include_proto!("slackwater.transfer.v1");
    }
    pub mod vmm {
        tonic::include_proto!("slackwater.vmm.v1");
    }
}

pub use generated::{node, transfer, vmm};
