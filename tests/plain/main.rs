//! What needs no socket: the address space, and what is said of the source and of the kernel series.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod address_space;
mod address_space_stress;
mod kernel_series;
mod walls;
