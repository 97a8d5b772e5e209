"""Groups of layers: what a block holds, what slides, what is found again; against brute force."""

import itertools
import random
from types import SimpleNamespace

import pytest
from grouped_engine import TEXT, Engine, digests_of, run_traffic, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.block_pool import NO_BLOCK, BlockPool
from octavo.core.kv_groups import slide
from octavo.core.request import RequestError
from octavo.core.step import NO_TOKEN
from octavo.kv_layout import GROUP_WORTH, KvGroups, kv_layout

# Layers to groups.


def pattern(windowed, full, every, window=1024):
    """Layers of which each `every`-th keeps everything, until there are so many."""
    kinds = [window] * windowed + [None] * full
    for i in range(full):
        kinds.insert((i + 1) * every - 1, kinds.pop())
    return kinds


LAYOUTS = [
    # Llama, Mistral, Gemma 2 2B, GPT-OSS 20B, Gemma 3 1B, 4B, 12B, 27B, Command R7B
    ([None] * 32, 32, 1, 0),
    ([4096] * 32, 32, 1, 0),
    ([4096, None] * 13, 13, 2, 0),
    ([128, None] * 12, 12, 2, 0),
    (pattern(22, 4, 6, 512), 4, 7, 2),
    (pattern(29, 5, 6), 5, 7, 1),
    (pattern(40, 8, 6), 8, 6, 0),
    (pattern(52, 10, 6), 13, 5, 3),
    ([4096, 4096, 4096, None] * 8, 8, 4, 0),
    ([8, 16, None] * 3, 3, 3, 0),
]


@pytest.mark.parametrize(("windows", "size", "groups", "padded"), LAYOUTS)
def test_layers_of_one_kind_share_blocks(windows, size, groups, padded):
    layout = kv_layout(windows, 32768)
    found = (layout.layers_per_group, len(layout.windows), layout.padded_layers)
    assert found == (size, groups, padded)
    assert len(set(layout.places)) == len(windows), "two layers in one plane"
    for window, (group, plane) in zip(windows, layout.places, strict=True):
        assert layout.windows[group] == window
        assert plane < layout.layers_per_group
    assert layout.windows == tuple(sorted(layout.windows, key=lambda w: w or 0))


def test_a_window_that_no_sequence_outgrows_is_none():
    assert kv_layout([64, None, 64], 64).windows == (None,)
    assert kv_layout([64, None, 64], 65).windows == (None, 64, 64)


@given(st.lists(st.sampled_from([None, 4, 9]), min_size=1, max_size=60))
def test_one_kind_is_one_group_and_padding_is_worth_the_groups_it_saves(windows):
    layout = kv_layout(windows, 100)
    if len(set(windows)) == 1:
        assert len(layout.windows) == 1
    # Against groups of one layer, which waste nothing.
    saved = len(windows) - len(layout.windows)
    planes = len(layout.windows) * layout.layers_per_group
    assert layout.padded_layers / planes <= GROUP_WORTH * saved


# Arithmetic.


