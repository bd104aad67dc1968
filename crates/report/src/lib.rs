//! What reads traces, and the results of guests, and never the live device.

pub mod merge;
pub mod results;
