"""The search for how each size of product runs fastest: once on a device, from a file after that.

A challenger takes the place of the usual choice (our own kernel for the few rows it takes, else
torch's) only where it wins clearly under the conditions of a step: over weights that are not in the
L2 cache, in graphs as steps are, in turns, so that all see the same clocks, with no wait of the
device for the host between. What the library's heuristic names first is always among them. At last
the layers' products run one after another as in a step, and where the choices do not win there
either, none is kept for that number of rows.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from octavo_kernels import cuda_gemm, cuda_lt, cuda_tuning_file
from octavo_kernels.cuda_lt import Size
from octavo_kernels.native import profile

Weight = tuple[torch.Tensor, torch.Tensor | None]  # with its bias

_CANDIDATES = 8
_CHALLENGERS = 2  # of those, beside the heuristic's first
# Shares of the usual choice's time that a challenger, and all that won in a step, may take.
_MARGIN, _MARGIN_OF_STEP = 0.98, 0.995
# What our kernel does in passing (norm, gate, sum) takes a kernel of its own beside another's.
_IN_PASSING_S = 3e-6
# The caches of the largest GPUs three times over: what a timing goes through.
_COLD_BYTES, _STEP_BYTES = 192 * 2**20, 2**30
_RANKED = 8  # weights at most, for the rough order
_ROUNDS, _ROUND_S = 5, 0.3e-3
# A model's one weight of its size is its head, which multiplies a row a sequence.
_MOST_HEAD_ROWS = 512

logger = logging.getLogger(__name__)


def tune_products(weights: Iterable[Weight], rows: Sequence[int]) -> int:
    """Search for each size of weight (with its bias) and number of rows; returns how many sizes
    were timed, none where all were known. Not while a graph is captured.
    """
    listed = [(w, bias) for w, bias in weights if cuda_gemm.lt_takes(w, w)]
    groups: dict[Size, list[Weight]] = {}
    for weight, bias in listed:
        groups.setdefault(_of(weight, bias, 0), []).append((weight, bias))
    if not groups:
        return 0
    device = listed[0][0].device
    if profile.tuning_folder is not None:
        for size, algorithm in cuda_tuning_file.read(profile.tuning_folder, device).items():
            if size not in cuda_lt.found:
                cuda_lt.keep(size, algorithm)
    timed = 0
    with _own_stream(device):
        for count in rows:
            timed += _tune_rows(listed, groups, count)
    if timed and profile.tuning_folder is not None:
        cuda_tuning_file.add(profile.tuning_folder, device, cuda_lt.found)
    return timed


def _tune_rows(listed: list[Weight], groups: dict[Size, list[Weight]], rows: int) -> int:
    missing = {
        size: group
        for key, group in groups.items()
        if (size := key._replace(rows=rows)) not in cuda_lt.found
        and (len(group) > 1 or rows <= _MOST_HEAD_ROWS)
    }
    for size, group in missing.items():
        cuda_lt.keep(size, None)
        with _unless_memory_is_short(size):
            cuda_lt.keep(size, _search(group, rows))
    of_layers = [size for size, group in missing.items() if len(group) > 1]
    if any(cuda_lt.found[size] for size in of_layers) and not _usual_is_ours(listed[0][0], rows):
        ratio = 1.0
        with _unless_memory_is_short(of_layers[0]):
            in_layers = [w for w in listed if len(groups[_of(*w, 0)]) > 1]
            ratio = _ratio_in_step(in_layers, rows)
        logger.debug("products of %d rows take %.3f of the usual choices' time", rows, ratio)
        if ratio > _MARGIN_OF_STEP:
            for size in of_layers:
                cuda_lt.keep(size, None)
    return len(missing)


def _search(group: list[Weight], rows: int) -> bytes | None:
    """The algorithm that beats the usual choice, if any does."""
    weight, bias = group[0]
    x = _noise(rows, weight)
    out = x.new_empty((rows, weight.shape[0]))
    offered = cuda_lt.candidates(x, weight, bias, out, count=_CANDIDATES, split=True)
    if not offered:
        return None
    cold = _cold(group, _COLD_BYTES)
    ranked = cuda_lt.rank(x, [w for w, _ in cold[:_RANKED]], bias, out, offered)
    order = sorted(range(1, len(offered)), key=ranked.__getitem__)
    order = [i for i in (0, *order[:_CHALLENGERS]) if ranked[i] != float("inf")]
    if not order:
        return None
    count = max(1, round(_ROUND_S / max(min(ranked), 1e-6)))
    rotated = list(itertools.islice(itertools.cycle(cold), count))

    def usual() -> None:
        for w, b in rotated:
            cuda_gemm.usual_product(x, w, b, out)

    def by(algorithm: bytes) -> None:
        for w, b in rotated:
            cuda_lt.run(x, w, b, out, algorithm)

    finalists = [offered[i] for i in order]
    seconds = _in_turns([usual, *(functools.partial(by, a) for a in finalists)])
    if _usual_is_ours(weight, rows):
        for taken in seconds[1:]:
            taken[:] = [s + count * _IN_PASSING_S for s in taken]
    ratios = [_ratio(taken, seconds[0]) for taken in seconds[1:]]
    best = min(range(len(ratios)), key=ratios.__getitem__)
    return finalists[best] if ratios[best] < _MARGIN else None


def _ratio_in_step(weights: list[Weight], rows: int) -> float:
    """The time of some layers' products, each as it was found, by that of the usual choices."""
    some = _cold(weights, _STEP_BYTES)
    x = {w.shape[1]: _noise(rows, w) for w, _ in some}
    room = x[some[0][0].shape[1]].new_empty(rows * max(len(w) for w, _ in some))
    outs = {n: room[: rows * n].view(rows, n) for n in {len(w) for w, _ in some}}

    def usual() -> None:
        for w, b in some:
            cuda_gemm.usual_product(x[w.shape[1]], w, b, outs[len(w)])

    def as_found() -> None:
        for w, b in some:
            if cuda_lt.product(x[w.shape[1]], w, b, outs[len(w)]) is None:
                cuda_gemm.usual_product(x[w.shape[1]], w, b, outs[len(w)])

    before, after = _in_turns([usual, as_found])
    return _ratio(after, before)


