//! The cage of the whole process.
