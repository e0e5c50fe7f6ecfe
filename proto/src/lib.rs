//! Slackwater's gRPC services, and all that knows tonic: channels, servers, TLS and who the caller is.
//!
//! | module | what it knows |
//! |---|---|
//! | [`node`], [`transfer`], [`vmm`] | the generated messages, clients and servers |
//! | [`convert`] | the core's types on the wire and back |
//! | [`refusal`] | a refused call on the wire and back: its reason, its message and its detail |
//! | [`identity`] | the role that a certificate names, and who may call what |
//! | [`tls`] | a certificate, its key and the CA, read from files |
//! | [`reload`], [`validity`] | certificates that are renewed, and how long one is valid |
//! | [`channel`] | connecting to an agent over TCP, or to a VMM over a Unix socket |
//! | [`server`] | serving over TCP with mutual TLS, or over a Unix socket |
//! | [`limits`] | message sizes, windows and keep-alive, the same at both ends |

#![forbid(unsafe_code)]

pub use prost;
pub use tonic;

mod accept;
mod admission;
pub mod channel;
mod connection;
pub mod convert;
pub mod identity;
pub mod limits;
pub mod refusal;
pub mod reload;
pub mod server;
pub mod tls;
mod tls_reason;
pub mod validity;
mod verifier;
mod watched_io;

/// The generated messages, clients and servers. The .proto files give units, errors and meanings.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, clippy::pedantic)]
mod generated {
    pub mod node {
        pub mod v1 {
            tonic::include_proto!("slackwater.node.v1");
        }
    }
    pub mod transfer {
        pub mod v1 {
            tonic::include_proto!("slackwater.transfer.v1");
        }
    }
    pub mod vmm {
        pub mod v1 {
            tonic::include_proto!("slackwater.vmm.v1");
        }
    }
}

pub use generated::node::v1 as node;
pub use generated::transfer::v1 as transfer;
pub use generated::vmm::v1 as vmm;
