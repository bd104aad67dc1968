//! Reports made of traces and of guests' results. Nothing here reads the live device.

pub mod audit;
pub mod merge;
pub mod results;
