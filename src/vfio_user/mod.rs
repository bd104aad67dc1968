//! The server's side of vfio-user: messages, and the sessions that they make up, over any [`Transport`].
//!
//! It follows the vfio-user protocol specification, QEMU's `docs/interop/vfio-user.rst`. The names in quotation marks
//! here are its sections. For the flags of DMA_MAP that came later it follows libvfio-user. Nothing here knows what the
//! device is: that is up to the implementation of [`Device`].
//!
//! A message is as long as its header says. Bytes beyond the structure of a command are read and ignored, and a message
//! that is too short for its structure is refused. Either way the next message begins where it should. Every command is
//! answered, if need be with an error number, unless its client wants no answer.

mod client_memory;
mod device;
mod irq;
mod message;
mod region;
mod session;
mod transport;
mod version;

pub use client_memory::ClientMemory;
pub use device::{Backing, Device, DmaMap, IrqAction, IrqData, IrqInfo, IrqSet, Refused, RegionMemory};
pub use message::{MAX_DATA, MAX_FDS, MAX_MESSAGE};
pub use session::serve;
pub use transport::{Descriptors, Lost, Transport};
