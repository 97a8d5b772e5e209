"""The memory ledger of a model on a device: what takes how much, whether it fits, what would.

Without torch. Weights and KV blocks are exact; activations and workspace are estimates
from above.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from octavo.kv_layout import KvGroups, kv_layout
from octavo.model_shape import ModelShape
from octavo.plan import (
    GIB,
    GRAPH_BYTES,
    GRAPH_TOKENS,
    MIB,
    KvShape,
    graph_pool_bytes,
    kv_bytes_per_block,
    large_step,
    token_bytes,
)

# What the driver reports as a device's total, in MiB.
GPU_MIB = {
    "a10": 23028, "a100-40": 40960, "a100-80": 81920, "b200": 183359, "h100": 81559,
    "h100-nvl": 95830, "h200": 143771, "l4": 23034, "l40s": 46068, "rtx-3090": 24576,
    "rtx-4090": 24564, "t4": 15360, "v100-16": 16384, "v100-32": 32768,
}  # fmt: skip

# The driver's context, loaded kernels, the matrix library's scratch memory.
WORKSPACE_BYTES = 640 * MIB
# A row of logits: as the matrix product gives it, in float32, and sorted with its indices.
LOGIT_BYTES = 4 + 4 + 8


@dataclass(slots=True, frozen=True)
class Request:
    """A device and the settings to plan for; names are those of the server's flags."""

    total_bytes: int
    dtype: str
    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    gpu_memory_utilization: float = 0.90


@dataclass(slots=True, frozen=True)
class Ledger:
    """Bytes by purpose. `num_blocks` is 0 when nothing is left for the KV cache.

    A block holds `layers_per_block` of the layers; `padding_bytes` of all KV bytes belong to none.
    """

    total_bytes: int
    usable_bytes: int
    weights_bytes: int
    activation_bytes: int
    workspace_bytes: int
    graph_bytes: int
    kv_bytes: int
    bytes_per_block: int
    num_blocks: int
    block_size: int
    max_model_len: int
    full_length_sequences: int
    kv_groups: int
    layers_per_block: int
    padding_bytes: int

    @property
    def fits(self) -> bool:
        """Whether at least one sequence of the longest length can run."""
        return self.full_length_sequences > 0

    def as_json(self) -> dict[str, Any]:
        """Every figure, and the verdict."""
        return {**asdict(self), "fits": self.fits}


