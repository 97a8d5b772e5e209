"""Octavo: an LLM serving engine with a paged KV cache, and the operator that scales it."""

__version__ = "0.1.0"
