//! What must hold for hours, tried at a real `viommu serve`: in a short form here, and for long by `make soak`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod budget;
mod churn;
mod daemon;
mod image;
mod memory;
mod peers;
mod race;
