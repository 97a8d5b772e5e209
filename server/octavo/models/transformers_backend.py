"""Decoders without a family of their own: transformers' module with our paged attention in it.

Slower than a native family, and imported only when one is served: transformers alone takes longer
to import than a native start. What the module does besides attention is its own affair, so the
start compares a short run, cut in pieces and beside another sequence, with transformers' own
attention, and refuses the model where they differ.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from octavo.errors import ModelError, OctavoError, UnsupportedModelError
from octavo.models.decoder import Batch
from octavo.models.hf_config import HfConfig
from octavo.models.spec import DecoderSpec, LayerSpec
from octavo_kernels import ops

NAME = "octavo_paged"
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Arguments of an attention function that change nothing here, or that we obey.
_KNOWN = {"dropout", "scaling", "is_causal", "sliding_window", "softcap", "s_aux", "position_ids",
          "cache_position", "use_cache", "past_key_values", "cache_params", "return_dict",
          "output_router_logits", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
          "max_length_k"}  # fmt: skip
# How far the self-test's logits may lie apart, in units of their spread.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
_TEST_BLOCK = 4

logger = logging.getLogger(__name__)


def translate(folder: Path, config: HfConfig, *, trust_remote_code: bool = False) -> DecoderSpec:
    """What the engine must know of a model that transformers runs; raises if it cannot be one."""
    architecture = config.values["architectures"][0]
    if not trust_remote_code and architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise UnsupportedModelError("transformers has no decoder of that name")
    try:
        theirs = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ModelError(f"{config.where}: transformers cannot read it: {error}"[:500]) from error
    if not trust_remote_code:
        _require_plain_attention(getattr(transformers, architecture))
    types = set(getattr(theirs, "layer_types", None) or ())
    if types - _LAYER_TYPES:
        raise UnsupportedModelError(f"its layers are {', '.join(sorted(types - _LAYER_TYPES))}")
    return _spec(config, theirs)


def _require_plain_attention(model: Any) -> None:
    if not model._supports_attention_backend or model._is_stateful:
        raise UnsupportedModelError(
            "its class does not let another attention take the place of its own"
        )


def _spec(config: HfConfig, theirs: Any) -> DecoderSpec:
    """The sizes that the cache and the plan depend on."""
    found = HfConfig(
        config.where,
        {
            "num_key_value_heads": None,
            "head_dim": None,
            **theirs.to_dict(),
            **{key: getattr(theirs, key, None) for key in theirs.attribute_map},
        },
    )
    heads = found.integer("num_attention_heads", low=1, high=1 << 12)
    hidden = found.integer("hidden_size", low=1, high=1 << 17)
    dtype = str(found.get("dtype") or "float32").removeprefix("torch.")
    return DecoderSpec(
        vocab_size=found.integer("vocab_size", low=1, high=1 << 24),
        hidden_size=hidden,
        intermediate_size=0,
        layers=(LayerSpec(rope=None),) * found.integer("num_hidden_layers", low=1, high=1 << 10),
        num_heads=heads,
        num_kv_heads=found.integer("num_key_value_heads", low=1, high=heads, default=heads),
        head_dim=found.integer("head_dim", low=1, high=1024, default=hidden // heads),
        max_positions=found.integer("max_position_embeddings", low=1, high=1 << 27, default=2048),
        checkpoint_dtype=dtype if dtype in ("bfloat16", "float16") else "float32",
    )


class TransformersDecoder:
    """The module behind the native decoder's interface; `hidden` gives logits already."""

    def __init__(
        self,
        folder: Path,
        spec: DecoderSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
    ) -> None:
        self.spec = spec
        transformers.AttentionInterface.register(NAME, _attention)
        try:
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                attn_implementation="eager",
                output_loading_info=True,
            )
        except Exception as error:
            raise ModelError(f"{folder}: transformers cannot load it: {error}"[:500]) from error
        if missing := sorted(found["missing_keys"]):
            raise ModelError(f"{folder}: the checkpoint lacks {', '.join(missing[:10])}")
        _require_plain_attention(model)
        self._model: Any = model.to(device).eval()
        self._check_against_own_attention(folder, dtype, device)
        logger.warning(
            "%s runs on the transformers back end, slower than a native family",
            type(self._model).__name__,
        )

    def hidden(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Logits of `batch.logit_rows`, in the model's type."""
        _Step.current = _Step(batch, kv_cache)
        try:
            out = self._model(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=batch.logit_rows,
            )
            layers = _Step.current.layers
        finally:
            _Step.current = None
        if len(layers) != self.spec.num_layers:
            raise UnsupportedModelError(
                f"{type(self._model).__name__}: {len(layers)} of {self.spec.num_layers} layers "
                "came to our attention; the others keep a state that Octavo does not page"
            )
        logits: torch.Tensor = out.logits[0]
        return logits

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same in float32."""
        return hidden.float()

    @torch.inference_mode()
    def _check_against_own_attention(
        self, folder: Path, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Two sequences of 11 and 5 tokens, each in two pieces, against the model by itself."""
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.spec.vocab_size, (16,), generator=random).to(device)
        parts = tokens[:11], tokens[11:]
        spec = self.spec
        shape = (spec.num_layers, 2, 8, _TEST_BLOCK, spec.num_kv_heads, spec.head_dim)
        cache = torch.zeros(shape, dtype=dtype, device=device)
        try:
            own = [self._model(part[None], use_cache=False).logits[0] for part in parts]
            self._model.set_attn_implementation(NAME)
            wanted = torch.cat(own)
            got = torch.empty_like(wanted)
            for begin, end in (((0, 0), (7, 3)), ((7, 3), (11, 5))):
                rows = [*range(begin[0], end[0]), *range(11 + begin[1], 11 + end[1])]
                got[rows] = self.hidden(_test_batch(tokens, begin, end, device), cache)
        except OctavoError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{folder}: the transformers back end cannot run it: {error}"[:500]
            ) from error
        apart = float((got - wanted).abs().max() / wanted.std())
        if not apart <= _TOLERANCE[dtype]:
            raise UnsupportedModelError(
                f"{folder}: with paged attention the logits of {type(self._model).__name__} lie "
                f"{apart:.3g} standard deviations from transformers' own; it does more with its "
                "sequences than Octavo knows, and is not served"
            )


