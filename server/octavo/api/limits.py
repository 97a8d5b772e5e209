"""Bounds on what one request may ask of the API process, all in one place."""

from __future__ import annotations

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_HEADER_BYTES = 64 * 1024
MAX_JSON_DEPTH = 64
MAX_MESSAGES = 1024
MAX_PROMPTS = 64
MAX_ERROR_CHARS = 500
MAX_REQUEST_ID_CHARS = 128
BODY_TIMEOUT_S = 30.0
KEEP_ALIVE_S = 75
# A client that does not read for this long, with its socket buffer full, is given up.
SEND_STALL_S = 60.0
# Work in the engine and no step for this long: it hangs.
ENGINE_HUNG_S = 60.0
# A body above this is decoded in a thread, so that the other streams go on.
LARGE_BODY_BYTES = 64 * 1024
