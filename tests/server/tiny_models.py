"""Tiny random models of every family, made by transformers' own classes and saved by them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB = 96
# A head has 64 elements, which the CUDA kernels serve too.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 50 for i in range(24)],
    "long_factor": [1.5 + i / 10 for i in range(24)],
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}


@dataclass(frozen=True)
class Tiny:
    """A config of one of transformers' classes; `hub` changes the saved config.json afterwards,
    to the keys that published models of the family have (a value of None removes a key).
    """

    architecture: str
    config_class: str
    changes: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)


def _older(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": None, "rope_theta": theta, **more}


GPT2 = {"n_embd": 256, "n_head": 4, "n_layer": 2, "n_positions": 256, "head_dim": None}
OPT = {"ffn_dim": 160, "word_embed_proj_dim": 256}
GEMMA_WINDOWS = {"num_hidden_layers": 4, "sliding_window": 24}
TINY = {
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig"),
    "llama yarn": Tiny("LlamaForCausalLM", "LlamaConfig", {"rope_parameters": YARN}),
    "llama head of 48": Tiny("LlamaForCausalLM", "LlamaConfig", {"head_dim": 48}),
    "mistral": Tiny("MistralForCausalLM", "MistralConfig", {"sliding_window": 20}),
    "mistral without window": Tiny(
        "MistralForCausalLM", "MistralConfig", {"sliding_window": None}, _older(10000.0)
    ),
    "qwen2": Tiny("Qwen2ForCausalLM", "Qwen2Config", hub={"layer_types": None}),
    "qwen2 window": Tiny(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen2 yarn": Tiny(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"rope_parameters": {**YARN, "rope_theta": 1e6}},
        _older(1e6, rope_scaling={"type": "yarn", **YARN, "rope_type": None}),
    ),
    "qwen3": Tiny("Qwen3ForCausalLM", "Qwen3Config", {"tie_word_embeddings": True}),
    "qwen3 bias": Tiny("Qwen3ForCausalLM", "Qwen3Config", {"attention_bias": True}),
    "gpt2": Tiny("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2 wide": Tiny("GPT2LMHeadModel", "GPT2Config", {**GPT2, "n_inner": 200}),
    "opt": Tiny("OPTForCausalLM", "OPTConfig", OPT),
    "opt without bias": Tiny("OPTForCausalLM", "OPTConfig", {**OPT, "enable_bias": False}),
    "gemma": Tiny("GemmaForCausalLM", "GemmaConfig"),
    "gemma2": Tiny(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GEMMA_WINDOWS, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        {"layer_types": None},
    ),
    "gemma3": Tiny(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**GEMMA_WINDOWS, "query_pre_attn_scalar": 48, "sliding_window_pattern": 3},
    ),
    "gemma3 linear": Tiny(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **GEMMA_WINDOWS,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {
            "layer_types": None,
            "sliding_window_pattern": 2,
            "rope_parameters": None,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
    ),
    "phi3": Tiny("Phi3ForCausalLM", "Phi3Config", {"sliding_window": 40}),
    "phi3 longrope, beyond": Tiny(
        "Phi3ForCausalLM",
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    ),
    "phi3 longrope, within": Tiny(
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            "rope_parameters": {**LONGROPE, "factor": 4.0},
            "original_max_position_embeddings": 256,
        },
        _older(
            10000.0,
            rope_scaling={
                "type": "su",
                "factor": 4.0,
                "short_factor": LONGROPE["short_factor"],
                "long_factor": LONGROPE["long_factor"],
            },
            partial_rotary_factor=0.75,
        ),
    ),
    "smollm3": Tiny("SmolLM3ForCausalLM", "SmolLM3Config", {"num_hidden_layers": 4}),
    "smollm3 window": Tiny(
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 20},
        {"layer_types": None},
    ),
    "granite": Tiny(
        "GraniteForCausalLM",
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.05,
            "residual_multiplier": 0.6,
            "logits_scaling": 1.7,
        },
    ),
    "olmo2": Tiny("Olmo2ForCausalLM", "Olmo2Config"),
    "stablelm": Tiny(
        "StableLmForCausalLM",
        "StableLmConfig",
        {"use_qkv_bias": True},
        _older(10000.0, partial_rotary_factor=0.25),
    ),
    "stablelm parallel": Tiny(
        "StableLmForCausalLM", "StableLmConfig", {"use_parallel_residual": True}
    ),
    "starcoder2": Tiny("Starcoder2ForCausalLM", "Starcoder2Config", {"sliding_window": 20}),
    "gpt_neox": Tiny(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {"num_key_value_heads": None},
        {"rope_parameters": None, "rotary_pct": 0.25, "rotary_emb_base": 10000},
    ),
    "gpt_neox in sequence": Tiny(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {"num_key_value_heads": None, "use_parallel_residual": False, "attention_bias": False},
    ),
    "mixtral": Tiny(
        "MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "qwen2_moe": Tiny(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 80,
            "mlp_only_layers": [1],
            "num_hidden_layers": 3,
        },
    ),
    "qwen2_moe every second": Tiny(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 80,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 20,
        },
    ),
    "qwen3_moe": Tiny("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "norm_topk_prob": True}),
    "olmoe": Tiny("OlmoeForCausalLM", "OlmoeConfig", EXPERTS),
    "gpt_oss": Tiny(
        "GptOssForCausalLM",
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20},
    ),
    "glm": Tiny("GlmForCausalLM", "GlmConfig"),
    "glm4": Tiny("Glm4ForCausalLM", "Glm4Config", hub=_older(10000.0, partial_rotary_factor=0.5)),
    "cohere": Tiny("CohereForCausalLM", "CohereConfig", {"logit_scale": 0.5}),
    "cohere2": Tiny(
        "Cohere2ForCausalLM",
        "Cohere2Config",
        {"num_hidden_layers": 4, "sliding_window": 20, "logit_scale": 0.5},
    ),
}


def config_values(tiny: Tiny) -> dict[str, Any]:
    """config.json's content as transformers writes it, without any weights."""
    import transformers

    values = {k: v for k, v in {**SIZES, **tiny.changes}.items() if v is not None}
    values |= {k: None for k, v in tiny.changes.items() if v is None and k not in SIZES}
    config = getattr(transformers, tiny.config_class)(**values)
    return {**config.to_dict(), "architectures": [tiny.architecture], "dtype": "float32"}


def model_of(tiny: Tiny, seed: int = 0) -> Any:
    """The oracle: transformers' model with random weights, large enough that logits differ."""
    import transformers

    values = {k: v for k, v in config_values(tiny).items() if k != "architectures"}
    config = getattr(transformers, tiny.config_class)(**values)
    config._attn_implementation = "eager"
    model = getattr(transformers, tiny.architecture)(config).eval().float()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            size = 0.1 if tensor.dim() > 1 else 0.2
            kept = tensor if tensor.dim() == 1 else 0
            tensor.copy_(kept + size * torch.randn(tensor.shape, generator=random))
    model.generation_config.eos_token_id = None
    return model


def write(tiny: Tiny, model: Any, folder: Path) -> Path:
    """Save the model, then give config.json the keys of published models."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **tiny.hub}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder
