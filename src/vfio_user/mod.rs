//! vfio-user, the server's side: messages and the sessions that they make up, over any [`Transport`].
//!
//! It follows the vfio-user protocol specification, QEMU's `docs/interop/vfio-user.rst`, to whose sections the names here
//! refer; and for the flags of DMA_MAP that came later, libvfio-user. Nothing here knows what the device is: that is
//! whoever implements [`Device`].
//!
//! A message is as long as its header says. So what a client sends beyond the structure of a command is read and ignored,
//! what is too short for it is refused, and either way the next message begins where it should. Every command is answered,
//! if with an error number, unless its client wants no answer.

mod client_memory;
mod device;
mod irq;
mod message;
mod region;
mod session;
mod transport;
mod version;

pub use client_memory::ClientMemory;
pub use device::{Backing, Device, DmaMap, IrqAction, IrqData, IrqInfo, IrqSet, Refused};
pub use message::{MAX_DATA, MAX_FDS, MAX_MESSAGE};
pub use session::serve;
pub use transport::{Descriptors, Lost, Transport};
