"""A head start: a native model's weights go to the GPU while torch is being imported.

The import takes seconds and keeps the interpreter's lock for most of them; the weights take less,
and threads without an interpreter bring them. What they cannot bring (tensors of another type than
the model's, or that lie otherwise in the file) and whatever goes wrong here is left to
`weights.load`, which says in its own words what is wrong.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.checkpoint import TensorEntry
from octavo.config import EngineConfig
from octavo.cpus import cpu_limit
from octavo.engine.model import CheckedModel, check_model
from octavo.engine.tensors import FLOATS
from octavo.models.family import Target
from octavo.models.hf_config import read_config
from octavo.models.parameters import parameter_shapes
from octavo.models.registry import native_family
from octavo.plan import DTYPE_BYTES
from octavo_kernels.cuda_upload import Piece, Upload, upload

if TYPE_CHECKING:  # torch is what all this does not wait for
    import torch

    from octavo.models.decoder import Parameters

# As torch places tensors.
ALIGNMENT = 512
# A dozen bring more from the page cache than PCIe takes; one core is left for the import.
READERS = 12
POLL_S = 0.05

logger = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class Plan:
    """What goes where: `offsets` and the `size` of the memory in bytes, `pieces` of the files.

    `left` are the tensors that cannot go as they are.
    """

    offsets: dict[str, int]
    size: int
    paths: list[str]
    pieces: list[Piece]
    left: dict[str, Target]


@dataclass(slots=True)
class Ahead:
    """A model that passed its checks, and its weights on their way to the GPU in type `dtype`."""

    model: CheckedModel
    dtype: str
    plan: Plan
    _upload: Upload | None = field(repr=False)

    def finish(
        self, device: torch.device, dtype: str, progress: Callable[[int, int], None]
    ) -> Parameters | None:
        """The parameters with all weights in them, once they are there; None if nothing came of it.

        `progress` is called with bytes done and bytes in all. To be called once.
        """
        sent, self._upload = self._upload, None
        if sent is None or dtype != self.dtype or device.type != "cuda":
            return None
        brought = sum(count for *_, count in self.plan.pieces)
        total = brought + sum(self.model.entries[name].num_bytes for name in self.plan.left)
        try:
            while not sent.wait(POLL_S):
                progress(sent.done, total)
        except RuntimeError as error:
            # Its text alone: a kept error would keep this frame, and with it the memory.
            logger.warning("the weights are read once more, after this: %s", str(error))
            return None
        progress(brought, total)
        parameters = self._as_tensors(sent, device)
        if self.plan.left:
            from octavo.engine import weights

            weights.load(
                self.model.entries,
                self.plan.left,
                parameters,
                lambda done, _: progress(brought + done, total),
            )
        return parameters

    def close(self) -> None:
        """End what is under way and nobody took, and give its memory back."""
        self._upload = None

    def _as_tensors(self, sent: Upload, device: torch.device) -> Parameters:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        memory, found = torch.as_tensor(sent, device=device), {}
        for name, shape in parameter_shapes(self.model.spec).items():
            at = self.plan.offsets[name]
            part = memory[at : at + math.prod(shape) * dtype.itemsize]
            found[name] = part.view(dtype).view(shape)
        return found


def _elsewhere() -> bool:
    """Whether a program that uses `LLM` has chosen another GPU: then the first is not touched."""
    chosen = sys.modules.get("torch")
    if chosen is None or not chosen.cuda.is_available():
        return False
    try:
        return bool(chosen.cuda.current_device() != 0)
    except RuntimeError:  # torch cannot use its GPU; whoever starts the model's names why
        return True


def begin(config: EngineConfig) -> Ahead | None:
    """Check the model and send its weights on their way; None where there is nothing to gain.

    Raises what is wrong with a native model's folder, as `check_model` does.
    """
    if config.device == "cpu" or config.load_format == "dummy" or _elsewhere():
        return None
    folder = Path(config.model)
    if native_family(read_config(folder, config.hf_overrides)) is None:
        return None  # torch and transformers have to look at it
    model = check_model(folder, hf_overrides=config.hf_overrides)
    dtype = model.spec.checkpoint_dtype if config.dtype == "auto" else config.dtype
    planned = plan(model, dtype)
    if not planned.pieces:
        return None
    readers = min(READERS, max(2, cpu_limit() - 1))
    sent = upload(planned.paths, planned.pieces, planned.size, readers)
    return None if sent is None else Ahead(model, dtype, planned, sent)


def plan(model: CheckedModel, dtype: str) -> Plan:
    """Where each parameter lies in one piece of memory, and what of the files goes there as it is.

    Pieces are in the order in which they lie in the files.
    """
    if model.family is None:
        raise ValueError("a model without a family has no places for its tensors")
    itemsize = DTYPE_BYTES[dtype]
    shapes = parameter_shapes(model.spec)
    offsets, size = {}, 0
    for name, shape in shapes.items():
        offsets[name] = size
        size += -(-math.prod(shape) * itemsize // ALIGNMENT) * ALIGNMENT
    paths: dict[str, int] = {}
    pieces: list[Piece] = []
    left: dict[str, Target] = {}
    for name, target in _in_file_order(model.entries, model.family.targets(model.spec)):
        entry = model.entries[name]
        if FLOATS[entry.dtype] != dtype or target.arrange is not None:
            left[name] = target
            continue
        row_bytes = math.prod(shapes[target.parameter][1:]) * itemsize
        to = offsets[target.parameter] + target.row * row_bytes
        number = paths.setdefault(str(entry.file), len(paths))
        pieces.append((number, entry.begin, to, entry.num_bytes))
    return Plan(offsets, size, list(paths), pieces, left)


def _in_file_order(
    entries: dict[str, TensorEntry], targets: dict[str, Target]
) -> list[tuple[str, Target]]:
    def place(item: tuple[str, Target]) -> tuple[str, int]:
        entry = entries[item[0]]
        return str(entry.file), entry.begin

    return sorted(targets.items(), key=place)
