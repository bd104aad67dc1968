//! The split alloc/map protocol, rule by rule of `docs/split-protocol.md`, over a real vhost-user socket.

mod coverage;
mod hostile;
mod injected;
mod lifetimes;
mod many;
mod model;
mod order;
mod rules;
mod traced;
