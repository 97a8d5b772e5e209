"""How attention is cut: enough work for a device, buffers that hold it, bits that stay."""

import pytest

from octavo_kernels.attention_settings import (
    DecodeSetting,
    PrefillSetting,
    decode_setting,
    prefill_setting,
)

LONG = 131072
SMS = 132


def decode(rows, columns=8, dim=128, length=LONG, deterministic=False) -> DecodeSetting:
    return decode_setting(rows, columns, dim, length, SMS, deterministic)


def items(setting: DecodeSetting, rows: int, columns: int, length: int) -> int:
    return rows * columns * min(setting.max_chunks, -(-length // setting.chunk))


@pytest.mark.parametrize("columns", [1, 2, 4, 8, 16, 32, 71])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 17, 32, 64, 256])
def test_long_sequences_fill_the_device_and_are_not_cut_much_finer(rows, columns) -> None:
    setting = decode(rows, columns)
    assert setting.chunk % 64 == 0
    assert items(setting, 1, columns, LONG) <= 2 * SMS or setting.max_chunks == 1
    if columns > 1:  # one key head has at most 128 chunks
        assert items(setting, rows, columns, LONG) > 0.5 * SMS


@pytest.mark.parametrize(
    ("rows", "chunk"), [(1, 128), (4, 128), (5, 256), (8, 256), (9, 512), (32, 512), (33, 1024)]
)
def test_the_more_decodes_the_longer_the_chunks(rows, chunk) -> None:
    assert decode(rows).chunk == chunk


def test_few_decodes_leave_room_for_the_next_kernel() -> None:
    assert decode(16) == DecodeSetting(512, 33, stages=2, blocks_per_sm=1)
    assert decode(17) == DecodeSetting(512, 33)
    assert decode(16, dim=64).stages == 4
    assert decode(16, columns=32).blocks_per_sm == 0  # they fill the device themselves


@pytest.mark.parametrize(("length", "most"), [(1, 1), (128, 1), (129, 2), (2048, 16), (LONG, 16)])
def test_no_more_chunks_than_the_longest_sequence_has(length, most) -> None:
    assert decode(1, length=length).max_chunks == most


@pytest.mark.parametrize("columns", [1, 8, 71, 1000])
def test_the_deterministic_cut_is_the_same_for_all_steps(columns) -> None:
    cuts = {
        (setting.chunk, setting.max_chunks)
        for rows in range(1, 300)
        for setting in [decode(rows, columns, deterministic=True)]
    }
    assert len(cuts) == 1


@pytest.mark.parametrize(
    ("queries", "longest", "warpgroups"),
    [
        (63, LONG, False), (64, 64, False), (64, 127, False), (64, 128, True), (64, None, True),
        (127, 127, False), (128, 128, True), (8192, 8192, True),
    ],
)  # fmt: skip
def test_hoppers_kernel_runs_where_it_is_faster(queries, longest, warpgroups) -> None:
    assert prefill_setting(queries, longest, False).warpgroups == warpgroups


@pytest.mark.parametrize(("longest", "span"), [(512, 0), (513, 512), (None, 512)])
def test_short_sequences_are_not_split(longest, span) -> None:
    assert prefill_setting(100, longest, False).min_span == span


@pytest.mark.parametrize(("queries", "longest"), [(1, 1), (100, 5000), (8192, 8192), (64, None)])
def test_the_deterministic_profile_has_one_kernel_and_no_spans(queries, longest) -> None:
    assert prefill_setting(queries, longest, True) == PrefillSetting(0, warpgroups=False)
