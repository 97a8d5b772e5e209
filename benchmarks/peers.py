"""Who runs the same requests: our engine, and the two ways of transformers to generate.

Each is a callable that runs all of the work greedily and returns its output tokens, request by
request. What it takes to start, and to warm up, is over when it has been made.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging as transformers_logging
from workloads import Work

from octavo import LLM, SamplingParams

Contender = Callable[[list[Work]], list[list[int]]]
PAGE_SIZE = 16
_PATIENCE_S = 60


def has_psutil() -> bool:
    """Without it transformers cannot size its cache; with `num_blocks` given it need not."""
    return importlib.util.find_spec("psutil") is not None


def load(folder: Path) -> Any:
    """The model in float32, which is what our engine takes on a CPU; no token ends a text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    transformers_logging.set_verbosity_error()
    return model


class Octavo:
    """Our engine with its default settings."""

    def __init__(self, folder: Path, threads: int, **options: Any) -> None:
        self._llm = LLM(
            str(folder),
            dtype="float32",
            skip_tokenizer_init=True,
            num_kv_blocks=4096,
            num_threads=threads,
            **options,
        )

    def __call__(self, work: list[Work]) -> list[list[int]]:
        params = [
            SamplingParams(max_tokens=one.output, temperature=0, ignore_eos=True) for one in work
        ]
        found = self._llm.generate([one.prompt for one in work], params, use_tqdm=False)
        return [result.outputs[0].token_ids for result in found]


class Static:
    """`generate` on batches in order of arrival, padded on the left, each run to its longest."""

    def __init__(self, model: Any, batch: int) -> None:
        self._model = model
        self._batch = batch

    def __call__(self, work: list[Work]) -> list[list[int]]:
        found: list[list[int]] = []
        for begin in range(0, len(work), self._batch):
            found += self._one_batch(work[begin : begin + self._batch])
        return found

    @torch.inference_mode()
    def _one_batch(self, work: list[Work]) -> list[list[int]]:
        widest = max(len(one.prompt) for one in work)
        longest = max(one.output for one in work)
        ids = torch.zeros(len(work), widest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(work):
            ids[row, widest - len(one.prompt) :] = torch.tensor(one.prompt)
            mask[row, widest - len(one.prompt) :] = 1
        texts = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=0,
        )
        if texts.shape[1] != widest + longest:
            raise RuntimeError("generate stopped early: the comparison would not be one")
        rows = texts[:, widest:].tolist()
        return [row[: one.output] for row, one in zip(rows, work, strict=True)]


class Continuous(AbstractContextManager["Continuous"]):
    """The manager behind `generate_batch`, kept between calls.

    `generate_batch` itself takes one length for all requests; its manager takes each its own.
    """

    def __init__(
        self, model: Any, num_blocks: int, max_batch_tokens: int, *, share_blocks: bool = True
    ) -> None:
        self._context = model.continuous_batching_context_manager(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_SIZE,
                num_blocks=num_blocks,
                max_batch_tokens=max_batch_tokens,
                allow_block_sharing=share_blocks,
            ),
            timeout=_PATIENCE_S,
        )

    def __enter__(self) -> Self:
        self._manager = self._context.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._context.__exit__(kind, error, trace)

    def __call__(self, work: list[Work]) -> list[list[int]]:
        ids = [
            self._manager.add_request(one.prompt, max_new_tokens=one.output, eos_token_id=-1)
            for one in work
        ]
        found: dict[str, list[int]] = {}
        while len(found) < len(ids):
            result = self._manager.get_result(timeout=_PATIENCE_S)
            if result is None or result.error is not None:
                raise RuntimeError(f"generate_batch: {result.error if result else 'no answer'}")
            if result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
        texts = [found[request_id] for request_id in ids]
        if any(len(text) != one.output for text, one in zip(texts, work, strict=True)):
            raise RuntimeError("generate_batch stopped early: the comparison would not be one")
        return texts
