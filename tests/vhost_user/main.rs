//! The IOMMU over a real vhost-user socket, with a test in place of the driver, and guest memory.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod conformance;
mod descriptors;
mod kick_descriptors;
mod memory;
mod poller;
mod split;
