"""The memory plan: arithmetic that both halves rely on, with imports the operator can afford."""

import subprocess
import sys

import llama_checkpoints
import pytest
import torch

from octavo import plan

LLAMA_8B = plan.KvShape(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")


def test_llama_3_8b_takes_128_kib_a_token() -> None:
    assert LLAMA_8B.bytes_per_token == 128 * 1024
    assert plan.kv_bytes_per_block(LLAMA_8B, 16) == 2 * plan.MIB


def test_block_bytes_are_those_of_the_pool_that_is_allocated() -> None:
    for dtype in plan.DTYPE_BYTES:
        shape = plan.KvShape(3, 5, 64, dtype)
        pool = torch.empty((3, 2, 7, 8, 5, 64), dtype=getattr(torch, dtype), device="meta")
        assert pool.nbytes == 7 * plan.kv_bytes_per_block(shape, 8)


def test_weights_bytes_come_from_the_headers(tmp_path) -> None:
    folder = llama_checkpoints.write(tmp_path, dtype=torch.bfloat16, shards=2)
    tensors = llama_checkpoints.tensors(llama_checkpoints.config(), dtype=torch.bfloat16)
    stored = sum(t.nbytes for t in tensors.values())
    assert plan.weights_bytes(folder) == stored
    assert plan.weights_bytes(folder, "float32") == 2 * stored


def test_a_host_pool_is_modest_unless_all_is_asked_for() -> None:
    assert plan.host_pool_bytes(64 * plan.GIB, 0.9) == plan.GIB
    assert plan.host_pool_bytes(64 * plan.GIB, 1.0) == 64 * plan.GIB - plan.HOST_RESERVE_BYTES
    small = plan.HOST_RESERVE_BYTES + 100 * plan.MIB
    assert plan.host_pool_bytes(small, 0.5) == 50 * plan.MIB
    assert plan.host_pool_bytes(plan.MIB, 0.9) == 0


def test_a_device_pool_leaves_the_rest_of_the_device_alone() -> None:
    total, weights = 100 * plan.GIB, 16 * plan.GIB
    assert plan.device_pool_bytes(total, total - weights, 0.9) == pytest.approx(74 * plan.GIB)
    assert plan.device_pool_bytes(total, 5 * plan.GIB, 0.9) == 0


@pytest.mark.parametrize(
    ("tokens", "total_gib", "largest"),
    [
        (2048, 80, 8192),
        (512, 80, 2048),
        (4096, 80, 8192),
        (8192, 80, 8192),
        (16384, 80, 16384),
        (2048, 48, 6144),
        (2048, 24, 4096),
        (2048, 16, 2048),
    ],
)
def test_large_steps_are_bounded_by_what_they_take_from_the_cache(
    tokens, total_gib, largest
) -> None:
    each = plan.token_bytes(
        hidden_size=4096, query_size=4096, kv_size=1024, intermediate_size=14336, dtype="bfloat16"
    )
    assert each == 2 * (2 * 4096 + 3 * 14336)
    assert plan.large_step(tokens, each, total_gib * plan.GIB, (None,)) == largest
    assert plan.large_step(tokens, each, total_gib * plan.GIB, (None, 512)) == tokens, "as promised"
    assert (largest - tokens) * each <= total_gib * plan.GIB / 100


def test_the_plan_needs_only_the_standard_library() -> None:
    program = (
        "import sys; import octavo.plan, octavo.ledger; "
        "heavy = {'torch', 'numpy', 'msgspec', 'transformers'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30,
        env={"PYTHONPATH": str(next(p for p in sys.path if p.endswith("server")))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
