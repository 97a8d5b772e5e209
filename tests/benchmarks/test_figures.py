"""The arithmetic behind the benchmarks' figures: a step's cost, a GPU's idle share, sharing off."""

from dataclasses import replace
from pathlib import Path

import cost_model
import idle
import own_engine
import pytest
import sharing_gpu
import simulation
import workloads
from cost_model import GRID, LONG, PROMPTS, SHORT, Point, decode_point, fit, measure_points, prompts

from octavo import wire
from octavo.core.block_pool import BlockPool
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits
from octavo.engine.loop import EngineLoop

ROOT = Path(__file__).resolve().parents[2]
A, B, C, E = 5e-3, 7e-6, 4e-8, 2.4e-5
# Prompt tokens of a step of 2,048 with as many decodes as any point of the cost model has.
LEAST_OF_PROMPTS = 2048 - max(sequences for sequences, _ in GRID)


def cost(sequences: float, kv_tokens: float, prompt_tokens: float) -> float:
    return A + B * sequences + C * kv_tokens + E * prompt_tokens


# A step's cost.


def test_the_coefficients_that_made_the_points_are_found() -> None:
    steps = [
        (sequences, sequences * context, prompt)
        for sequences in (1, 16, 256)
        for context in (1, 100, 3000)
        for prompt in (0, 500, 2048)
    ]
    found = fit([Point(*step, cost(*step)) for step in steps])
    assert (found.a_ms, found.b_us, found.c_ns, found.e_us) == pytest.approx((5, 7, 40, 24))
    assert found.r2 == pytest.approx(1)
    assert found.worst_error < 1e-6
    assert found.points == 27


def test_a_long_step_does_not_outweigh_the_others() -> None:
    """A tenth more on the longest step moves the base cost by less than it would unweighted."""
    steps = [(s, s * k, p) for s in (1, 64) for k in (10, 1000) for p in (0, 16, 2048, 16384)]
    points = [Point(*step, cost(*step)) for step in steps]
    longest = max(points, key=lambda point: point.seconds)
    wrong = Point(
        longest.sequences, longest.kv_tokens, longest.prompt_tokens, longest.seconds * 1.1
    )
    found = fit([wrong if point is longest else point for point in points])
    assert found.a_ms == pytest.approx(5, rel=0.05)
    assert found.r2 < 1
    assert 0.01 < found.worst_error < 0.11


@pytest.mark.parametrize(
    "points",
    [
        [],
        [Point(1, 10, 0, 0.1), Point(2, 10, 0, 0.1), Point(1, 20, 0, 0.1)],
        # No prompts, and a context that is the same for all.
        [Point(s, k, 0, cost(s, k, 0)) for s in (1, 2, 3) for k in (10, 20)],
        [Point(s, 100 * s, p, cost(s, 100 * s, p)) for s in (1, 2, 3) for p in (0, 9)],
    ],
)
def test_points_that_do_not_tell_coefficients_apart_are_refused(points) -> None:
    with pytest.raises(ValueError, match="apart"):
        fit(points)


def run_by_the_model(requests) -> float:
    """Seconds of an engine with exactly that cost, that computes a prompt in each step."""
    running, waiting, seconds = [], list(requests), 0.0
    while running or waiting:
        prompt = 0
        context = sum(length + drawn for length, _, drawn in running)
        sequences = len(running)
        if waiting:
            request = waiting.pop(0)
            prompt = len(request.prompt)
            sequences += 1
            running.append([prompt, request.output, -1])
        seconds += cost(sequences, context, prompt)
        for entry in running:
            entry[2] += 1
        running = [[le, out, drawn] for le, out, drawn in running if drawn + 1 < out]
    return seconds


def test_runs_of_an_engine_give_its_coefficients() -> None:
    """Whatever the prompts' steps are like, the longer run has more of whole batches alone."""
    points = list(measure_points(run_by_the_model, 1000, 4096))
    assert len(points) == len(GRID) + len(PROMPTS)
    found = fit(points)
    assert found.a_ms == pytest.approx(5, rel=0.01)
    assert found.b_us == pytest.approx(7, rel=0.05)
    assert found.c_ns == pytest.approx(40, rel=0.05)
    assert found.e_us == pytest.approx(24, rel=0.01)


