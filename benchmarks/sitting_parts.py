"""The parts of a sitting: what runs, in which order, and how long it may take."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sitting import (
    MAX_NUM_SEQS,
    OURS,
    PASSES,
    PASSES_S,
    PEER,
    Model,
    PartError,
    Serving,
    Sitting,
    elapsed,
)
from sitting_serve import cold_start, under_load

from octavo.bench.limits import Ceilings, least_seconds
from octavo.bench.workloads import SHAPES, draw

HERE = Path(__file__).resolve().parent
# What of a workload is the figure: tokens that come out, but of long prompts those that go in.
FIGURE = {"prefill": "in_tok_s"}
BIG, SMALL = "llama-8b", "qwen3-0.6b"
BIG_LOADS, SMALL_LOADS = ["single", "prefill", "sharegpt"], ["single", "uniform"]

USUAL = Serving()

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Part:
    """`run` yields rows within `box_s` seconds; with less than `least_s` left it is skipped."""

    box_s: float
    least_s: float
    run: Callable[[Sitting], Rows]


def offline(sitting: Sitting, engine: str, shape: str, loads: list[str]) -> Rows:
    """One engine over some workloads without HTTP."""
    model = Model.of(shape, sitting.scratch)
    words = offline_command(engine, shape, model, loads, sitting.requests)
    own = {"engine": engine, "version": None, "shape": model.name}
    for row in sitting.run(words, peer=engine == PEER):
        own["version"] = row.get("version", own["version"])
        yield own | measurement(row, model, sitting)


def offline_command(
    engine: str, shape: str, model: Model, loads: list[str], requests: int | None
) -> list[str]:
    """What runs one engine over some workloads and prints a JSON line for each pass."""
    count = [] if requests is None else [str(requests)]
    length = str(model.max_model_len)
    if engine == OURS:
        return [
            sys.executable, "-m", "octavo.cli", "bench", "offline", _word(shape),
            "--workload", *loads, "--max-model-len", length, "--max-num-seqs", str(MAX_NUM_SEQS),
            "--dtype", "bfloat16", "--repeat", str(PASSES), "--seconds", str(PASSES_S),
            *(["--requests", *count] if count else []),
        ]  # fmt: skip
    peer = HERE / f"peer_{engine}.py"
    return [sys.executable, str(peer), str(model.folder), ",".join(loads), length, *count]


def _word(shape: str) -> str:
    """A shape by name, which has random weights; a folder, which has its own, whichever is the
    folder of who reads it.
    """
    return shape if shape in SHAPES else str(Path(shape).resolve())


def measurement(row: dict[str, Any], model: Model, sitting: Sitting) -> dict[str, Any]:
    """What a line says, beside what the machine would allow."""
    if row["metric"] == "static":
        return row | {"metric": "out_tok_s", "value": row.pop("out_tok_s", None), "limit": None}
    if row["metric"] != "offline":
        return {"metric": row["metric"], "value": row.get("s"), "detail": row}
    figure = FIGURE.get(row["load"], "out_tok_s")
    found = {name: row[name] for name in ("load", "rep", "digest", "s", "step_ms") if name in row}
    found |= {"metric": figure, "value": row[figure], "limit": None}
    if sitting.ceilings is not None:
        requests = draw(row["load"], model.vocab_size, row["requests"])
        limit = row[figure] * row["s"] / least_seconds(model.config, requests, sitting.ceilings)
        found |= {"limit": round(limit, 1), "share": round(row[figure] / limit, 4)}
    return found


def script(sitting: Sitting, name: str, *words: str) -> Rows:
    """A benchmark of ours; its rows are kept as they are, as details."""
    for row in sitting.run([sys.executable, str(HERE / name), *words]):
        known = {key: row[key] for key in ("engine", "shape", "load") if key in row}
        value = row.get("value", row.get("idle"))
        yield known | {"metric": row["metric"], "value": value, "limit": None, "detail": row}


def serve(sitting: Sitting, engine: str, shape: str, rep: int, *, loaded: bool = True) -> Rows:
    """A server's cold start, and what it does under load."""
    model = Model.of(shape, sitting.scratch)
    if not any(model.folder.glob("*.safetensors")):
        yield from weights(sitting, shape)
    run = under_load if loaded else cold_start
    for row in run(sitting, engine, model, rep):
        yield {"shape": model.name} | row


def weights(sitting: Sitting, shape: str) -> Rows:
    """The checkpoint that the servers start from, in the folder that all parts use."""
    if shape in SHAPES:
        yield from script(sitting, "sitting_weights.py", shape, str(sitting.scratch / shape))


