"""From a model folder to a decoder: native where there is a family, else by transformers."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from octavo.checkpoint import TensorEntry, read_checkpoint
from octavo.engine import tensors
from octavo.errors import UnsupportedModelError
from octavo.models.family import Family
from octavo.models.hf_config import HfConfig, read_config
from octavo.models.parameters import parameter_shapes
from octavo.models.registry import native_family, not_native
from octavo.models.spec import DecoderSpec

if TYPE_CHECKING:  # a model is checked before torch is there
    import torch

    from octavo.models.decoder import Batch, Parameters


class Model(Protocol):
    """What the runner needs of a decoder."""

    def hidden(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Something for each of `batch.logit_rows`, from which `logits` makes logits."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (float32) of some rows of `hidden`'s result."""
        ...


@dataclass(slots=True, frozen=True)
class CheckedModel:
    """A model folder that passed every check, before anything is allocated. Without a family the
    transformers back end runs it. With a `random_seed` there are no weights but random ones.
    """

    folder: Path
    config: HfConfig
    spec: DecoderSpec
    family: Family | None
    entries: dict[str, TensorEntry]
    trust_remote_code: bool
    random_seed: int | None = None

    @property
    def num_parameters(self) -> int:
        """Elements of all weights."""
        if self.family is None:
            return sum(math.prod(entry.shape) for entry in self.entries.values())
        shapes = parameter_shapes(self.spec).values()
        return sum(math.prod(shape) for shape in shapes)

    def load(
        self,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int,
        progress: Callable[[int, int], None],
        parameters: Parameters | None = None,
    ) -> Model:
        """The decoder with its weights. `progress` is called with bytes done and bytes in all.

        `parameters` that are given are a native model's, with all weights in them.
        """
        if self.family is None:
            progress(0, 1)
            model: Model = _back_end().TransformersDecoder(
                self.folder,
                self.spec,
                dtype=dtype,
                device=device,
                trust_remote_code=self.trust_remote_code,
            )
            progress(1, 1)
            return model
        # Late, since these bring torch.
        from octavo.engine import weights
        from octavo.models.decoder import Decoder, empty_parameters

        if parameters is None:
            parameters = empty_parameters(self.spec, dtype=dtype, device=device)
            if self.random_seed is None:
                weights.load(self.entries, self.family.targets(self.spec), parameters, progress)
            else:
                weights.randomize(parameters, self.random_seed, self.spec.norm_offset)
        progress(1, 1)
        return Decoder(self.spec, parameters, max_positions=max_positions, device=device)


def check_config(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    hf_overrides: Mapping[str, Any] | None = None,
) -> tuple[HfConfig, Family | None, DecoderSpec]:
    """Read config.json alone; raise for what no weights could make servable."""
    config = read_config(folder, hf_overrides)
    family = native_family(config)
    if family is None and hf_overrides:
        raise UnsupportedModelError(f"--hf-overrides is for native models; {not_native(config)}")
    if family is None:
        return config, None, _by_transformers(folder, config, trust_remote_code)
    return config, family, family.translate(config)


def check_model(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    random_seed: int | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
) -> CheckedModel:
    """Read config.json and the headers of the weights; raise what is wrong or not served.

    With a `random_seed` config.json is all that is read.
    """
    config, family, spec = check_config(
        folder, trust_remote_code=trust_remote_code, hf_overrides=hf_overrides
    )
    if random_seed is not None:
        if family is None:
            raise UnsupportedModelError(
                f"--load-format dummy is for native models; {not_native(config)}"
            )
        return CheckedModel(folder, config, spec, family, {}, trust_remote_code, random_seed)
    entries = read_checkpoint(folder)
    if family is not None:
        entries = tensors.with_prefix(entries, family.prefix)
        tensors.check_complete(entries, family.targets(spec), family.ignored)
    return CheckedModel(folder, config, spec, family, entries, trust_remote_code)


def _by_transformers(folder: Path, config: HfConfig, trust_remote_code: bool) -> DecoderSpec:
    try:
        spec: DecoderSpec = _back_end().translate(
            folder, config, trust_remote_code=trust_remote_code
        )
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{not_native(config)}; nor can the transformers back end serve it: {error}"
        ) from error
    return spec


def _back_end() -> Any:
    """Imported when it is needed: transformers alone takes longer to import than a native start."""
    return importlib.import_module("octavo.models.transformers_backend")
