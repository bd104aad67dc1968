//! The split alloc/map protocol, rule by rule of `docs/split-protocol.md`, over a real vhost-user socket.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod coverage;
mod hostile;
mod injected;
mod many;
mod model;
mod order;
mod requests;
mod rules;
mod traced;