def parts(
    big: str = BIG,
    small: str = SMALL,
    *,
    serving: Serving = USUAL,
    cost: bool = True,
    sharing: Sequence[str] = (),
) -> dict[str, Part]:
    """All parts, those of both engines first, so that who is interrupted loses what is ours alone.

    A server is not started where its Poisson load would be cut: another number of requests is not
    compared. `cost`: whether `vllm-8b` measures what steps cost, too. `sharing`: words for its
    script.
    """
    vllm_big = [*BIG_LOADS, "cost"] if cost else BIG_LOADS

    load_s = serving.poisson_s
    big_word, small_word = _word(big), _word(small)

    def of(
        box_s: float, least_s: float, run: Callable[..., Rows], *words: Any, **named: Any
    ) -> Part:
        return Part(box_s, least_s, lambda sitting: run(sitting, *words, **named))

    return {
        "octavo-8b": of(150, 70, offline, "octavo", big, BIG_LOADS),
        "octavo-0.6b": of(70, 35, offline, "octavo", small, SMALL_LOADS),
        "weights": of(60, 15, weights, big),
        "vllm-8b": of(320 if cost else 270, 150, offline, "vllm", big, vllm_big),
        "serve-vllm": of(205 + load_s, 120 + load_s, serve, "vllm", big, 0),
        "serve-octavo": of(105 + load_s, 75 + load_s, serve, "octavo", big, 0),
        "vllm-0.6b": of(170, 125, offline, "vllm", small, SMALL_LOADS),
        "cold-octavo": of(40, 10, serve, "octavo", big, 1, loaded=False),
        "sharing": of(60, 20, script, "sharing_gpu.py", "--model", small_word, *sharing),
        "sharing-8b": of(120, 30, script, "sharing_gpu.py", "--model", big_word, *sharing),
        "idle": of(60, 25, script, "idle.py", "--model", big_word),
        "cost-octavo": of(80, 40, script, "cost_model.py", "--model", big_word),
        "cold-vllm": of(130, 105, serve, "vllm", big, 1, loaded=False),
        "octavo-0.6b-again": of(70, 35, offline, "octavo", small, SMALL_LOADS),
        "octavo-8b-again": of(150, 70, offline, "octavo", big, BIG_LOADS),
        "transformers": of(90, 40, offline, "transformers", big, ["sharegpt"]),
        "serve-octavo-again": of(105 + load_s, 75 + load_s, serve, "octavo", big, 2),
    }


def run_part(sitting: Sitting, name: str, part: Part, end: float) -> None:
    """Run one part within its box and the budget; whatever it raises becomes a row."""
    begin = time.perf_counter()
    own = {"part": name}
    if end - begin < part.least_s:
        why = f"{end - begin:.0f} s are left of the budget, it needs {part.least_s:g}"
        sitting.append(own | {"metric": "skipped", "value": None, "limit": None, "why": why})
        return
    sitting.deadline = min(end, begin + part.box_s)
    took: dict[str, Any] = {"metric": "part", "value": None, "limit": None}
    try:
        with elapsed(took):
            for row in part.run(sitting):
                sitting.append(own | row)
    except PartError as error:
        sitting.append(own | {"metric": "failed", "value": None, "limit": None, "why": str(error)})
    except Exception:
        why = traceback.format_exc()[-1500:]
        sitting.append(own | {"metric": "failed", "value": None, "limit": None, "why": why})
    took["value"] = took.pop("s", round(time.perf_counter() - begin, 2))
    sitting.append(own | took)


def measured(rows: Sequence[dict[str, Any]]) -> set[str]:
    """The parts of a sitting that came to their end, at the latest try."""
    well: dict[str, bool] = {}
    failed: set[str] = set()
    for row in rows:
        if row["metric"] == "failed":
            failed.add(row["part"])
        elif row["metric"] == "part":  # the last row of a try
            well[row["part"]] = row["part"] not in failed
            failed.discard(row["part"])
    return {part for part, ended in well.items() if ended}


def measure_ceilings(sitting: Sitting, end: float = float("inf")) -> None:
    """Copy bandwidth (bytes read and written) and the rate of a large bf16 product.

    Once a sitting: a later call takes what an earlier one found.
    """
    known = [row["detail"] for row in sitting.rows if row["metric"] == "ceilings"]
    if known:
        _use(sitting, known[0])
        return
    sitting.deadline = min(end, time.perf_counter() + 60)
    try:
        found = next(sitting.run([sys.executable, str(HERE / "ceilings.py")]))
    except (PartError, StopIteration) as error:
        sitting.append({"metric": "failed", "part": "ceilings", "value": None, "why": str(error)})
        return
    _use(sitting, found)
    sitting.append({"metric": "ceilings", "value": None, "limit": None, "detail": found})


def _use(sitting: Sitting, found: dict[str, Any]) -> None:
    sitting.stamp["device"] = found["device"]
    sitting.ceilings = Ceilings(found["copy_TB_s"] * 1e12, found["bf16_TFLOP_s"] * 1e12)
