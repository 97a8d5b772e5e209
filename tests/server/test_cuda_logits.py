"""Log-probabilities in bfloat16, as near to float32 as transformers' own kernels come.

Of the same tokens and weights: the prompt's by our prefill, the drawn ones' by our decode steps,
through the engine; transformers' by each of its attention kernels, in one forward pass.
"""

import re
from contextlib import nullcontext

import pytest
import tiny_models
import torch
from gpu import needs_gpu_kernels
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from octavo import wire
from octavo.config import EngineConfig
from octavo.engine.startup import Reporter, start
from octavo.params import SamplingParams

pytestmark = needs_gpu_kernels

DEVICE = "cuda"
# Heads as published models have them, and as many layers as errors need to add up.
COMMON = {
    "vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
    "max_position_embeddings": 1024,
}  # fmt: skip
# Torch's fused attention knows no softcap.
MODELS = {
    "llama": ("llama", {}, True),
    "qwen3": ("qwen3", {"num_attention_heads": 16, "num_key_value_heads": 8}, True),
    "gemma2": ("gemma2", {"head_dim": 256, "num_attention_heads": 4, "sliding_window": 100}, False),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 4}, True),
}
FUSED = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
LENGTHS, COUNT = (300, 17, 130, 64), 48
# Of the largest distance among transformers' kernels, which are a small sample of what there can
# be.
SPREAD = 1.5


def model_of(name: str) -> tuple[tiny_models.Tiny, torch.nn.Module]:
    """Weights that keep the size of what they multiply, as trained ones about do."""
    family, changes, _ = MODELS[name]
    old = tiny_models.TINY[family]
    tiny = tiny_models.Tiny(
        old.architecture, old.config_class, {**old.changes, **COMMON, **changes}, old.hub
    )
    model = tiny_models.model_of(tiny)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor.mul_(10 * tensor.shape[-1] ** -0.5)
    return tiny, model.bfloat16()  # weights that all of them start from


def ours(folder: str, prompts: list[list[int]]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """All tokens of each sequence, and the log-probabilities of those after the first."""
    config = EngineConfig(
        model=folder, device=DEVICE, dtype="bfloat16", num_kv_blocks=200, max_num_seqs=8,
        max_model_len=512, max_num_batched_tokens=512,
    )  # fmt: skip
    loop, _ = start(config, Reporter(lambda _: None))
    asked = SamplingParams(
        temperature=1.0, seed=1, max_tokens=COUNT, ignore_eos=True, logprobs=1, prompt_logprobs=1
    )
    for i, prompt in enumerate(prompts):
        loop.add(wire.AddRequest(str(i), prompt, asked))
    tokens = [list(prompt) for prompt in prompts]
    found: list[list[float]] = [[] for _ in prompts]
    while loop.has_work:
        for output in loop.step():
            at = int(output.request_id)
            tokens[at] += output.token_ids
            found[at] += [p.logprob for p in output.prompt_logprobs or []]
            found[at] += [p.logprob for p in output.logprobs or []]
    return tokens, [torch.tensor(values) for values in found]


def loaded(folder, dtype=torch.bfloat16, how="eager") -> torch.nn.Module:
    """As a user loads it: what a model computes for itself, such as angles, stays in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=how, experts_implementation="eager"
    )
    return model.eval().to(DEVICE)


@torch.inference_mode()
def theirs(model: torch.nn.Module, tokens: list[list[int]], kernel=None) -> list[torch.Tensor]:
    """By the model as it stands; `kernel` is one of torch's fused ones."""
    found = []
    with sdpa_kernel(kernel) if kernel else nullcontext():
        for sequence in tokens:
            ids = torch.tensor([sequence], device=DEVICE)
            logits = model(ids).logits[0, :-1].float()
            found.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu())
    return found


def distance(name: str, found: list[torch.Tensor], truth: list[torch.Tensor]) -> tuple:
    """Of prompts and of drawn tokens. A router's near-ties make single tokens' values anything."""
    ends = []
    for part in (slice(None, -COUNT), slice(-COUNT, None)):
        apart = torch.cat([(a[part] - b[part]) for a, b in zip(found, truth, strict=True)]).abs()
        typical = apart.median() if MODELS[name][0] == "qwen3_moe" else apart.square().mean().sqrt()
        ends.append(float(typical))
    return tuple(ends)


@pytest.mark.filterwarnings("ignore")  # of what others deprecate in each other
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_within_the_spread_of_transformers_kernels(name, tmp_path) -> None:
    tiny, model = model_of(name)
    folder = tiny_models.write(tiny, model, tmp_path)
    random = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 2048, (n,), generator=random).tolist() for n in LENGTHS]
    tokens, found = ours(str(folder), prompts)
    assert [len(values) for values in found] == [len(sequence) - 1 for sequence in tokens]

    truth = theirs(loaded(folder, torch.float32), tokens)
    apart = {"eager": distance(name, theirs(loaded(folder), tokens), truth)}
    for kernel, back_end in FUSED.items() if MODELS[name][2] else ():
        try:
            values = theirs(loaded(folder, how="sdpa"), tokens, back_end)
        except RuntimeError as error:  # torch has no such kernel for this
            if re.search("No (available|viable)", str(error)):
                continue
            raise
        apart[kernel] = distance(name, values, truth)
    assert len(apart) >= 3 or not MODELS[name][2]
    mine = distance(name, found, truth)
    listed = {k: tuple(f"{x:.4f}" for x in v) for k, v in {"ours": mine, **apart}.items()}
    print(f"{name}: from float32, in nats, prompts and drawn tokens: {listed}")
    for part in range(2):
        assert mine[part] > 0
        assert mine[part] <= SPREAD * max(values[part] for values in apart.values())