@given(
    size=st.integers(1, 9), window=st.integers(1, 40), tokens=st.integers(0, 120),
    chunk=st.integers(1, 50),
)  # fmt: skip
def test_blocks_are_what_a_sequence_can_hold(size, window, tokens, chunk):
    """Against running every chunk of every length and counting the rows it touches."""
    kv = KvGroups(size, (None, window))
    held = most = 0
    for end in range(1, tokens + 1):
        for count in {1, min(chunk, end)}:
            first = max(0, end - count + 1 - window)
            rows = (end - 1) // size - first // size + 1
            most = max(most, rows)
            held = max(held, rows if count == 1 else 0)
    full = -(-tokens // size)
    assert full + held <= kv.settled(tokens) == kv.blocks([tokens]) <= full + held + 1
    assert full + most <= kv.blocks([tokens], chunk=chunk) <= full + most + 2
    assert kv.settled(tokens) - full <= (window - 1) // size + 2


@given(
    windows=st.lists(st.one_of(st.none(), st.integers(1, 30)), min_size=1, max_size=3),
    size=st.integers(1, 8), blocks=st.integers(1, 60), branches=st.integers(1, 4),
    prompt=st.integers(0, 30), chunk=st.integers(1, 40),
)  # fmt: skip
def test_the_longest_is_the_last_that_fits(windows, size, blocks, branches, prompt, chunk):
    kv = KvGroups(size, tuple(windows))
    longest = kv.longest(blocks, 200, branches=branches, prompt=prompt, chunk=chunk)
    fits = [t for t in range(201) if kv.blocks([t] * branches, prompt, chunk) <= blocks]
    assert longest == max(fits, default=-1)


# Sliding.


@given(data=st.data(), size=st.integers(1, 5), count=st.integers(1, 3))
def test_what_no_token_sees_is_given_up_and_nothing_else(data, size, count):
    windows = [data.draw(st.one_of(st.none(), st.integers(1, 12))) for _ in range(count)]
    kv, pool = KvGroups(size, tuple(windows)), BlockPool(200)
    rows = data.draw(st.integers(1, 12))
    sequence = SimpleNamespace(block_table=pool.allocate(rows * count))
    before = sequence.block_table
    given = list(before)
    for position in sorted(data.draw(st.lists(st.integers(0, rows * size - 1), max_size=4))):
        slide(sequence, position, kv, pool)
        for row, group in itertools.product(range(rows), range(count)):
            window = windows[group]
            last_of_row = (row + 1) * size - 1
            seen = window is None or last_of_row > position - window
            kept = sequence.block_table[row * count + group]
            assert kept == (given[row * count + group] if seen else NO_BLOCK)
        pool.check_integrity([sequence.block_table])
    assert before == given, "a table that a plan may hold was changed"


GROUPS = [(None, 8), (8,), (None, 5, 13), (6, 11), (None, None, 3)]


@pytest.mark.parametrize("windows", GROUPS)
@pytest.mark.parametrize("budget", [7, 64])
def test_blocks_held_at_ten_times_the_window_are_bounded(windows, budget):
    engine = Engine(windows, context=400, blocks=400, budget=budget)
    length = 10 * max(w or 0 for w in windows)
    engine.add("a", TEXT[: length // 2], length // 2)
    held = dict.fromkeys(range(len(windows)), 0)
    while engine.scheduler.has_work:
        plan = engine.step()
        if len(plan.sequences[0].token_ids) == 1:
            table = plan.sequences[0].block_table
            for group in held:
                column = [b for b in table[group :: len(windows)] if b != NO_BLOCK]
                held[group] = max(held[group], len(column))
    for group, window in enumerate(windows):
        if window is None:
            assert held[group] == -(-(length - 1) // 4)
        else:
            assert held[group] <= window / 4 + 2


def test_a_long_prompt_gives_blocks_up_between_its_chunks():
    engine = Engine((8,), context=400, blocks=12, budget=16)
    engine.add("a", TEXT[:300], 20)
    most = 0
    while engine.scheduler.has_work:
        engine.step()
        most = max(most, engine.scheduler.pool.counts.active)
    # 300 tokens are 75 blocks; a chunk's four and the window's three are held at most.
    assert most <= 7
    assert engine.outputs["a", 0] == sample(TEXT[:300], 0, 20)


def test_windows_let_more_run_at_once():
    def running(windows):
        engine = Engine(windows, blocks=80, context=400, budget=512)
        engine.scheduler.output_lengths.mean = 100
        for i in range(8):
            engine.add(str(i), TEXT[i : i + 40], 100)
        for _ in range(4):
            engine.step()
        return engine.scheduler.num_running

    assert [running(windows) for windows in ((None, None), (None, 8), (8, 8))] == [1, 3, 8]


def test_a_request_must_fit_with_the_largest_chunk():
    engine = Engine((None, 8), blocks=20, budget=16, context=400)
    # Full: 13 blocks of 50 tokens; windowed: 3 for the window and 4 for a chunk's other tokens.
    assert engine.scheduler.max_len == 13 * 4
    with pytest.raises(RequestError, match=r"at most 51 leave room .*KV cache 52"):
        engine.add("a", TEXT[:52])
    engine.add("a", TEXT[:40], None)
    assert len(engine.finish()["a", 0]) == 12


def test_with_windows_alone_the_context_is_the_only_bound():
    engine = Engine((8,), blocks=8, budget=8, context=400)
    assert engine.scheduler.max_len == 400
    engine.add("a", TEXT[:300], None)
    assert len(engine.finish()["a", 0]) == 100


# What is found again.


def usable(prompts_before, tokens, windows, size, present):
    """By definition: try every number of rows, look at each group."""
    best = 0
    for rows in range(1, len(tokens) // size + 1):
        first_query = min(rows * size, len(tokens) - 1)
        good = True
        for group, window in enumerate(windows):
            for row in range(rows):
                seen = window is None or (row + 1) * size - 1 > first_query - window
                good &= not seen or present(tuple(tokens[: (row + 1) * size]), group)
        if good:
            best = rows
    return best


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_usable_prefix_is_the_longest_that_every_group_has(data):
    """Random blocks are forgotten behind the cache's back; what is found is what brute force finds.

    The rows that are found are the same blocks that were published for those tokens.
    """
    windows = data.draw(st.sampled_from(GROUPS))
    size = data.draw(st.sampled_from([1, 2, 4]))
    engine = Engine(windows, block_size=size, blocks=600, context=128, budget=256)
    prompt = TEXT[: data.draw(st.integers(1, 60))]
    engine.run(prompt, data.draw(st.integers(1, 5)))
    pool = engine.scheduler.pool
    cached = sorted(pool._key_of)
    gone = data.draw(st.lists(st.sampled_from(cached), max_size=6)) if cached else []
    pool.forget(gone)
    at = data.draw(st.integers(1, 60))
    tokens = [*prompt[:at], *data.draw(st.sampled_from([[], [1], [2, 3, 4, 5, 6]]))]
    contents = {}
    for block, (_, packed, group) in pool._key_of.items():
        contents[block] = (packed, group)
    known = {}

    def present(beginning, group):
        """Looked up by what lies in the slots of the block, not by its key."""
        return digests_of(beginning)[-1] in known.get(group, ())

    for block, (_, group) in contents.items():
        known.setdefault(group, set()).add(engine.runner.slots[(block + 1) * size - 1])
    expected = usable([prompt], tokens, windows, size, present)
    engine.add("probe", tokens, 2)
    found = engine.scheduler.prefix_cache.find(next(iter(engine.scheduler._roster.waiting)).lead)
    assert found.rows == expected
    assert len(found.table) == expected * len(windows)
    engine.finish()
    assert engine.outputs["probe", 0] == sample(tokens, 0, 2)


def test_a_hit_needs_only_the_window_of_a_windowed_group():
    engine = Engine((None, 8), blocks=64)
    engine.run(TEXT[:64])
    pool = engine.scheduler.pool
    # All blocks of the window's group but those of the last 8 of 48 tokens.
    by_end = {
        pool_slot: block
        for block, (_, _, group) in pool._key_of.items()
        if group == 1
        for pool_slot in [engine.runner.slots[block * 4 + 3]]
    }
    digests = digests_of(TEXT[:64])
    keep = {digests[43], digests[47]}
    pool.forget([block for end, block in by_end.items() if end not in keep])
    assert engine.run([*TEXT[:48], 1, 2, 3]) == 48
    assert engine.run([*TEXT[:44], 9, 9, 9]) == 0, "positions 37 to 39 are gone"


def test_a_full_repeat_writes_nothing_in_any_group():
    engine = Engine((None, 8))
    engine.run(TEXT[:16])
    engine.add("b", TEXT[:16], 5, n=2)
    plan = engine.step()
    assert [(s.start, s.writes) for s in plan.sequences] == [(15, False)] * 2
    assert plan.sequences[0].block_table[1] == NO_BLOCK, "position 7 is the first that is seen"
    assert engine.finish()["b", 1] == sample(TEXT[:16], 1, 5)


def test_what_may_hold_nan_is_found_in_no_group_again():
    engine = Engine((None, 4), budget=8)
    engine.add("a", TEXT[:16])
    engine.step()
    plan = engine.scheduler.plan()
    engine.runner.collect(engine.runner.submit(plan))
    engine.scheduler.commit(plan, [NO_TOKEN])
    assert engine.scheduler.pool.counts.free == 64
    assert engine.run(TEXT[:16]) == 0


# Tokens.

SETTINGS = list(itertools.product(GROUPS, [1, 3, 4, 16], [5, 64], [False, True]))


@pytest.mark.parametrize(("windows", "block_size", "budget", "caching"), SETTINGS)
def test_samples_depend_on_no_setting_and_no_preemption(windows, block_size, budget, caching):
    requests = [
        (TEXT[i : i + 3 + 9 * i], n, 3 + 2 * i) for i, n in enumerate((4, 1, 3, 2, 4, 1, 2))
    ]
    wanted = {
        (f"r{i}", b): sample(prompt, b, count)
        for i, (prompt, n, count) in enumerate(requests)
        for b in range(n)
    }
    kv = KvGroups(block_size, windows)
    least = max(
        kv.blocks([len(prompt) + count] * n, len(prompt), budget) for prompt, n, count in requests
    )
    for blocks in (least, least + 3, 2 * least):
        engine = Engine(
            windows, blocks=blocks, block_size=block_size, budget=budget, caching=caching, seqs=9
        )
        for i, (prompt, n, count) in enumerate(requests):
            engine.add(f"r{i}", prompt, count, n)
        assert engine.finish() == wanted


def test_random_traffic_preempts_hits_and_keeps_its_tokens():
    """Adds, aborts and steps at random over small pools; every read is checked by the runner."""
    preemptions = hits = copies = 0
    for seed in range(180):
        rng = random.Random(seed)
        windows = rng.choice(GROUPS)
        size, budget = rng.choice([1, 2, 3, 8]), rng.choice([3, 8, 30])
        engine = Engine(
            windows, blocks=len(windows) * rng.randint(14, 60) // size, block_size=size,
            budget=budget, seqs=6, context=rng.choice([40, 90]), caching=rng.random() < 0.7,
            policy=rng.choice(["fcfs", "priority"]), depth=rng.choice([1, 2]),
        )  # fmt: skip
        run_traffic(engine, rng)
        preemptions += engine.scheduler.counters.preemptions
        copies += engine.scheduler.counters.copies
        hits += engine.scheduler.prefix_cache.counters.hits
    assert preemptions > 100
    assert hits > 500
    assert copies > 50
