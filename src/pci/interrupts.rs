//! The interrupts of a function. The client gives an eventfd for each vector, or one for the pin.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, RwLock, Weak};

use super::pin::{Pin, PinSource, Unmasker};
use crate::sync::{lock, unpoisoned};
use viommu_socket::set_nonblocking;
use viommu_trace::{Event, Tracer};

/// The kind of message that a vector sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum VectorKind {
    Msi,
    Msix,
}

/// One vector.
#[derive(Default)]
struct Line {
    sink: Option<File>,
    masked: bool,
    /// It was triggered while masked.
    pending: bool,
}

/// The vectors of both kinds. A driver uses one kind at a time.
#[derive(Default)]
struct Lines {
    msi: Vec<Mutex<Line>>,
    msix: Vec<Mutex<Line>>,
    /// The vectors that the function masks for MSI, a bit each.
    msi_mask: u32,
}

struct Shared {
    endpoint: u32,
    tracer: Tracer,
    lines: RwLock<Lines>,
    pin: Pin,
}

/// Sends interrupts to the guest. Clones send to the same function's vectors. The default sends nothing.
#[derive(Clone, Default)]
pub struct Interrupts(Option<Arc<Shared>>);

impl Interrupts {
    pub(super) fn new(endpoint: u32, tracer: Tracer) -> Self {
        Interrupts(Some(Arc::new(Shared { endpoint, tracer, lines: RwLock::default(), pin: Pin::default() })))
    }

    /// Sends the interrupt `vector`. A vector that the guest has disabled is not sent, and one that it has masked is
    /// sent when it is unmasked. With MSI, only the low bits of the number count if the guest has enabled fewer vectors
    /// than the function has, and nothing is sent while [`Interrupts::mask_msi`] masks the vector. With the pin, the
    /// model's reasons decide and not the vector: see [`Interrupts::set_pin_source`].
    pub fn trigger(&self, vector: u16) {
        let Some(shared) = &self.0 else { return };
        if shared.pin.is_assigned() {
            return shared.pin_sent(shared.pin.update());
        }
        let lines = unpoisoned(shared.lines.read());
        let (line, vector) = if lines.msi.is_empty() {
            (lines.msix.get(usize::from(vector)), vector)
        } else if lines.masks_msi(vector) {
            return;
        } else {
            let low = usize::from(vector) % lines.msi.len();
            (lines.msi.get(low), low as u16)
        };
        if let Some(line) = line {
            shared.send(&mut lock(line), vector);
        }
    }

    /// Masks those of the function's first 32 vectors whose bits are set, and unmasks all others, for a function with
    /// mask registers of its own. This mask comes before MSI's and the pin's: it uses the function's numbers of the
    /// vectors, and a masked vector that is triggered does not become pending. After this returns, no masked vector is
    /// sent. MSI-X is not affected.
    ///
    /// Returns the vectors that this call unmasked; none without MSI. The function must trigger those that still have a
    /// reason. The pin asks for the reasons itself.
    pub fn mask_msi(&self, vectors: u32) -> u32 {
        let Some(shared) = &self.0 else { return 0 };
        shared.pin_sent(shared.pin.mask_vectors(vectors));
        let mut lines = unpoisoned(shared.lines.write());
        let before = std::mem::replace(&mut lines.msi_mask, vectors);
        if lines.msi.is_empty() { 0 } else { before & !vectors }
    }

    /// Sets the model that is asked for the level of the interrupt pin as long as it exists. No lock that its answer
    /// takes may be held during a call of these interrupts.
    pub fn set_pin_source(&self, source: Weak<dyn PinSource>) {
        let Some(shared) = &self.0 else { return };
        shared.pin.set_source(source);
    }

    /// Notes that the level of the pin may have changed without a vector to send. A level that fell need not be
    /// reported.
    pub fn level_changed(&self) {
        let Some(shared) = &self.0 else { return };
        shared.pin_sent(shared.pin.update());
    }

    /// Whether interrupts go through the pin.
    pub fn use_pin(&self) -> bool {
        self.0.as_ref().is_some_and(|shared| shared.pin.is_used())
    }

    /// Whether the pin is asserted: Interrupt Status in the status register.
    pub(super) fn pin_is_asserted(&self) -> bool {
        self.0.as_ref().is_some_and(|shared| shared.pin.is_asserted())
    }

