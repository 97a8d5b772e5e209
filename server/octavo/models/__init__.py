"""Decoders, described by a spec."""
