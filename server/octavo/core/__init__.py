"""The engine's decisions: sequences, blocks, scheduling. Integers in, integers out."""
