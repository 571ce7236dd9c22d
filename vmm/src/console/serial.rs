//! The transmitting half of an 8250 at 0x3f8: what Linux' `earlyprintk=ttyS0`
//! needs. It is always ready, has no interrupt and receives nothing; Linux'
//! full driver does not take it for a UART, which saves its probe.

use super::Tail;

/// First port.
pub const PORT: u16 = 0x3f8;
/// Line status: transmitter empty, holding register empty.
const LINE_STATUS_IDLE: u8 = 0x60;
const LINE_STATUS: u16 = 5;
const LINE_CONTROL: u16 = 3;
/// The divisor replaces the data register.
const DIVISOR_ACCESS: u8 = 0x80;

/// The port's state.
pub struct EarlySerial {
    tail: Tail,
    line_control: u8,
}

impl EarlySerial {
    /// Prints to `tail`.
    pub fn new(tail: Tail) -> Self {
        Self {
            tail,
            line_control: 0,
        }
    }

    /// Whether `port` is one of its eight.
    pub fn covers(port: u16) -> bool {
        (PORT..PORT + 8).contains(&port)
    }

    /// The guest reads a register.
    pub fn read(&self, port: u16) -> u8 {
        match port.wrapping_sub(PORT) {
            LINE_STATUS => LINE_STATUS_IDLE,
            LINE_CONTROL => self.line_control,
            _ => 0,
        }
    }

    /// The guest writes a register.
    pub fn write(&mut self, port: u16, value: u8) {
        match port.wrapping_sub(PORT) {
            0 if self.line_control & DIVISOR_ACCESS == 0 => self.tail.push(&[value]),
            LINE_CONTROL => self.line_control = value,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_printed_and_the_divisor_is_not() {
        let tail = Tail::default();
        let mut serial = EarlySerial::new(tail.clone());
        assert_eq!(serial.read(PORT + 5) & 0x20, 0x20);
        serial.write(PORT + 3, 0x83);
        serial.write(PORT, b'x');
        serial.write(PORT + 3, 0x03);
        serial.write(PORT, b'y');
        assert_eq!(tail.text(), "y");
        assert_eq!(serial.read(PORT + 3), 3);
    }
}
