"""Decode attention: bytes of keys and values read a second, beside the copy bandwidth."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from kernel_timing import Machine, graph_seconds, rotations

from octavo_kernels import ops
from octavo_kernels.attention_settings import DecodeSetting

BLOCK_SIZE = 16
MEMORY_BYTES = 60 * 2**30


@dataclass(frozen=True, slots=True)
class Shape:
    """`context` tokens of each sequence; 0: 1 to 1,000, as requests in mid-generation have."""

    batch: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    bar: float | None = None  # of copy bandwidth

    def lengths(self) -> torch.Tensor:
        if self.context:
            return torch.full((self.batch,), self.context, dtype=torch.int32)
        generator = torch.Generator().manual_seed(self.batch)
        return torch.randint(1, 1001, (self.batch,), generator=generator, dtype=torch.int32)


SHAPES = [
    Shape(1, 1024),
    Shape(8, 1024),
    Shape(32, 1024),
    Shape(64, 1024, bar=0.75),
    Shape(256, 1024, bar=0.90),
    Shape(64, 8192, bar=0.88),
    Shape(256, 0),
    Shape(512, 0),
    Shape(1, 65536),
    Shape(8, 32768),
    Shape(1, 1024, 16, 8),
    Shape(64, 1024, 16, 8),
    Shape(256, 1024, 16, 8),
    Shape(64, 1024, 64, 8),
    Shape(64, 1024, 32, 32),
    Shape(64, 2048, 32, 8, 64),
    Shape(64, 2048, 32, 32, 80),
    Shape(64, 1024, 8, 4, 256),
]
SWEPT = [SHAPES[i] for i in (0, 3, 4, 5, 6, 11)]
# Tokens of a chunk, the most chunks, stages, blocks of a multiprocessor.
SWEPT_SETTINGS = (128, 256, 1024), (16, 33), (2, 3, 4), (1, 2)


@dataclass(frozen=True, slots=True)
class Inputs:
    queries: list[torch.Tensor]
    caches: list[torch.Tensor]
    tables: torch.Tensor
    start: torch.Tensor
    lengths: torch.Tensor
    bytes: int  # of keys and values that one call reads


def inputs_of(shape: Shape) -> Inputs:
    """Several layers' caches over one random block table, filled with noise."""
    lengths = shape.lengths()
    needed = (-(-lengths // BLOCK_SIZE)).tolist()
    order = torch.randperm(sum(needed), dtype=torch.int32)
    tables = torch.full((shape.batch, max(needed)), -1, dtype=torch.int32)
    for row, blocks in enumerate(order.split(needed)):
        tables[row, : len(blocks)] = blocks
    token = 2 * shape.kv_heads * shape.dim * 2
    read = int(lengths.sum()) * token
    of_cache = len(order) * BLOCK_SIZE * token
    layers = max(1, min(rotations(read), MEMORY_BYTES // of_cache))

    def noise(*size: int) -> torch.Tensor:
        return torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_()

    return Inputs(
        [noise(shape.batch, shape.heads, shape.dim) for _ in range(layers)],
        [noise(2, len(order), BLOCK_SIZE, shape.kv_heads, shape.dim) for _ in range(layers)],
        tables.cuda(),
        torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda"),
        lengths.cuda(),
        read,
    )


def attend(inputs: Inputs, layer: int, work: ops.AttentionWork, rows: int) -> torch.Tensor:
    """Attention of the first rows over one layer's cache."""
    return ops.paged_attention(
        inputs.queries[layer][:rows],
        inputs.caches[layer][0],
        inputs.caches[layer][1],
        inputs.tables[:rows],
        inputs.start[: rows + 1],
        inputs.lengths[:rows],
        inputs.queries[0].shape[-1] ** -0.5,
        num_decodes=rows,
        max_query_len=1,
        work=work,
    )


def work_of(shape: Shape, setting: DecodeSetting | None) -> ops.AttentionWork:
    return ops.attention_work(
        max_seqs=shape.batch,
        max_seq_len=131072,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        dim=shape.dim,
        device="cuda",
        setting=setting,
    )


def measure(
    shape: Shape, inputs: Inputs, machine: Machine, setting: DecodeSetting | None
) -> dict[str, object]:
    """One row, by the given setting or by what is chosen for such a step."""
    work = work_of(shape, setting)
    ops.plan_attention(work, inputs.lengths, shape.batch)
    with ops.forced("cuda"):
        layers = range(len(inputs.caches))
        each = graph_seconds([lambda i=i: attend(inputs, i, work, shape.batch) for i in layers])
        plan = graph_seconds([lambda: ops.plan_attention(work, inputs.lengths, shape.batch)] * 8)
        got = attend(inputs, 0, work, shape.batch)
    row: dict[str, object] = {
        "batch": shape.batch,
        "context": shape.context or "1..1000",
        "heads": f"{shape.heads}/{shape.kv_heads}",
        "dim": shape.dim,
        **asdict(work.settings[shape.batch]),
        "buffers_MB": round(work.nbytes / 1e6),
        "us": round(each * 1e6, 2),
        "plan_us": round(plan * 1e6, 2),
        "TB_s": round(inputs.bytes / each / 1e12, 3),
        "of_copy": round(inputs.bytes / each / machine.copy_bytes_s, 3),
    }
    if shape.bar is not None:
        row |= {"bar": shape.bar, "met": row["of_copy"] >= shape.bar}  # type: ignore[operator]
    return row | {"error": error(inputs, got[:2], work)}


def error(inputs: Inputs, got: torch.Tensor, work: ops.AttentionWork) -> float:
    """Relative distance of some rows from the reference."""
    with ops.forced("reference"):
        right = attend(inputs, 0, work, len(got)).double()
    return round(float((got.double() - right).norm() / right.norm()), 5)


def decode(machine: Machine, sweep: bool) -> Iterator[dict[str, object]]:
    """Times of decode attention at the default settings, or over settings too."""
    swept = [DecodeSetting(*each) for each in itertools.product(*SWEPT_SETTINGS)]
    for shape in SWEPT if sweep else SHAPES:
        inputs = inputs_of(shape)
        for setting in (None, *swept) if sweep else (None,):
            yield measure(shape, inputs, machine, setting)
        del inputs
