//! vfio-user: messages of any kind over a socket and over pipes, and the messages of real clients in their order.

mod client_memory;
mod clients;
mod dma;
mod interrupts;
mod memo;
mod messages;
mod pipes;
mod versions;
