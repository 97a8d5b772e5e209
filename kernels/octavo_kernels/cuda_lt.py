"""Which of cuBLASLt's algorithms multiplies each size: searched once on the device, and kept.

`tune_products` times what the library's heuristic offers, and torch's own choice beside it, over a
model's weights for the numbers of rows that will be run. The winners are kept in memory and, where
a folder is given, in a JSON file that is good for one kind of device and version of the library.
"""

from __future__ import annotations

import functools
import json
import logging
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

import octavo_kernels._cuda as _cuda
from octavo_kernels.native import address, stream_of, type_code

WORKSPACE_BYTES = 32 * 2**20
_CANDIDATES = 16
# Torch's choice stays unless another takes so much less of its time.
_MARGIN = 0.97
_FINALISTS, _ROUNDS, _ROUND_SECONDS = 3, 3, 1e-3
# Weights of one size that a timing goes through, so that none is found in the L2 cache.
_ROTATED = 4
# For more rows than this a size takes the algorithm of the next larger one that was tuned.
_ROUNDED_ABOVE = 512

logger = logging.getLogger(__name__)


class Size(NamedTuple):
    """What an algorithm is chosen by."""

    dtype: str
    bias: bool
    n: int
    k: int
    rows: int


# None where torch's choice is as good.
_found: dict[Size, bytes | None] = {}
# What `_found` says of sizes that were not searched: a step asks again for every layer.
_rounded: dict[Size, bytes | None] = {}
_fixed: dict[Size, bytes] = {}
_workspaces: dict[torch.device, torch.Tensor] = {}


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor | None:
    """x · weight^T + bias by the algorithm that was found for the size; None where none was."""
    algorithm = _algorithm(_size(x, weight, bias))
    return None if algorithm is None else _run(x, weight, bias, out, algorithm)


def fixed_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    """x · weight^T + bias by one algorithm whatever the rows, without sums of parts of k: each row
    of the result then has the same bits in any batch.
    """
    size = _size(x, weight, bias)._replace(rows=0)
    if size not in _fixed:
        _fixed[size] = _fixed_algorithm(x, weight, bias)
    result = _run(x, weight, bias, out, _fixed[size])
    if result is None:
        raise RuntimeError(
            f"linear: cuBLASLt's algorithm for weights {tuple(weight.shape)} does not take "
            f"{len(x)} rows; --deterministic cannot be kept for this model"
        )
    return result


def tune_products(
    weights: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    rows: Sequence[int],
    folder: Path | None = None,
) -> int:
    """Search for each size of weight (with its bias) and number of rows; returns how many sizes
    were timed, none where all were known. Not while a graph is captured.
    """
    groups: dict[Size, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}
    for weight, bias in weights:
        key = _size(weight, weight, bias)._replace(rows=0)
        groups.setdefault(key, []).append((weight, bias))
    file = None
    if groups and folder is not None:
        file = _file(folder, next(iter(groups.values()))[0][0].device)
        _load(file)
    _rounded.clear()
    timed = 0
    for key, group in groups.items():
        for count in rows:
            size = key._replace(rows=count)
            if size not in _found:
                _found[size] = _search(group[:_ROTATED], count)
                timed += 1
    if timed and file is not None:
        _save(file)
    return timed


def _algorithm(size: Size) -> bytes | None:
    if size in _found or size.rows <= _ROUNDED_ABOVE:
        return _found.get(size)
    if size not in _rounded:
        larger = [
            known.rows
            for known in _found
            if size.rows < known.rows <= 2 * size.rows and known[:-1] == size[:-1]
        ]
        _rounded[size] = _found[size._replace(rows=min(larger))] if larger else None
    return _rounded[size]


def _fixed_algorithm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bytes:
    """The first of the heuristic's algorithms for many rows that takes one row as well."""
    typical = x.new_empty((256, x.shape[1]))
    out = x.new_empty((256, weight.shape[0]))
    for algorithm in _candidates(typical, weight, bias, out, split=False):
        if all(
            _run(typical[:rows], weight, bias, out[:rows], algorithm) is not None
            for rows in (1, 16, 256)
        ):
            return algorithm
    raise RuntimeError(
        f"linear: cuBLASLt has no algorithm for weights {tuple(weight.shape)} that takes any "
        "number of rows; --deterministic cannot be kept for this model"
    )


