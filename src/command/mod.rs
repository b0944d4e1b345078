//! What the program does besides serving; each prints what it did and ends.

pub mod token;
