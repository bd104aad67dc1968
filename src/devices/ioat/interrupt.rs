//! The channel's interrupt.

use serde::{Deserialize, Serialize};

/// Master enable. Reading INTRCTRL clears it, so that a handler is not interrupted once it has begun.
const MASTER: u8 = 1 << 0;
/// ATTNSTATUS is not zero.
const STATUS: u8 = 1 << 1;
/// Both of the above.
const INTERRUPT: u8 = 1 << 2;
/// Each channel has its own MSI-X vector.
const VECTOR_PER_CHANNEL: u8 = 1 << 3;

/// The interrupt. It is sent once each time that software arms it. One that becomes due before that is kept.
///
/// Either enable bit of INTRCTRL lets a message through. On hardware the master enable is for INTx and MSI, where one
/// handler serves all channels. Drivers that use a vector per channel leave it off. The pin is asserted while there is
/// an interrupt and the master enable is on.
#[derive(Default, Serialize, Deserialize)]
pub struct Interrupt {
    enable: u8,
    sent: bool,
    due: bool,
    attention: bool,
    /// Whether it is to be sent now.
    #[serde(skip)]
    message: bool,
}

impl Interrupt {
    /// Resets the channel's part: an interrupt that was due is dropped.
    pub fn reset_channel(&mut self) {
        self.due = false;
        self.sent = false;
    }

    /// Notes a reason for an interrupt.
    pub fn raise(&mut self) {
        self.due = true;
        self.send();
    }

    /// Arms it: software has seen the last one.
    pub fn arm(&mut self) {
        self.sent = false;
        self.send();
    }

    /// Whether it was sent and not armed since.
    pub fn is_disarmed(&self) -> bool {
        self.sent
    }

    /// Writes INTRCTRL.
    pub fn write_control(&mut self, value: u8) {
        self.enable = value & (MASTER | VECTOR_PER_CHANNEL);
        self.send();
    }

    /// INTRCTRL.
    pub fn control(&self) -> u8 {
        let status = if self.attention { STATUS } else { 0 };
        let both = if self.attention && self.enable & MASTER != 0 { INTERRUPT } else { 0 };
        self.enable | status | both
    }

    /// Notes that INTRCTRL was read.
    pub fn control_was_read(&mut self) {
        self.enable &= !MASTER;
    }

    /// ATTNSTATUS.
    pub fn attention(&self) -> u32 {
        u32::from(self.attention)
    }

    /// Notes that ATTNSTATUS was read, which clears it.
    pub fn attention_was_read(&mut self) {
        self.attention = false;
    }

    /// Takes the message: returns true once for each that is to be sent.
    pub fn take_message(&mut self) -> bool {
        std::mem::take(&mut self.message)
    }

    /// Whether the pin is asserted.
    pub fn pin(&self) -> bool {
        self.control() & INTERRUPT != 0
    }

    /// Whether this state is possible.
    pub fn is_possible(&self) -> bool {
        self.enable & !(MASTER | VECTOR_PER_CHANNEL) == 0
    }

    fn send(&mut self) {
        if self.due && !self.sent && self.enable != 0 {
            self.due = false;
            self.sent = true;
            self.attention = true;
            self.message = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enabled() -> Interrupt {
        let mut interrupt = Interrupt::default();
        interrupt.write_control(VECTOR_PER_CHANNEL);
        interrupt
    }

    #[test]
    fn one_is_sent_for_each_arming() {
        let mut interrupt = enabled();
        interrupt.raise();
        assert!(interrupt.is_disarmed());
        interrupt.raise();
        interrupt.raise();
        interrupt.arm();
        assert!(interrupt.is_disarmed());
        interrupt.arm();
        assert!(!interrupt.is_disarmed());
    }

    #[test]
    fn one_that_is_due_waits_for_an_enable() {
        let mut interrupt = Interrupt::default();
        interrupt.raise();
        assert!(!interrupt.is_disarmed());
        assert_eq!(interrupt.attention(), 0);
        assert!(!interrupt.take_message());
        interrupt.write_control(MASTER);
        assert!(interrupt.is_disarmed());
        assert_eq!((interrupt.take_message(), interrupt.take_message()), (true, false));
    }

    #[test]
    fn a_handler_finds_out_what_it_is_for() {
        let mut interrupt = Interrupt::default();
        interrupt.write_control(MASTER);
        assert_eq!(interrupt.control(), MASTER);
        interrupt.raise();
        assert_eq!(interrupt.control(), MASTER | STATUS | INTERRUPT);
        interrupt.control_was_read();
        assert_eq!(interrupt.control(), STATUS);
        assert_eq!(interrupt.attention(), 1);
        interrupt.attention_was_read();
        // After INTRCTRL was read, nothing is sent until it is written.
        interrupt.arm();
        interrupt.raise();
        assert!(!interrupt.is_disarmed());
        interrupt.write_control(MASTER | STATUS | INTERRUPT);
        assert!(interrupt.is_disarmed());
    }

    #[test]
    fn the_pin_is_asserted_until_the_handler_takes_over() {
        let mut interrupt = enabled();
        interrupt.raise();
        assert!(!interrupt.pin(), "the master enable is off");
        interrupt.write_control(MASTER);
        assert!(interrupt.pin());
        interrupt.control_was_read();
        assert!(!interrupt.pin());
        // Before ATTNSTATUS is read, the pin is asserted again as soon as the master enable is on.
        interrupt.write_control(MASTER);
        assert!(interrupt.pin());
        interrupt.attention_was_read();
        assert!(!interrupt.pin());
        interrupt.arm();
        interrupt.raise();
        assert!(interrupt.pin());
    }
}