def _search(group: list[tuple[torch.Tensor, torch.Tensor | None]], rows: int) -> bytes | None:
    """All candidates once, then the best few and torch's choice in turns: under load a GPU lowers
    its clocks, and what is timed first would win.
    """
    weight, bias = group[0]
    x = torch.randn((rows, weight.shape[1]), device=weight.device).to(weight.dtype)
    out = x.new_empty((rows, weight.shape[0]))

    def seconds(algorithm: bytes, repeat: int) -> float:
        return _cuda.lt_seconds(
            **_sizes(x, weight, bias, out),
            weights=[of_layer.data_ptr() for of_layer, _ in group],
            algorithm=algorithm,
            workspace=_workspace(x.device).data_ptr(),
            workspace_bytes=WORKSPACE_BYTES,
            stream=stream_of(x),
            repeat=repeat,
        )

    rough = sorted((seconds(a, 1), a) for a in _candidates(x, weight, bias, out, split=True))
    if not rough:
        return None
    repeat = max(1, round(_ROUND_SECONDS / max(rough[0][0] * len(group), 1e-6)))
    by_torch, finalists = _torch_graph(x, group, repeat), [a for _, a in rough[:_FINALISTS]]
    rounds = [
        [_graph_seconds(by_torch) / repeat / len(group), *(seconds(a, repeat) for a in finalists)]
        for _ in range(_ROUNDS)
    ]
    typical = [statistics.median(times) for times in zip(*rounds, strict=True)]
    best = min(range(len(finalists)), key=lambda i: typical[i + 1])
    return finalists[best] if typical[best + 1] < _MARGIN * typical[0] else None


def _torch_graph(
    x: torch.Tensor, group: list[tuple[torch.Tensor, torch.Tensor | None]], repeat: int
) -> torch.cuda.CUDAGraph:
    """Torch's products in a graph: from here, launches would take longer than small products."""
    for weight, bias in group:
        functional.linear(x, weight, bias)
    torch.cuda.synchronize(x.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for weight, bias in group:
                functional.linear(x, weight, bias)
    graph.replay()
    return graph


def _graph_seconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _size(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Size:
    n, k = weight.shape
    return Size(_name_of(weight.dtype), bias is not None, n, k, x.shape[0])


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> dict[str, int]:
    return {
        "dtype": type_code("linear", x),
        "x": x.data_ptr(),
        "x_stride": x.stride(0),
        "bias": address(bias),
        "out": out.data_ptr(),
        "rows": x.shape[0],
        "n": weight.shape[0],
        "k": weight.shape[1],
    }


def _workspace(device: torch.device) -> torch.Tensor:
    """Where algorithms keep what they need: one stream at a time uses it."""
    found = _workspaces.get(device)
    if found is None:
        found = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        _workspaces[device] = found
    return found


def _candidates(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    split: bool,
) -> list[bytes]:
    return _cuda.lt_candidates(
        **_sizes(x, weight, bias, out),
        w=weight.data_ptr(),
        workspace_bytes=WORKSPACE_BYTES,
        count=_CANDIDATES,
        split=split,
    )


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    algorithm: bytes,
) -> torch.Tensor | None:
    if out is None:
        out = x.new_empty((x.shape[0], weight.shape[0]))
    workspace = _workspace(x.device)
    n, k = weight.shape
    done = _cuda.lt_product(
        dtype=type_code("linear", x),
        x=x.data_ptr(),
        x_stride=x.stride(0),
        bias=address(bias),
        out=out.data_ptr(),
        rows=x.shape[0],
        n=n,
        k=k,
        w=weight.data_ptr(),
        algorithm=algorithm,
        workspace=workspace.data_ptr(),
        workspace_bytes=WORKSPACE_BYTES,
        stream=stream_of(x),
    )
    return out if done else None


def _file(folder: Path, device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return folder / f"products-{name}-cublaslt-{_cuda.lt_version()}.json"


def _load(file: Path) -> None:
    """What an earlier search found; a file that cannot be read is as good as none."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        known = {
            Size(*row["size"]): None
            if row["algorithm"] is None
            else bytes.fromhex(row["algorithm"])
            for row in rows
        }
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be used, sizes are searched again: %s", file, error)
        return
    for size, algorithm in known.items():
        _found.setdefault(size, algorithm)


def _save(file: Path) -> None:
    rows = [
        {"size": list(size), "algorithm": None if algorithm is None else algorithm.hex()}
        for size, algorithm in sorted(_found.items())
    ]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(rows), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        logger.warning("%s was not written, the next start searches again: %s", file, error)
