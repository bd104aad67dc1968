//! What must hold for hours, tried at a real `viommu serve`: in a short form here, and for long by `make soak`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "../split/requests.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod requests;

mod budget;
mod churn;
mod daemon;
mod image;
mod memory;
mod peers;
mod race;
