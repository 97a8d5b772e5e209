"""Models from hubs: which files, over which protocol, into which folder; no torch, no engine."""
