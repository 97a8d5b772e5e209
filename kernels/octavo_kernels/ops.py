"""The operations of the engine: check the tensors, choose an implementation, call it.

The implementation follows the device: tensors in host memory go to the compiled module `_core`
("cpu"), all others to torch ("reference"). Where `_core` was not built, everything is reference
and one log line says so. `calls` counts what ran, so that a test can tell.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Literal

import torch

from octavo_kernels import reference
from octavo_kernels.match import Arg, match
from octavo_kernels.reference import PLAIN, Function, Variant

__all__ = [
    "PLAIN", "Function", "Variant", "act", "act_and_mul", "calls", "copy_blocks", "forced",
    "forced_instruction_set", "implementation", "implementations", "instruction_sets",
    "layer_norm", "paged_attention", "rms_norm", "rope", "write_kv",
]  # fmt: skip

Implementation = Literal["cpu", "reference"]

logger = logging.getLogger(__name__)

try:  # absent is a choice, broken is an error
    import octavo_kernels._core as _core
except ModuleNotFoundError:
    _core = None  # type: ignore[assignment]
    logger.warning(
        "octavo_kernels._core is not built: operations run on torch, several times slower. "
        "Build it with: pip install --no-build-isolation -e ."
    )

calls: Counter[tuple[str, Implementation]] = Counter()

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# In the order of kernels.h.
_FUNCTIONS: tuple[Function, ...] = ("silu", "gelu", "gelu_tanh", "relu")
_forced: Implementation | None = None


def implementations() -> tuple[Implementation, ...]:
    """What this installation has."""
    return ("reference",) if _core is None else ("cpu", "reference")


def implementation(device: str | torch.device = "cpu") -> Implementation:
    """Which implementation tensors on this device are given to."""
    if _forced is not None:
        return _forced
    if _core is not None and torch.device(device).type == "cpu":
        return "cpu"
    return "reference"


@contextlib.contextmanager
def forced(name: Implementation) -> Iterator[None]:
    """Within the block every operation uses the named implementation (tests, measurements)."""
    global _forced
    if name not in implementations():
        raise ValueError(f"implementation {name!r} is not here; built are {implementations()}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def instruction_sets() -> tuple[str, ...]:
    """What "cpu" can use on this host, best first; the first is used."""
    return () if _core is None else tuple(_core.isas())


@contextlib.contextmanager
def forced_instruction_set(name: str) -> Iterator[None]:
    """Within the block "cpu" uses the named instruction set (tests, measurements)."""
    if _core is None:
        raise ValueError("octavo_kernels._core is not built")
    before = _core.isa()
    _core.use_isa(name)
    try:
        yield
    finally:
        _core.use_isa(before)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    variant: Variant = PLAIN,
) -> torch.Tensor:
    """Causal attention over paged keys and values; see `reference.paged_attention`."""
    args = [
        Arg("query", query, "tokens heads dim", rows=True),
        Arg("key_cache", key_cache, "blocks block_size kv_heads dim"),
        Arg("value_cache", value_cache, "blocks block_size kv_heads dim"),
        Arg("block_tables", block_tables, "seqs max_blocks", torch.int32),
        Arg("query_start", query_start, "seqs+1", torch.int32),
        Arg("seq_lens", seq_lens, "seqs", torch.int32),
    ]
    window, softcap, sinks = variant.window, variant.softcap, variant.sinks
    if sinks is not None:
        args.append(Arg("sinks", sinks, "heads", torch.float32))
    size = match("paged_attention", *args)
    if size["seqs+1"] != size["seqs"] + 1:
        raise ValueError(
            f"paged_attention: query_start has {size['seqs+1']} entries for {size['seqs']} "
            "sequences; it needs one more than seq_lens"
        )
    if size["kv_heads"] == 0 or size["heads"] % size["kv_heads"] != 0:
        raise ValueError(
            f"paged_attention: query has {size['heads']} heads, not a multiple of the "
            f"{size['kv_heads']} heads of key_cache"
        )
    if window < 0 or not softcap >= 0:
        raise ValueError(
            f"paged_attention: window and softcap must be 0 or more, got {window} and {softcap}"
        )
    if not _runs_native("paged_attention", query):
        return reference.paged_attention(
            query, key_cache, value_cache, block_tables, query_start, seq_lens, scale, variant
        )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _core.paged_attention(
        dtype=_code("paged_attention", query),
        query=query.data_ptr(),
        query_stride=query.stride(0),
        key_cache=key_cache.data_ptr(),
        value_cache=value_cache.data_ptr(),
        block_tables=block_tables.data_ptr(),
        query_start=query_start.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        out=out.data_ptr(),
        tokens=size["tokens"],
        seqs=size["seqs"],
        max_blocks=size["max_blocks"],
        blocks=size["blocks"],
        block_size=size["block_size"],
        heads=size["heads"],
        kv_heads=size["kv_heads"],
        dim=size["dim"],
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=0 if sinks is None else sinks.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Store keys and values at their slots, -1 stores nothing; see `reference.write_kv`."""
    size = match(
        "write_kv",
        Arg("key", key, "tokens kv_heads dim", rows=True),
        Arg("value", value, "tokens kv_heads dim", rows=True),
        Arg("key_cache", key_cache, "blocks block_size kv_heads dim"),
        Arg("value_cache", value_cache, "blocks block_size kv_heads dim"),
        Arg("slots", slots, "tokens", torch.int64),
    )
    if not _runs_native("write_kv", key):
        reference.write_kv(key, value, key_cache, value_cache, slots)
        return
    _core.write_kv(
        key=key.data_ptr(),
        key_stride=key.stride(0) * key.element_size(),
        value=value.data_ptr(),
        value_stride=value.stride(0) * value.element_size(),
        key_cache=key_cache.data_ptr(),
        value_cache=value_cache.data_ptr(),
        slots=slots.data_ptr(),
        tokens=size["tokens"],
        num_slots=size["blocks"] * size["block_size"],
        row_bytes=size["kv_heads"] * size["dim"] * key.element_size(),
    )


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    offset: float = 0.0,
) -> torch.Tensor:
    """Norm of x, or of residual + x, which `residual` then holds; see `reference.rms_norm`."""
    args = [
        Arg("x", x, "tokens width"),
        Arg("weight", weight, "width"),
    ]
    if residual is not None:
        args.append(Arg("residual", residual, "tokens width"))
    size = match("rms_norm", *args)
    out = torch.empty_like(x)
    if not _runs_native("rms_norm", x):
        reference.rms_norm(x, weight, eps, residual, out, offset)
        return out
    _core.rms_norm(
        dtype=_code("rms_norm", x),
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        out=out.data_ptr(),
        tokens=size["tokens"],
        width=size["width"],
        eps=eps,
        offset=offset,
        threads=torch.get_num_threads(),
    )
    return out


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Layer norm of x, or of residual + x, which `residual` then holds."""
    args = [Arg("x", x, "tokens width"), Arg("weight", weight, "width")]
    if bias is not None:
        args.append(Arg("bias", bias, "width"))
    if residual is not None:
        args.append(Arg("residual", residual, "tokens width"))
    size = match("layer_norm", *args)
    out = torch.empty_like(x)
    if not _runs_native("layer_norm", x):
        reference.layer_norm(x, weight, bias, eps, residual, out)
        return out
    _core.layer_norm(
        dtype=_code("layer_norm", x),
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        out=out.data_ptr(),
        tokens=size["tokens"],
        width=size["width"],
        eps=eps,
        threads=torch.get_num_threads(),
    )
    return out


def rope(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """Rotate query and key in place by the table's row of each position; see `reference.rope`."""
    size = match(
        "rope",
        Arg("query", query, "tokens heads dim", rows=True),
        Arg("key", key, "tokens kv_heads dim", rows=True),
        Arg("positions", positions, "tokens", torch.int64),
        Arg("cos_sin", cos_sin, "max_positions rotary", torch.float32),
    )
    if size["rotary"] % 2 != 0 or size["rotary"] > size["dim"]:
        raise ValueError(
            f"rope: cos_sin turns {size['rotary']} elements of a head; that must be even and at "
            f"most the {size['dim']} of query"
        )
    if not _runs_native("rope", query):
        reference.rope(query, key, positions, cos_sin, interleaved)
        return
    for tensor, heads in ((query, size["heads"]), (key, size["kv_heads"])):
        _core.rope(
            dtype=_code("rope", query),
            x=tensor.data_ptr(),
            stride=tensor.stride(0),
            positions=positions.data_ptr(),
            cos_sin=cos_sin.data_ptr(),
            max_positions=size["max_positions"],
            tokens=size["tokens"],
            heads=heads,
            dim=size["dim"],
            rotary=size["rotary"],
            interleaved=interleaved,
            threads=torch.get_num_threads(),
        )


