"""A sequence's record on the device: which of its int32 words is what."""

from __future__ import annotations

RECORD_WORDS = 16

# `token` is the newest one; `position` is that of the next to run; `generated` counts the tokens
# drawn; `stream` takes two words, the lower first; then the bits of float32 numbers and top_k;
# `adjusted` is the row of the sampler's adjustments that holds for it, or -1.
RECORD = {
    "token": 0,
    "position": 1,
    "generated": 2,
    "flags": 3,
    "stream": 4,
    "temperature": 6,
    "top_k": 7,
    "top_p": 8,
    "min_p": 9,
    "adjusted": 10,
}

# The step ends by drawing a token for it.
FLAG_SAMPLES = 1
# What it runs next is stored in the cache; after one step it is always.
FLAG_WRITES = 2
