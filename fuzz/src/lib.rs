//! What the fuzz targets have in common: an input as a supply of numbers, and a machine for a device model.

mod input;
mod machine;

pub use input::Input;
pub use machine::{Machine, PAGE, PAGES};