def act(x: torch.Tensor, function: Function) -> torch.Tensor:
    """The function of each element."""
    size = match("act", Arg("x", x, "tokens width"))
    out = torch.empty_like(x)
    if not _runs_native("act", x):
        reference.act(x, function, out)
        return out
    _activation("act", x, function, out, size["tokens"], size["width"])
    return out


def act_and_mul(x: torch.Tensor, function: Function) -> torch.Tensor:
    """function(left half) * right half of each row; see `reference.act_and_mul`."""
    size = match("act_and_mul", Arg("x", x, "tokens 2*width"))
    if size["2*width"] % 2 != 0:
        raise ValueError(f"act_and_mul: x has an odd width, {size['2*width']}")
    out = torch.empty((size["tokens"], size["2*width"] // 2), dtype=x.dtype, device=x.device)
    if not _runs_native("act_and_mul", x):
        reference.act_and_mul(x, function, out)
        return out
    _activation("act_and_mul", x, function, out, size["tokens"], size["2*width"] // 2)
    return out


def copy_blocks(cache: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copy whole blocks in every plane of the cache, in order; see `reference.copy_blocks`."""
    size = match(
        "copy_blocks",
        Arg("cache", cache, "planes blocks block_size kv_heads dim"),
        Arg("pairs", pairs, "pairs two", torch.int64),
    )
    if size["two"] != 2:
        raise ValueError(f"copy_blocks: pairs must be [pairs, 2], got {tuple(pairs.shape)}")
    if not _runs_native("copy_blocks", cache):
        reference.copy_blocks(cache, pairs)
        return
    _core.copy_blocks(
        cache=cache.data_ptr(),
        planes=size["planes"],
        blocks=size["blocks"],
        block_bytes=cache[0, 0].numel() * cache.element_size() if size["blocks"] else 0,
        pairs=pairs.data_ptr(),
        num_pairs=size["pairs"],
    )


def _runs_native(op: str, tensor: torch.Tensor) -> bool:
    """Count the call and say whether the compiled module runs it, rather than the reference."""
    chosen = implementation(tensor.device)
    calls[op, chosen] += 1
    return chosen == "cpu"


def _code(op: str, tensor: torch.Tensor) -> int:
    """The compiled module's number of a floating type (kernels.h `DType`)."""
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{op}: no kernel for {tensor.dtype}; there are {_FLOATS}")
    return _FLOATS.index(tensor.dtype)


def _activation(
    op: str, x: torch.Tensor, function: Function, out: torch.Tensor, tokens: int, width: int
) -> None:
    _core.activation(
        dtype=_code(op, x),
        function=_FUNCTIONS.index(function),
        gated=op == "act_and_mul",
        x=x.data_ptr(),
        out=out.data_ptr(),
        tokens=tokens,
        width=width,
        threads=torch.get_num_threads(),
    )