def run_with_decodes_for_nothing(requests) -> float:
    """Seconds of an engine whose steps with prompts hide what they decode."""
    length, output = len(requests[0].prompt), requests[0].output
    left, drawn, seconds = [length] * len(requests), [], 0.0
    while left or drawn:
        prompt = min(sum(left), LEAST_OF_PROMPTS)
        decodes = (0, 0) if left else (len(drawn), sum(length + n for n in drawn))
        seconds += cost(*decodes, prompt)
        drawn = [n + 1 for n in drawn if n + 1 < output]
        while prompt:
            taken = min(prompt, left[0])
            prompt, left[0] = prompt - taken, left[0] - taken
            if not left[0]:
                drawn += [1] * (output > 1)
                del left[0]
    return seconds


def test_a_surplus_has_nothing_of_steps_with_prompts() -> None:
    found = [p for p in measure_points(run_with_decodes_for_nothing, 1000, 4096) if p.kv_tokens]
    assert len(found) == len(GRID)
    for point in found:
        each = cost(point.sequences, point.kv_tokens, 0)
        assert point.seconds == pytest.approx(each, rel=0.02), point


def test_means_of_steps_have_the_same_coefficients_though_some_seem_late() -> None:
    """Of two steps one after the other, nearly all of the second's seconds are the first's."""
    steps = [
        Point(s, s * context, prompt, cost(s, s * context, prompt))
        for s in range(1, 40)
        for context, prompt in ((10, 2048), (90, 2048), (10, 64), (70, 0), (800, 0), (3000, 0))
    ]
    late = []
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        moved = 0.99 * second.seconds
        late += [replace(first, seconds=first.seconds + moved)]
        late += [replace(second, seconds=second.seconds - moved)]
    assert fit(late).worst_error > 0.5
    found = fit(cost_model.means(late))
    assert (found.a_ms, found.b_us) == pytest.approx((5, 7), rel=0.01)
    assert (found.c_ns, found.e_us) == pytest.approx((40, 24), rel=0.01)
    assert found.points == len(late) // cost_model.STEPS_TOGETHER


def test_only_what_the_context_allows_is_measured() -> None:
    points = list(measure_points(run_by_the_model, 1000, 1024))
    assert max(point.prompt_tokens for point in points) == 512
    assert max(point.kv_tokens / point.sequences for point in points) < 1024


def test_a_decode_point_is_the_surplus() -> None:
    point = decode_point(8, 100, 1.0, 1.0 + 0.5 * (LONG - SHORT))
    assert point.seconds == pytest.approx(0.5)
    assert point.kv_tokens == 8 * (100 + sum(range(SHORT, LONG)) / (LONG - SHORT))


def test_prompts_are_valid_whatever_the_vocabulary() -> None:
    (request, same) = prompts(2, 50, 3, 20)
    assert request == same
    assert len(request.prompt) == 50
    assert all(cost_model.FIRST_ID <= token < 20 for token in request.prompt)


# A GPU's idle share.


def test_overlapping_kernels_are_counted_once() -> None:
    found = idle.busy([(10, 20, "b"), (0, 12, "a"), (13, 15, "c"), (30, 31, "a"), (20, 22, "c")])
    assert found.total == 23  # 0..22 and 30..31
    assert found.span == 31
    assert found.exclusive == {"a": 13, "b": 8, "c": 2}
    assert found.calls == {"a": 2, "b": 1, "c": 2}
    assert idle.busy([]).span == 0


# Sharing switched off.


class Census:
    """Blocks that more than one table holds where somebody writes, over all plans."""

    def __init__(self, scheduler) -> None:
        self.scheduler, self.shared, self.copies = scheduler, 0, 0

    def look(self, plan) -> None:
        references = self.scheduler.pool.references
        self.copies += len(plan.copies)
        for share in plan.sequences:
            if share.writes and (share.branch or share.num_generated > 1):
                self.shared += sum(references(block) > 1 for block in share.block_table)


