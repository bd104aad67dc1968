//! What must hold for hours, tested with a real `viommu serve`: briefly in an ordinary run, and at length by
//! `make soak`.

mod budget;
mod churn;
pub mod daemon;
mod image;
mod memory;
mod peers;
mod race;
