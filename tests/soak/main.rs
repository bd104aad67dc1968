//! What must hold for hours, tested with a real `viommu serve`: briefly in an ordinary run, and at length by
//! `make soak`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod budget;
mod churn;
mod daemon;
mod image;
mod memory;
mod peers;
mod race;