    /// Follows Interrupt Disable in the command register.
    pub(super) fn disable_pin(&self, disabled: bool) {
        let Some(shared) = &self.0 else { return };
        shared.pin_sent(shared.pin.disable(disabled));
    }

    /// Masks or unmasks the pin.
    pub(super) fn mask_pin(&self, masked: bool) {
        let Some(shared) = &self.0 else { return };
        shared.pin_sent(shared.pin.mask(masked));
    }

    /// Sets the eventfd that the pin sends to; `None` removes it. A client that gives one no longer uses messages.
    pub(super) fn assign_pin(&self, sink: Option<File>) {
        let Some(shared) = &self.0 else { return };
        if sink.is_some() {
            self.disable(VectorKind::Msi);
            self.disable(VectorKind::Msix);
        }
        shared.pin_sent(shared.pin.assign(sink));
    }

    /// Makes the pin send an event, whatever its level is.
    pub(super) fn trigger_pin(&self) {
        let Some(shared) = &self.0 else { return };
        shared.pin_sent(shared.pin.trigger());
    }

    /// Unmasks the pin whenever `event` is signalled; `None` ends that.
    ///
    /// # Errors
    /// EINVAL if `event` cannot be waited for, or the system's error.
    pub(super) fn unmask_pin_by(&self, event: Option<File>) -> io::Result<()> {
        let Some(shared) = &self.0 else { return Ok(()) };
        let unmasker = event.map(|event| Unmasker::start(self.clone(), event)).transpose()?;
        shared.pin.set_unmasker(unmasker);
        Ok(())
    }

    /// Sets the eventfds that the vectors `start..` of a kind send to; `None` removes one. A client that gives some no
    /// longer uses the pin.
    pub(super) fn assign(&self, kind: VectorKind, start: usize, sinks: impl Iterator<Item = Option<File>>) {
        let Some(shared) = &self.0 else { return };
        let sinks: Vec<Option<File>> = sinks.collect();
        if sinks.iter().any(Option::is_some) {
            self.assign_pin(None);
        }
        let mut lines = unpoisoned(shared.lines.write());
        let lines = lines.of(kind);
        for (number, sink) in (start..).zip(sinks) {
            let sink = sink.filter(|sink| {
                // A client may give any descriptor, and a write to it must not block a model's thread.
                set_nonblocking(sink).inspect_err(|e| log::warn!("Interrupt {number} is not usable: {e}")).is_ok()
            });
            if lines.len() <= number {
                if sink.is_none() {
                    continue;
                }
                lines.resize_with(number + 1, Mutex::default);
            }
            if let Some(line) = lines.get(number) {
                lock(line).sink = sink;
            }
        }
        // The number of enabled MSI vectors is the number with a descriptor.
        while lines.last().is_some_and(|line| lock(line).sink.is_none()) {
            lines.pop();
        }
    }

    /// Removes the descriptors of all vectors of a kind.
    pub(super) fn disable(&self, kind: VectorKind) {
        let Some(shared) = &self.0 else { return };
        unpoisoned(shared.lines.write()).of(kind).clear();
    }

    /// Masks or unmasks a vector. If it was triggered while masked, unmasking sends it.
    pub(super) fn mask(&self, kind: VectorKind, vector: usize, masked: bool) {
        let Some(shared) = &self.0 else { return };
        let mut lines = unpoisoned(shared.lines.write());
        let Some(line) = lines.of(kind).get(vector) else { return };
        let mut line = lock(line);
        line.masked = masked;
        if !masked && std::mem::take(&mut line.pending) {
            shared.send(&mut line, vector as u16);
        }
    }

    /// The pending bits of the 64 MSI-X vectors from `first` on.
    pub(super) fn pending(&self, first: usize) -> u64 {
        let Some(shared) = &self.0 else { return 0 };
        let lines = unpoisoned(shared.lines.read());
        let vectors = lines.msix.iter().skip(first).take(64).enumerate();
        vectors.fold(0, |bits, (bit, line)| bits | u64::from(lock(line).pending) << bit)
    }
}

impl Shared {
    /// Traces an event of the pin, if one was sent.
    fn pin_sent(&self, sent: bool) {
        if sent {
            self.tracer.emit(Event::Interrupt { endpoint: Some(self.endpoint), vector: 0 });
        }
    }

