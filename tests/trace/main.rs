//! The trace socket, and what is written to it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

mod clients;
mod command;
mod documentation;
mod files;
mod losses;
mod recipes;
mod server;
mod state;
mod threads;
