//! Tests without a socket: the address space, and the documents, the source and the kernel series as files.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod address_space;
mod address_space_stress;
mod documents;
mod kernel_series;
mod walls;