    fn send(&self, line: &mut Line, vector: u16) {
        if line.masked {
            line.pending = true;
            return;
        }
        let Some(sink) = &mut line.sink else { return };
        // A full counter means that the client has not seen an earlier interrupt yet, so none is lost.
        match sink.write(&1u64.to_ne_bytes()) {
            Ok(_) => self.tracer.emit(Event::Interrupt { endpoint: Some(self.endpoint), vector }),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                log::warn!("Endpoint {:#x}: interrupt {vector} was not sent: {error}", self.endpoint);
                line.sink = None;
            }
        }
    }
}

impl Lines {
    fn of(&mut self, kind: VectorKind) -> &mut Vec<Mutex<Line>> {
        match kind {
            VectorKind::Msi => &mut self.msi,
            VectorKind::Msix => &mut self.msix,
        }
    }

    /// Whether the function masks a vector for MSI. Vectors from 32 on have no bit.
    fn masks_msi(&self, vector: u16) -> bool {
        self.msi_mask.checked_shr(u32::from(vector)).is_some_and(|bits| bits & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{FromRawFd, IntoRawFd};
    use vmm_sys_util::eventfd::EventFd;

    fn sink(event: &EventFd) -> Option<File> {
        let copy = event.try_clone().unwrap();
        // SAFETY: the descriptor was just given up by its owner.
        Some(unsafe { File::from_raw_fd(copy.into_raw_fd()) })
    }

    fn events(count: usize) -> Vec<EventFd> {
        (0..count).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect()
    }

    #[test]
    fn a_masked_vector_is_sent_when_unmasked() {
        let interrupts = Interrupts::new(8, Tracer::default());
        let event = &events(1)[0];
        interrupts.assign(VectorKind::Msix, 3, [sink(event)].into_iter());
        interrupts.mask(VectorKind::Msix, 3, true);
        interrupts.trigger(3);
        interrupts.trigger(3);
        assert_eq!(interrupts.pending(0), 1 << 3);
        assert!(event.read().is_err());
        interrupts.mask(VectorKind::Msix, 3, false);
        assert_eq!(event.read().unwrap(), 1);
        assert_eq!(interrupts.pending(0), 0);
    }

    #[test]
    fn msi_vectors_fold_onto_the_enabled_ones() {
        let interrupts = Interrupts::new(8, Tracer::default());
        let events = events(2);
        interrupts.assign(VectorKind::Msi, 0, events.iter().map(sink));
        interrupts.trigger(5);
        assert_eq!(events[1].read().unwrap(), 1);
        interrupts.disable(VectorKind::Msi);
        interrupts.trigger(5);
        assert!(events[1].read().is_err());
    }

    #[test]
    fn a_function_masks_msi_by_its_own_numbers() {
        let interrupts = Interrupts::new(8, Tracer::default());
        let (msi, msix) = (events(2), events(1));
        interrupts.assign(VectorKind::Msix, 0, msix.iter().map(sink));
        assert_eq!(interrupts.mask_msi(1 << 5), 0);
        interrupts.trigger(0);
        assert_eq!(msix[0].read().unwrap(), 1);
        assert_eq!(interrupts.mask_msi(0), 0, "MSI-X masked nothing");
        interrupts.assign(VectorKind::Msi, 0, msi.iter().map(sink));
        interrupts.mask_msi(1 << 5 | 1 << 31);
        interrupts.trigger(5);
        assert!(msi[1].read().is_err());
        // Both fold onto the same one; the last has no bit.
        for vector in [3, 32 + 5] {
            interrupts.trigger(vector);
            assert_eq!(msi[1].read().unwrap(), 1, "{vector}");
        }
        assert_eq!(interrupts.mask_msi(1 << 31 | 1), 1 << 5);
        assert!(msi[1].read().is_err(), "whether it still has a reason is the function's to say");
        interrupts.trigger(5);
        assert_eq!(msi[1].read().unwrap(), 1);
    }

    #[test]
    fn a_descriptor_that_is_full_does_not_block() {
        let interrupts = Interrupts::new(8, Tracer::default());
        let event = EventFd::new(0).unwrap();
        event.write(u64::MAX - 1).unwrap();
        interrupts.assign(VectorKind::Msix, 0, [sink(&event)].into_iter());
        interrupts.trigger(0);
        assert_eq!(event.read().unwrap(), u64::MAX - 1);
    }
}
