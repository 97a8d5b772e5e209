"""How attention on a GPU is cut and run, by what the host knows of a step; measured on an H100."""

from __future__ import annotations

from dataclasses import dataclass

# So many decodes are multiplied with weights by the kernel that reads them ahead (cuda_gemm.py).
# It takes half of a multiprocessor's shared memory, and attention before it must leave that free.
_FEW_DECODES = 16
# Of one sequence. Where many fill the device one needs fewer; that also bounds the buffers.
_MOST_CHUNKS, _MOST_CHUNKS_OF_MANY = 128, 32
# Under the deterministic profile: between what is best for few decodes and for many.
_FIXED_CHUNK, _FIXED_ITEMS = 512, 256
# Where few tiles of prefill leave the device idle, their keys are split into spans of so many or
# more.
MIN_SPAN = 512


@dataclass(frozen=True, slots=True)
class DecodeSetting:
    """A sequence is cut into chunks of `chunk` tokens, a multiple of 64, or where that were more
    than `max_chunks` into so many of equal size, rounded up to 64. `stages`: tiles of a warp in
    shared memory, 0 is what suits the head dim; `blocks_per_sm`: at most so many, 0 is as fit.
    Results' bits depend on the first two alone.
    """

    chunk: int
    max_chunks: int
    stages: int = 0
    blocks_per_sm: int = 0


def decode_setting(
    num_decodes: int,
    columns: int,
    dim: int,
    max_seq_len: int,
    multiprocessors: int,
    deterministic: bool,
) -> DecodeSetting:
    """For a step of `num_decodes`; `columns` blocks read each of their chunks, one a key head or
    more. With `deterministic` the cut does not depend on the number of decodes.

    Long chunks are read fastest (256 decodes of 1,024 tokens, 8 key heads of 128: 361 us, with
    chunks of 256 tokens 391), where there is one for every block. One decode is read fastest by
    as many blocks as can be (6.9 us, with chunks of 512 tokens 10). Between the two, chunks are
    such that 1,024 tokens of each sequence occupy the blocks of two to a multiprocessor.
    """
    load, blocks = num_decodes * columns, 2 * multiprocessors
    many = load >= blocks
    few = not many and num_decodes <= _FEW_DECODES
    if deterministic:
        chunk, most = _FIXED_CHUNK, min(_MOST_CHUNKS_OF_MANY, _FIXED_ITEMS // columns)
    elif many:
        chunk, most = 1024, min(_MOST_CHUNKS_OF_MANY, blocks // columns)
    else:
        chunk = next((c for c in (128, 256) if load * 1024 <= blocks * c), 512)
        # One alone is spread evenly; of several one may be much longer than the others.
        most = (multiprocessors if num_decodes == 1 else blocks) // columns
    max_chunks = max(1, min(most, _MOST_CHUNKS, -(-max_seq_len // chunk)))
    if few:
        return DecodeSetting(chunk, max_chunks, stages=2 if dim > 64 else 4, blocks_per_sm=1)
    return DecodeSetting(chunk, max_chunks)


@dataclass(frozen=True, slots=True)
class PrefillSetting:
    """`min_span`: the fewest keys of a span where keys are split, 0: never. `warpgroups`: Hopper's
    own kernel, where the GPU and the head dim have it. With 0 and False a query's bits depend on
    its own keys alone; otherwise also on how full the step is and how long its longest chunk.
    """

    min_span: int = MIN_SPAN
    warpgroups: bool = False


def prefill_setting(
    max_query_len: int, max_seq_len: int | None, deterministic: bool
) -> PrefillSetting:
    """For a step whose longest chunk has `max_query_len` queries and whose longest sequence with a
    chunk `max_seq_len` tokens; None: not known.

    Hopper's kernel has larger tiles and a multiprocessor for each: 64 queries without a prefix
    take 9.0 us, by the kernel for all 6.9; 256 take 11.3 and 14.9, and 64 after 2,048 tokens 21
    and 30. Where no sequence is long enough for two spans, 1 us is saved by not looking for them.
    """
    if deterministic:
        return PrefillSetting(min_span=0, warpgroups=False)
    long_prefix = max_seq_len is None or max_seq_len >= 2 * max_query_len
    short = max_seq_len is not None and max_seq_len <= MIN_SPAN
    return PrefillSetting(
        min_span=0 if short else MIN_SPAN,
        warpgroups=max_query_len >= (64 if long_prefix else 128),
    )