class _Step:
    """What the attention function needs of the step that is under way."""

    current: _Step | None = None

    def __init__(self, batch: Batch, kv_cache: torch.Tensor) -> None:
        self.batch, self.kv_cache = batch, kv_cache
        self.layers: set[int] = set()


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Their attention interface: [1, heads, tokens, dim] in, [1, tokens, heads, dim] out."""
    step, layer = _Step.current, module.layer_idx
    if step is None:
        raise RuntimeError("the paged attention of a model was called outside of a step")
    strange = [k for k, v in more.items() if k not in _KNOWN and v is not None and v is not False]
    if attention_mask is not None or not getattr(module, "is_causal", True) or strange:
        what = ", ".join(strange) or "a mask of its own"
        raise UnsupportedModelError(f"{type(module).__name__} gives its attention {what}")
    step.layers.add(layer)
    batch, cache = step.batch, step.kv_cache[layer]
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    ops.write_kv(k, v, cache[0], cache[1], batch.slots[0])
    sinks = more.get("s_aux")
    scale = more.get("scaling")
    mixed = ops.paged_attention(
        q,
        cache[0],
        cache[1],
        batch.block_tables[0],
        batch.query_start,
        batch.seq_lens,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        ops.Variant(
            window=more.get("sliding_window") or 0,
            softcap=more.get("softcap") or 0.0,
            sinks=None if sinks is None else sinks.float().contiguous(),
        ),
    )
    return mixed[None], None


def _test_batch(
    tokens: torch.Tensor, begin: tuple[int, int], end: tuple[int, int], device: torch.device
) -> Batch:
    """Two sequences' tokens begin..end; the first lies in blocks 1 to 3, the second in 5 and 6."""
    positions = [torch.arange(b, e) for b, e in zip(begin, end, strict=True)]
    tables = torch.tensor([[3, 1, 2], [6, 5, -1]], dtype=torch.int32)
    slots = [
        tables[s][at // _TEST_BLOCK].long() * _TEST_BLOCK + at % _TEST_BLOCK
        for s, at in enumerate(positions)
    ]
    counts = torch.tensor([0, len(positions[0]), sum(map(len, positions))], dtype=torch.int32)

    def to(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device)

    return Batch(
        token_ids=torch.cat((tokens[:11][positions[0]], tokens[11:][positions[1]])),
        positions=to(torch.cat(positions)),
        slots=(to(torch.cat(slots)),),
        query_start=to(counts),
        seq_lens=to(torch.tensor(end, dtype=torch.int32)),
        block_tables=(to(tables),),
        logit_rows=to(torch.arange(int(counts[-1]))),
    )
