"""Every kernel once in each type, at sizes that tools a hundred times slower than a GPU can take.

Sizes are the least at which a kernel does all it can: more than one tile, chunk, stage and part.
"""

import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import test_batch_state as batch
import test_cuda_decode as decode
import test_cuda_elementwise as elementwise
import test_cuda_gated_gemm as gated
import test_cuda_gemm as gemm
import test_cuda_moe as moe
import test_cuda_persistent as persistent
import test_cuda_prefill as prefill
import test_cuda_sampling as sampling
import torch
from gpu import needs_gpu_kernels
from wide_products import WideProducts

from octavo_kernels import ops
from octavo_kernels.attention_settings import DecodeSetting

pytestmark = needs_gpu_kernels

SOURCES = Path(__file__).resolve().parents[2] / "kernels/csrc/cuda"
FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu")


def attend_decodes(dim: int, dtype: torch.dtype, stages: int, **more) -> None:
    """Chunks of one tile and of several, put together by whoever comes last."""
    variant = ops.Variant(window=70, softcap=5.0, sinks=torch.linspace(-2, 9, 4, device="cuda"))
    for of in (variant, ops.PLAIN):
        lengths = (1, 0, 17, 200)
        case = decode.Case(lengths, heads=4, kv_heads=1, dim=dim, dtype=dtype, variant=of, **more)
        inputs = decode.make(case)
        setting = DecodeSetting(chunk=64, max_chunks=66, stages=stages, blocks_per_sm=1)
        work = decode.work_for(case, max_seq_len=256, setting=setting)
        decode.check(inputs, decode.attend(inputs, work))


def attend_chunks(dim: int, dtype: torch.dtype, **more) -> None:
    """Rows of one tile and of two, keys in one span and in several."""
    sequences = ((3, 40), (70, 150), (1, 9))
    common = {"heads": 4, "kv_heads": 2, "dim": dim, "dtype": dtype, **more}
    for masks in ({}, {"window": 50, "softcap": 5.0, "sinks": True}):
        for min_span in (0, 64):
            prefill.check(prefill.Case(sequences, min_span=min_span, **common, **masks))


def attend_wide_groups(dtype: torch.dtype, dim: int) -> None:
    prefill.check(prefill.Case(((140, 140),), heads=8, kv_heads=1, dim=dim, dtype=dtype))
    prefill.check(prefill.Case(((40, 60),), heads=1, kv_heads=1, dim=dim, dtype=dtype))


def swap_and_copy() -> None:
    elementwise.test_copy_blocks_keeps_the_order_of_the_pairs()
    elementwise.test_blocks_leave_for_host_memory_and_come_back(2)


def experts(dtype: torch.dtype, tokens: int) -> None:
    size = moe.experts_of(8, 2, 72, 40, dtype, bias=True, swiglu_limit=1.0, swiglu_alpha=1.7)
    x, logits = moe.normal(tokens, 72, dtype=dtype, seed=5), moe.logits_of(tokens, 8, dtype)
    moe.check(x, logits, size)


