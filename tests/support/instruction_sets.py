"""The instruction sets that the CPU's kernels are compiled for; a host that lacks one says so."""

import pytest

from octavo_kernels import ops

INSTRUCTION_SETS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name not in ops.instruction_sets(), reason=f"this CPU cannot run {name}"
        ),
    )
    for name in ("avx512", "avx2", "baseline")
]
