//! What a host program has not yet taken of a connection: a ring of fixed capacity that exists once it is needed.

use vm_memory::VolatileSlice;

/// A ring of bytes.
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: Box<[u8]>,
    first: usize,
    length: usize,
}

impl Buffer {
    /// Bytes in it.
    pub const fn len(&self) -> usize {
        self.length
    }

    /// Nothing is in it.
    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Takes the bytes of `slice`. False, and nothing is taken, if they are more than `capacity` leaves room for;
    /// `capacity` is the same every time.
    pub fn push(&mut self, slice: &VolatileSlice<'_>, capacity: usize) -> bool {
        if slice.len() > capacity - self.length {
            return false;
        }
        if self.bytes.is_empty() {
            // Zeroed pages that the kernel only hands out as they are filled.
            self.bytes = vec![0; capacity].into_boxed_slice();
        }
        let end = (self.first + self.length) % capacity;
        let front = slice.len().min(capacity - end);
        // Both parts lie within the slice, whose whole length they are.
        slice.copy_to(&mut self.bytes[end..end + front]);
        if let Ok(rest) = slice.offset(front) {
            rest.copy_to(&mut self.bytes[..slice.len() - front]);
        }
        self.length += slice.len();
        true
    }

    /// All bytes, in order.
    pub fn parts(&self) -> [&[u8]; 2] {
        let front = self.length.min(self.bytes.len() - self.first);
        [
            &self.bytes[self.first..self.first + front],
            &self.bytes[..self.length - front],
        ]
    }

    /// Drops the first `count` bytes, which must be there.
    pub fn consume(&mut self, count: usize) {
        self.length -= count;
        self.first = if self.length == 0 {
            0
        } else {
            (self.first + count) % self.bytes.len()
        };
    }

    /// Drops everything, and the memory.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(buffer: &mut Buffer, bytes: &mut [u8]) -> bool {
        buffer.push(&VolatileSlice::from(bytes), 16)
    }

    #[test]
    fn behaves_as_a_queue() {
        let mut buffer = Buffer::default();
        assert_eq!(buffer.parts(), [&[] as &[u8]; 2]);
        let mut model = std::collections::VecDeque::new();
        for step in 0..1000usize {
            let mut bytes: Vec<u8> = (0..step % 7).map(|at| (step + at) as u8).collect();
            let fits = model.len() + bytes.len() <= 16;
            assert_eq!(push(&mut buffer, &mut bytes), fits);
            if fits {
                model.extend(bytes);
            }
            assert_eq!(
                buffer.parts().concat(),
                model.iter().copied().collect::<Vec<_>>()
            );
            let count = (step % 5).min(model.len());
            buffer.consume(count);
            model.drain(..count);
            assert_eq!(buffer.len(), model.len());
        }
        buffer.clear();
        assert!(buffer.is_empty());
    }
}