def make_ledger(shape: ModelShape, weights_bytes: int, request: Request) -> Ledger:
    """Add up what the model takes and divide the rest into blocks."""
    layout = kv_layout(shape.windows, request.max_model_len)
    kv = KvShape(layout.layers_per_group, shape.num_kv_heads, shape.head_dim, request.dtype)
    groups = KvGroups(request.block_size, layout.windows)
    per_block = kv_bytes_per_block(kv, request.block_size)
    usable = int(request.total_bytes * request.gpu_memory_utilization)
    activations = activation_bytes(shape, request)
    captured = step_bytes(shape, request, min(largest_step(shape, request), GRAPH_TOKENS))
    graphs = GRAPH_BYTES + graph_pool_bytes(captured)
    left = usable - weights_bytes - activations - WORKSPACE_BYTES - graphs
    blocks = max(0, left // per_block - 1)  # one is the null block
    planes = layout.layers_per_group * groups.count
    return Ledger(
        total_bytes=request.total_bytes,
        usable_bytes=usable,
        weights_bytes=weights_bytes,
        activation_bytes=activations,
        workspace_bytes=WORKSPACE_BYTES,
        graph_bytes=graphs,
        kv_bytes=blocks * per_block,
        bytes_per_block=per_block,
        num_blocks=blocks,
        block_size=request.block_size,
        max_model_len=request.max_model_len,
        full_length_sequences=_full_length(blocks, groups, request),
        kv_groups=groups.count,
        layers_per_block=layout.layers_per_group,
        padding_bytes=blocks * per_block * layout.padded_layers // planes,
    )


def _full_length(blocks: int, groups: KvGroups, request: Request) -> int:
    """Sequences of the longest length at once, one of which is still in its prompt."""
    one = groups.blocks([request.max_model_len], chunk=request.max_num_batched_tokens)
    settled = groups.settled(request.max_model_len)
    return 0 if blocks < one else 1 + (blocks - one) // settled


def longest_length(shape: ModelShape, blocks: int, request: Request) -> int:
    """The longest sequence that so many blocks hold."""
    windows = kv_layout(shape.windows, request.max_model_len).windows
    groups, chunk = KvGroups(request.block_size, windows), request.max_num_batched_tokens
    return groups.longest(blocks, request.max_model_len, chunk=chunk)


def activation_bytes(shape: ModelShape, request: Request) -> int:
    """What a step's largest batch holds at once: its tokens' layers, its rows' logits."""
    rows = min(request.max_num_seqs, request.max_num_batched_tokens)
    tokens = largest_step(shape, request)
    return step_bytes(shape, request, tokens) + rows * shape.vocab_size * LOGIT_BYTES


def largest_step(shape: ModelShape, request: Request) -> int:
    """Tokens of a step that nobody's next token waits for."""
    each = step_bytes(shape, request, 1)
    windows = kv_layout(shape.windows, request.max_model_len).windows
    return large_step(request.max_num_batched_tokens, each, request.total_bytes, windows)


def step_bytes(shape: ModelShape, request: Request, tokens: int) -> int:
    """What so many tokens hold at once."""
    return tokens * token_bytes(
        hidden_size=shape.hidden_size,
        query_size=shape.num_heads * shape.head_dim,
        kv_size=shape.num_kv_heads * shape.head_dim,
        intermediate_size=shape.intermediate_size,
        dtype=request.dtype,
    )


def remedies(
    shape: ModelShape, weights_by_dtype: dict[str, int], request: Request
) -> Iterator[str]:
    """Settings, each alone, with which a model that does not fit would; the mildest first."""

    def fits(changed: Request) -> bool:
        return make_ledger(shape, weights_by_dtype[changed.dtype], changed).fits

    blocks = make_ledger(shape, weights_by_dtype[request.dtype], request).num_blocks
    most = longest_length(shape, blocks, request)
    if blocks and most and fits(replace(request, max_model_len=most)):
        yield f"--max-model-len {most}"
    for percent in range(int(request.gpu_memory_utilization * 100) + 1, 99):
        if fits(replace(request, gpu_memory_utilization=percent / 100)):
            yield f"--gpu-memory-utilization {percent / 100:g}"
            break
    for tokens in (1024, 512, 256):
        seqs = min(request.max_num_seqs, 64)
        smaller = replace(request, max_num_batched_tokens=tokens, max_num_seqs=seqs)
        if tokens < request.max_num_batched_tokens and fits(smaller):
            yield f"--max-num-batched-tokens {tokens} --max-num-seqs {seqs}"
            break
    if request.dtype == "float32" and fits(replace(request, dtype="bfloat16")):
        yield "--dtype bfloat16"
    for name, mib in sorted(GPU_MIB.items(), key=lambda item: item[1]):
        larger = mib * MIB > request.total_bytes
        if larger and fits(replace(request, total_bytes=mib * MIB)):
            yield f"--gpu {name}"
            break


def as_text(title: str, ledger: Ledger, ways: list[str]) -> str:
    """The ledger as lines for a terminal."""
    rows = [
        ("usable", ledger.usable_bytes, f"of {_size(ledger.total_bytes).strip()}"),
        ("weights", ledger.weights_bytes, ""),
        ("activations", ledger.activation_bytes, "at most"),
        ("workspace", ledger.workspace_bytes, "about"),
        ("graphs", ledger.graph_bytes, "about; none with --enforce-eager"),
        (
            "KV blocks",
            ledger.kv_bytes,
            f"{ledger.num_blocks} of {ledger.block_size} tokens, "
            f"{ledger.bytes_per_block / 1024:.0f} KiB each",
        ),
    ]
    if ledger.kv_groups > 1:
        what = f"{ledger.kv_groups} groups of {ledger.layers_per_block} layers"
        rows.append(("KV groups", ledger.padding_bytes, f"of these without a layer: {what}"))
    lines = [title, *(f"  {name:<12}{_size(size)}  {note}" for name, size, note in rows)]
    lines = [line.rstrip() for line in lines]
    if ledger.fits:
        count = ledger.full_length_sequences
        plural = "s" if count > 1 else ""
        lines.append(f"fits: {count} sequence{plural} of {ledger.max_model_len} tokens at once")
    else:
        lines.append(f"does not fit: no sequence of {ledger.max_model_len} tokens can run")
        lines += [f"  would fit with: {way}" for way in ways] or [
            "  no single setting helps, nor any one device that is known"
        ]
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / GIB:>9.2f} GiB" if count >= GIB else f"{count / MIB:>9.2f} MiB"
