"""The process that owns the sockets: OpenAI routes, probes, streams."""