def gated_products(dtype: torch.dtype) -> None:
    """More than one tile of rows, of columns and of what is summed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gated.cuda_gemm, "gated_from", 1)
        gated.test_gated_products(384, 320, 257, dtype)


def layers_in_one(dtype: torch.dtype, dim: int, engine_tokens: int) -> None:
    """Contexts copied a word at a time, or by the copy engine."""

    class Stack(persistent.Stack):
        def prepared(self) -> ops.LayerStack | None:
            found = super().prepared()
            found.native.engine_tokens = engine_tokens
            return found

    sizes = {"kv_heads": 1, "dim": dim, "dtype": dtype, "blocks": 40, "vocab": 520}
    persistent.check(Stack(**sizes), [70, 0, 17], persistent.LIMIT[dtype])
    persistent.check_whole(Stack(**sizes), [70, 0, 17])


def draw(dtype: torch.dtype) -> None:
    sampling.test_the_tokens_are_the_reference_s(9001, 2.0, dtype, 5)
    sampling.test_token_logprobs(5003, 1.0, dtype, 3)


def state_of_the_batch() -> None:
    for one_token in (True, False):
        batch.test_inputs_are_those_of_plain_python("cuda", 3, one_token)
    batch.test_tokens_go_to_the_records_of_those_that_sample("cuda")
    batch.test_updates_write_their_words_and_nothing_else("cuda")


def case(source: str, name: str, function: Callable[..., None], *args, **named):
    """`source` is the file of the kernel that it is there for."""
    inspect.signature(function).bind(*args, **named)  # where there is no GPU too

    def run() -> None:
        ops.calls.clear()  # some count them
        with ops.forced("cuda"), WideProducts():
            function(*args, **named)

    return pytest.param(run, id=f"{source}: {name}")


def cases_of(dtype: torch.dtype) -> list:
    """First what stands on the most assumptions about blocks and memory."""
    name = str(dtype).removeprefix("torch.")
    made = [
        case("persistent_layers", f"{name} {dim} {tokens}", layers_in_one, dtype, dim, tokens)
        for dim in (64, 128)
        for tokens in (0, 1 << 20)
    ]
    if prefill.HOPPER:
        made.append(case("gated_gemm", name, gated_products, dtype))
        made += [case("prefill_warpgroup", f"{name} {dim}", attend_chunks, dim, dtype,
                      warpgroups=True) for dim in (64, 128)]  # fmt: skip
    made += [
        case("moe", f"{name} few", experts, dtype, 3),
        case("moe", f"{name} many", experts, dtype, 150),
        case("sampling", name, draw, dtype),
    ]
    made += [case("prefill_attention", f"{name} {dim}", attend_chunks, dim, dtype)
             for dim in prefill.DIMS]  # fmt: skip
    made += [case("prefill_attention", f"{name} {dim} wide groups", attend_wide_groups, dtype, dim)
             for dim in prefill.DIMS]  # fmt: skip
    made += [
        case("decode_attention", f"{name} {dim}", attend_decodes, dim, dtype, stages)
        for dim, stages in ((64, 3), (80, 2), (96, 2), (128, 2), (256, 1))
    ]
    made += [case("decode_attention", f"{name} {b} a block", attend_decodes, 64, dtype, 2,
                  block_size=b) for b in (8, 128)]  # fmt: skip
    made += [
        case("skinny_gemm", f"{name} {n} {k} {rows}", gemm.test_linear, n, k, rows, dtype)
        for n, k, rows in ((1, 8, 1), (9, 40, 7), (100, 1000, 8), (100, 1000, 16), (40, 14336, 9))
    ]
    made += [
        case("skinny_gemm", f"{name} normed", gemm.test_linear_with_norm, 3, 1032, 1.0, dtype),
        case("skinny_gemm", f"{name} gated", gemm.test_gated_linear, 5, 12, 64, "silu", dtype),
        case("skinny_gemm", f"{name} added", gemm.test_linear_add, 16, 17, 520, dtype),
    ]
    return [*made, *small_cases_of(dtype, name)]


def small_cases_of(dtype: torch.dtype, name: str) -> list:
    """What goes over each element once."""
    made = [
        case("elementwise", f"{name} embedding", elementwise.test_embed, 2.0, dtype),
        case("heads", f"{name} stored", elementwise.test_write_kv, 64, dtype),
    ]
    for width in (72, 8200):
        norm, other = elementwise.test_rms_norm, elementwise.test_layer_norm
        made.append(case("norm", f"{name} {width}", norm, 3, width, dtype))
        made.append(case("norm", f"{name} {width} of layers", other, True, width, dtype))
    made += [case("elementwise", f"{name} {f}", elementwise.test_activations, 136, f, dtype)
             for f in FUNCTIONS]  # fmt: skip
    heads = elementwise.test_heads_on_their_way_to_attention
    made += [
        case("heads", f"{name} {d} turned by {r}", heads, 4, 2, d, r, interleaved, True, dtype)
        for d in (64, 128, 256)
        for r, interleaved in ((32, False), (64, True))
    ]
    return made


CASES = [
    *cases_of(torch.bfloat16),
    case("batch_state", "", state_of_the_batch),
    case("sampling", "equal logits", sampling.test_of_equals_the_lower_ids_are_kept, 5000),
    case("sampling", "ends", sampling.test_slots_and_ends),
    case("penalties", "", sampling.test_adjustments_and_what_they_count),
    case("cache", "", swap_and_copy),
    case("sampling", "float32", draw, torch.float32),
    *cases_of(torch.float16),
]


@pytest.mark.smallest
@pytest.mark.parametrize("run", CASES)
def test_smallest(run) -> None:
    run()


@pytest.mark.skipif("OCTAVO_TEST_SHARD" in os.environ, reason="compute-sanitizer bears no tracer")
@pytest.mark.filterwarnings("ignore")  # the tracer's, of itself
def test_that_is_every_kernel() -> None:
    """Those whose names the GPU's tracer saw are those of the sources."""
    wanted = kernels_of_the_sources()
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as seen:
        for made in CASES:
            made.values[0]()
        torch.cuda.synchronize()
    kernels = {e.name for e in seen.events() if "octavo::cuda::" in e.name}
    print(f"{len(kernels)} kernels of {len(wanted)} templates ran")
    ran = {word for name in kernels for word in re.findall(r"\w+", name)}
    assert not prefill.HOPPER or wanted - ran == set()


def kernels_of_the_sources() -> set[str]:
    """By the name that stands before the first parameter; a probe is loaded and never run."""
    found = []
    for path in [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")]:
        text = path.read_text()
        bounds = r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)"
        of_file = re.findall(rf"__global__\s+void\s+(?:\w+\s+)?(?:{bounds}\s+)?(\w+)\(", text)
        assert len(of_file) == text.count("__global__"), path.name
        found += of_file
    assert len(found) > 25
    return set(found) - {"probe"}
