//! Blobs on the wire: each device's state, and the VMM's own, as one gRPC stream each.
//!
//! ```text
//! source                                                            destination
//! data fd ─▶ worker ─Bytes─▶ [2] ─▶ outgoing ─ header, chunks, trailer ▶ incoming ─Bytes─▶ worker ─▶ data fd
//!                                   offset, digest                      offset, length, digest
//! ```
//!
//! At most a handful of chunks of [`CHUNK_MAX_BYTES`] is in memory at either end, whatever the blob's size: a
//! full channel stops the reader, a full HTTP/2 window stops the channel, and a slow device stops the window.
//! A chunk's bytes are never copied between the read and the TLS record. TLS already authenticates every
//! record; the digest guards against what happens at the ends: a chunk lost, doubled, reordered or cut by our
//! own code (I5).

pub mod channel;
pub mod check;
pub mod flow;
pub mod incoming;
pub mod outgoing;

/// The most bytes in a chunk.
pub use slackwater_proto::limits::CHUNK_LIMIT_BYTES as CHUNK_MAX_BYTES;
