"""brainfusion."""
