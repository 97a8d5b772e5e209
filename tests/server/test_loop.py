"""The loop with a virtual clock: bad requests fail alone, the load report follows the scheduler."""

import pytest
from fake_runner import BrokenRunner, FakeRunner

from octavo import wire
from octavo.core.block_pool import BlockPool
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits
from octavo.core.scheduler import Scheduler
from octavo.core.step import StepResult
from octavo.engine.loop import Clock, EngineLoop, RunnerError
from octavo.params import SamplingParams


class Time:
    """A clock that moves only when told; each reading within a step is one step time later."""

    def __init__(self):
        self.now = 100.0

    def clock(self):
        return Clock(monotonic=lambda: self.now, wall=lambda: 1.79e9 + self.now)


def timed(runner_type, time, seconds):
    class Timed(runner_type):
        def run(self, plan):
            time.now += seconds
            return super().run(plan)

    return Timed


def make(runner_type=FakeRunner, *, time=None, blocks=16, seconds=0.1, budget=16, context=64):
    time = time or Time()
    limits = Limits(
        block_size=4,
        max_model_len=context,
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        vocab_size=97,
        eos_token_ids=frozenset({3}),
    )
    runner = timed(runner_type, time, seconds)(
        "m", device="cpu", dtype="", max_model_len=64, block_size=4, progress=lambda *_: None
    )
    runner.allocate_kv(blocks + 1)
    scheduler = Scheduler(BlockPool(blocks), PolicyFactory.get_policy("fcfs"), limits)
    return EngineLoop(scheduler, runner, time.clock())


def request(name, prompt=(5, 6, 7), **params):
    return wire.AddRequest(name, list(prompt), SamplingParams(ignore_eos=True, **params))


def run_dry(loop):
    outputs = []
    while loop.has_work:
        outputs += loop.step()
    return outputs


BAD = [
    (request("bad", (97,)), "token id 97"),
    (request("bad", ()), "no tokens"),
    (request("bad", (5,) * 64), "at most 63"),
    (request("bad", temperature=9.0), "temperature must be"),
    (request("bad", top_k=0), "top_k must be"),
]


@pytest.mark.parametrize(("bad", "text"), BAD)
def test_a_bad_request_ends_alone_with_its_error(bad, text):
    quiet, disturbed = make(), make()
    for loop in (quiet, disturbed):
        loop.add(request("good", max_tokens=6))
    expected = run_dry(quiet)
    disturbed.step()
    disturbed.add(bad)
    outputs = run_dry(disturbed)
    (error,) = [o for o in outputs if o.request_id == "bad"]
    assert (error.finish_reason, error.token_ids) == ("error", [])
    assert text in error.error
    assert [o for o in outputs if o.request_id == "good"] == expected[1:]


def test_a_second_request_with_the_same_id_does_not_end_the_first():
    """Ids are unique by contract; if one is not, the API must still see an end for each."""
    loop = make()
    loop.add(request("a", max_tokens=2))
    loop.add(request("a", max_tokens=2))
    reasons = [o.finish_reason for o in run_dry(loop)]
    assert reasons == ["error", None, "length"]


def test_an_abort_is_answered_once_and_only_for_what_is_there():
    loop = make()
    loop.add(request("a", max_tokens=9))
    loop.step()
    for name in ("a", "a", "nobody"):
        loop.abort(name)
    assert [(o.request_id, o.finish_reason) for o in run_dry(loop)] == [("a", "abort")]


def test_abort_all_ends_running_and_waiting():
    loop = make()
    for i in range(20):
        loop.add(request(str(i), max_tokens=30))
    loop.step()
    loop.abort_all()
    assert sorted(o.request_id for o in run_dry(loop)) == sorted(str(i) for i in range(20))
    assert loop.load().blocks.free == 16


def test_an_exception_of_the_runner_passes_through():
    loop = make(BrokenRunner)
    loop.add(request("a", max_tokens=30))
    with pytest.raises(RuntimeError, match="device fell off the bus"):
        run_dry(loop)


