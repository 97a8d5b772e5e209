"""What a step costs: seconds = a + b x sequences + c x KV tokens + e x prompt tokens, fitted.

    python benchmarks/cost_model.py --model llama-8b       # ours
    python benchmarks/peer_vllm.py FOLDER cost 4096        # the peer's, by the same calls

Both engines are asked for the same through `generate`: so many prompts of one length, drawn to two
output lengths, of which the shorter outlasts the computing of all prompts. So the longer run has
that many more steps of the whole batch and nothing else more: its surplus is a point without prompt
tokens; a prompt that is drawn from once is a point of one step. Of our own engine the steps of a
saturated run are recorded besides, and fitted alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from octavo.bench.workloads import SHAPES, Request, draw

# Seconds to draw all that these requests ask for, and nothing else.
Generate = Callable[[list[Request]], float]

# Sequences and the tokens of each one's prompt, and single prompts of one step.
GRID = ((1, 256), (1, 2048), (8, 256), (8, 2048), (64, 256), (64, 1024), (256, 256), (256, 512))
PROMPTS = (256, 512, 1024, 2048)
# Tokens to draw. The shorter outlasts the steps with prompts: 131,072 tokens of 256 prompts, which
# takes 74 steps of 2,048 beside ever more decodes.
SHORT, LONG = 96, 160
# Steps whose mean is a point: when a host is late, one step seems longer and the next shorter.
STEPS_TOGETHER = 8
REPEAT = 3
TERMS = 4
FIRST_ID = 10


@dataclass(frozen=True, slots=True)
class Point:
    """A step, or the mean of some: what was in it, and its seconds.

    `sequences` draw a token; `kv_tokens` are what they attend to; `prompt_tokens` are computed.
    """

    sequences: float
    kv_tokens: float
    prompt_tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The coefficients: ms a step, µs a sequence, ns a KV token, µs a prompt token.

    `r2` is of the seconds. `median_error` and `worst_error` are shares of a point's own seconds.
    """

    a_ms: float
    b_us: float
    c_ns: float
    e_us: float
    r2: float
    median_error: float
    worst_error: float
    points: int


def fit(points: Sequence[Point]) -> Fit:
    """Least squares of the relative error, so that long steps do not outweigh the others.

    Raises `ValueError` where the points do not tell the four coefficients apart.
    """
    terms = np.array([(1, p.sequences, p.kv_tokens, p.prompt_tokens) for p in points])
    terms = terms.reshape(-1, TERMS).astype(float)
    seconds = np.array([p.seconds for p in points])
    scale = np.abs(terms).max(axis=0, initial=0.0)
    if len(points) < TERMS or not scale.all():
        raise ValueError(f"{len(points)} points do not tell {TERMS} coefficients apart")
    weighted = terms / scale / seconds[:, None]
    found, _, rank, _ = np.linalg.lstsq(weighted, np.ones(len(points)), rcond=None)
    if rank < TERMS:
        raise ValueError(f"{len(points)} points tell only {rank} of {TERMS} coefficients apart")
    coefficients = found / scale
    errors = np.abs(terms @ coefficients - seconds)
    spread = float(((seconds - seconds.mean()) ** 2).sum())
    r2 = 1 - float((errors**2).sum()) / spread if spread else 1.0
    a, b, c, e = (float(value) for value in coefficients)
    relative = errors / seconds
    return Fit(
        a_ms=round(a * 1e3, 4),
        b_us=round(b * 1e6, 3),
        c_ns=round(c * 1e9, 3),
        e_us=round(e * 1e6, 4),
        r2=round(r2, 5),
        median_error=round(float(np.median(relative)), 4),
        worst_error=round(float(relative.max()), 4),
        points=len(points),
    )


def prompts(count: int, length: int, output: int, vocab_size: int) -> list[Request]:
    """Equal requests; which tokens stand in them changes nothing."""
    span = vocab_size - FIRST_ID
    ids = [FIRST_ID + (7 * i) % span for i in range(length)]
    return [Request(ids, output)] * count