def _ratio(taken: list[float], beside: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(taken, beside, strict=True))


def _in_turns(runs: Sequence[Callable[[], None]]) -> list[list[float]]:
    """Seconds of each of the runs, round by round. All is queued before anything is awaited."""
    graphs = [_captured(run) for run in runs]
    for graph in graphs:  # the first replay is slower, and hides the launch of the next
        graph.replay()
    marks = [_mark()]
    for _ in range(_ROUNDS):
        for graph in graphs:
            graph.replay()
            marks.append(_mark())
    marks[-1].synchronize()
    taken = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    return [taken[i :: len(graphs)] for i in range(len(graphs))]


def _captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`run` allocates nothing. Not by torch.cuda.graph: it gives unused memory back first, which
    the engine has taken for its largest step.
    """
    run()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        run()
    finally:
        graph.capture_end()
    return graph


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _cold(weights: list[Weight], most_bytes: int) -> list[Weight]:
    """As many as make so many bytes, if there are."""
    sums = itertools.accumulate(w.nbytes for w, _ in weights)
    return [w for w, so_far in zip(weights, sums, strict=True) if so_far - w[0].nbytes < most_bytes]


def _of(weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> Size:
    return cuda_lt.size_of(weight, weight, bias)._replace(rows=rows)


def _noise(rows: int, weight: torch.Tensor) -> torch.Tensor:
    return weight.new_empty((rows, weight.shape[1])).normal_()


def _usual_is_ours(weight: torch.Tensor, rows: int) -> bool:
    return cuda_gemm.takes_few_rows(rows, weight.shape[1])


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One: torch keeps a workspace for each stream that ever multiplied."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """A stream that can be captured: the current one, unless it is the device's default."""
    current = torch.cuda.current_stream(device)
    if current != torch.cuda.default_stream(device):
        yield
        return
    side = _side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)
    side.synchronize()


@contextlib.contextmanager
def _unless_memory_is_short(size: Size) -> Iterator[None]:
    """What is measured is not worth ending for."""
    try:
        yield
    except torch.OutOfMemoryError:
        logger.warning("no memory to search for the fastest product of %s; as usual then", size)