def outputs(scheduler, kind: str, width: int, look=lambda _: None) -> dict[tuple[str, int], list]:
    """Every token of a run, by request and branch; the books balance at its end."""
    found: dict[tuple[str, int], list] = {}
    loop = EngineLoop(scheduler, simulation.FakeDevice(look))
    for index, one in enumerate(workloads.draw(workloads.ALPACA, 12, simulation.VOCAB_SIZE)):
        asked = sharing_gpu.params(kind, width, one.output)
        loop.add(wire.AddRequest(str(index), one.prompt, asked))
    while loop.has_work:
        for output in loop.step():
            assert output.error is None
            found.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        scheduler.check_integrity()
    return found


def scheduler_of(sharing: bool, num_blocks: int):
    limits = Limits(
        block_size=16, max_model_len=1024, max_num_seqs=64, max_num_batched_tokens=256,
        vocab_size=simulation.VOCAB_SIZE, eos_token_ids=frozenset(),
    )  # fmt: skip
    made = sharing_gpu.SCHEDULERS[sharing]
    return made(BlockPool(num_blocks), PolicyFactory.get_policy("fcfs"), limits)


@pytest.mark.parametrize("kind", sharing_gpu.KINDS)
@pytest.mark.parametrize("num_blocks", [2000, 60])
def test_without_sharing_nobody_writes_beside_another(kind: str, num_blocks: int) -> None:
    unshared, shared = (scheduler_of(on, num_blocks) for on in (False, True))
    census, usual = Census(unshared), Census(shared)
    without = outputs(unshared, kind, 4, census.look)
    with_sharing = outputs(shared, kind, 4, usual.look)
    assert census.shared == 0
    assert usual.shared > 0
    assert census.copies > usual.copies
    lengths = {key: len(tokens) for key, tokens in without.items()}
    assert lengths == {key: len(tokens) for key, tokens in with_sharing.items()}
    if kind == "samples":  # whose draws do not depend on who runs beside them
        assert without == with_sharing
    if num_blocks == 60:
        assert unshared.counters.preemptions or unshared.counters.steps > shared.counters.steps


def test_a_pool_that_cannot_hold_a_group_is_refused() -> None:
    requests = prompts(3, 100, 60, 1000)
    sharing_gpu.check_room(requests, 4, 40, 16)
    with pytest.raises(SystemExit, match="--blocks 40"):
        sharing_gpu.check_room(requests, 4, 39, 16)


def test_a_run_never_ends_by_itself_and_leaves_nothing() -> None:
    scheduler = scheduler_of(True, 300)
    work = workloads.draw(workloads.ALPACA, 3, simulation.VOCAB_SIZE)
    requests = [sharing_gpu.Request(one.prompt, one.output) for one in work]
    run = sharing_gpu.Run(EngineLoop(scheduler, simulation.FakeDevice()), requests, "samples", 2)
    for _ in range(400):
        run.step()
    assert scheduler.waiting_totals.count > sharing_gpu.BACKLOG / 2
    assert 0 < run.looks.saved < 0.5
    assert run.looks.looks == 400 // sharing_gpu.STEPS_BETWEEN_LOOKS
    run.finish()
    assert scheduler.pool.counts.active == 0


def test_copies_hold_what_was_shared() -> None:
    """A real model gives beams the same tokens with blocks of their own."""
    llm = own_engine.start(
        str(ROOT / "e2e/tinymodel/model"), device="cpu", num_kv_blocks=200, max_model_len=None
    )
    found = {}
    for sharing in (True, False):
        loop = sharing_gpu.engine(llm, 200, sharing=sharing)
        for number in range(3):
            asked = sharing_gpu.params("beam", 4, 40)
            loop.add(wire.AddRequest(str(number), [20 + number, *range(30, 60)], asked))
        tokens = found[sharing] = []
        while loop.has_work:
            tokens += [(o.request_id, o.index, o.token_ids) for o in loop.step()]
        loop.scheduler.check_integrity()
    assert len(found[True]) == 12
    assert sorted(found[True]) == sorted(found[False])