def decode_point(sequences: int, prompt: int, short: float, long: float) -> Point:
    """What the longer of two runs has more: steps of the whole batch, and nothing else.

    A token drawn as number i (from 0) attends to the prompt and the i before it.
    """
    context = prompt + (SHORT + LONG - 1) / 2
    return Point(sequences, sequences * context, 0, (long - short) / (LONG - SHORT))


def measure_points(generate: Generate, vocab_size: int, max_model_len: int) -> Iterator[Point]:
    """All points of the grid that the context allows; some 40 s for an 8B model on one GPU.

    Needs no prefix cache, and a step that holds the longest of `PROMPTS`.
    """
    longest = max_model_len - LONG

    def seconds(count: int, length: int, output: int, repeat: int) -> float:
        asked = prompts(count, length, output, vocab_size)
        return statistics.median(generate(asked) for _ in range(repeat))

    seconds(1, min(PROMPTS), SHORT, 1)
    for length in PROMPTS:
        if length <= longest:
            yield Point(1, 0, length, seconds(1, length, 1, REPEAT))
    for count, length in GRID:
        if length <= longest:
            repeat = REPEAT if count == 1 else 1
            short, long = (seconds(count, length, output, repeat) for output in (SHORT, LONG))
            yield decode_point(count, length, short, long)


def means(points: Sequence[Point], together: int = STEPS_TOGETHER) -> list[Point]:
    """The means of so many steps each in their order, which the same coefficients hold for."""
    columns = np.array([(p.sequences, p.kv_tokens, p.prompt_tokens, p.seconds) for p in points])
    whole = len(points) // together * together
    found = columns[:whole].reshape(-1, together, TERMS).mean(axis=1)
    return [Point(*map(float, row)) for row in found]


def rows(shape: str, engine: str, method: str, points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """What is kept: the fit, and the points where they are few."""
    what = {"metric": "cost_model", "shape": shape, "engine": engine, "method": method}
    yield what | asdict(fit(points))
    if method == "generate":
        for point in points:
            yield what | {"metric": "cost_point"} | asdict(point)


def octavo(model: str, max_num_seqs: int) -> Iterator[dict[str, Any]]:
    """Our engine: through `generate`, and step by step under a full batch."""
    from own_engine import fits, start

    from octavo import SamplingParams

    own = {} if model in SHAPES else {"max_model_len": None}
    llm = start(model, **{"max_num_seqs": max_num_seqs} | own)
    llm.prepare()
    loop = llm._loop

    def generate(requests: list[Request]) -> float:
        asked = [
            SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=r.output) for r in requests
        ]
        inputs = [{"prompt_token_ids": r.prompt} for r in requests]
        begin = time.perf_counter()
        llm.generate(inputs, asked, use_tqdm=False)
        return time.perf_counter() - begin

    most = loop.scheduler.limits.max_model_len
    yield from rows(model, "octavo", "generate", [*measure_points(generate, llm.vocab_size, most)])
    recorded: list[Point] = []
    record(loop, recorded)
    generate([fits(r, most) for r in draw("sharegpt", llm.vocab_size, max_num_seqs)])
    yield from rows(model, "octavo", "steps", means(recorded))


def record(loop: Any, into: list[Point]) -> None:
    """Have the loop's own measure of a step's seconds kept, with what was in the step."""
    from octavo.core.forecast import StepRates, prefill_tokens
    from octavo.core.step import StepPlan

    class Recorder(StepRates):
        def observe(self, plan: StepPlan, token_budget: int, seconds: float) -> None:
            super().observe(plan, token_budget, seconds)
            prompt = prefill_tokens(plan)
            into.append(Point(plan.num_samples, plan.context, prompt, seconds))

    loop._rates = Recorder()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama-8b", help="a folder, or a shape's name")
    parser.add_argument("--max-num-seqs", type=int, default=512)
    args = parser.parse_args()
    for row in octavo(args.model, args.max_num_seqs):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