def test_a_runner_that_draws_too_few_tokens_is_a_bug_that_is_named():
    class Short(FakeRunner):
        def run(self, plan):
            return StepResult([])

    loop = make(Short)
    loop.add(request("a"))
    with pytest.raises(RunnerError, match="drew 0 tokens for 1 sequences"):
        loop.step()


def test_an_idle_step_does_nothing():
    loop = make(BrokenRunner)
    assert not loop.has_work
    assert [loop.step() for _ in range(20)] == [[]] * 20


def test_the_load_report_follows_the_scheduler():
    time = Time()
    loop = make(time=time, blocks=14)
    idle = loop.load()
    assert idle.blocks == wire.Blocks(total=14, active=0, shared=0, cached=0, free=14)
    assert (idle.kv_utilization, idle.running, idle.waiting) == (0, 0, 0)
    assert idle.last_activity == 1.79e9 + 100

    time.now = 150.0
    loop.add(request("a", [5] * 8, max_tokens=40))
    loop.add(request("b", [5] * 30, max_tokens=20))
    loop.step()
    load = loop.load()
    assert load.blocks == wire.Blocks(total=14, active=2, shared=0, cached=0, free=12)
    assert load.kv_utilization == 2 / 14
    assert (load.running, load.waiting, load.waiting_blocks) == (1, 1, 8)
    assert set(load.demand_blocks.values()) == {11}, "nobody has decoded: no pace is known"
    assert load.prefill_backlog_s == pytest.approx(30 / 80)
    assert load.step_budget_used == 8 / 16
    assert (load.steps, load.prompt_tokens, load.generation_tokens) == (1, 8, 1)
    assert load.last_activity == 1.79e9 + 150.1

    loop.step()
    load = loop.load()
    # a's 48 tokens take 12 blocks, b's 50 take 13, of which two are a's.
    assert load.demand_blocks == {"now": 9, "10s": 23, "30s": 23, "60s": 23}
    assert 0 < load.seconds_to_exhaustion < 10

    run_dry(loop)
    load = loop.load()
    assert (load.prompt_tokens, load.generation_tokens) == (38, 60)
    assert (load.running, load.waiting, load.step_budget_used) == (0, 0, 0)
    assert load.demand_blocks["60s"] == 0


def test_utilization_counts_only_blocks_in_use_and_preemptions_are_told():
    loop = make(blocks=8)
    loop.scheduler.output_lengths.mean = 0
    for i in range(4):
        loop.add(request(str(i), [5] * 4, max_tokens=20))
    peak = 0.0
    while loop.has_work:
        loop.step()
        load = loop.load()
        assert load.blocks.active + load.blocks.cached + load.blocks.free == load.blocks.total
        peak = max(peak, load.kv_utilization)
    assert peak == 1.0
    assert loop.load().preemptions > 0


def longest_gap(target_itl_s):
    """The longest step while one stream decodes and long prompts come; 10 ms and 1 ms a token."""
    time = Time()

    taken = []

    class Linear(FakeRunner):
        def run(self, plan):
            seconds = 0.010 + 0.001 * plan.num_tokens
            time.now += seconds
            taken.append(seconds)
            return super().run(plan)

    loop = make(Linear, time=time, blocks=400, seconds=0, budget=200, context=512)
    loop._target_itl_s = target_itl_s
    loop.add(request("warm", [5] * 90, max_tokens=12))
    run_dry(loop)
    loop.add(request("stream", [5] * 4, max_tokens=200))
    loop.step()
    taken.clear()
    for i in range(4):
        loop.add(request(f"long{i}", [7 + i] * 300, max_tokens=2))
    assert len([o for o in run_dry(loop) if o.finish_reason]) == 5
    return max(taken)


def test_chunks_are_sized_to_keep_the_inter_token_target():
    assert longest_gap(None) == pytest.approx(0.21)
    assert 0.04 < longest_gap(0.06) <= 0.0601
    # A target that cannot be met: prompts still move on, by the smallest chunk.
    assert longest_gap(0.001) <= 0.010 + 0.001 * (16 + 5)
