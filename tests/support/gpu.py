"""What a test says that can only run where a GPU is, and which device the engine's tests run on."""

import os

import pytest
import torch

from octavo_kernels import ops

needs_gpu_module = pytest.mark.skipif(
    "cuda" not in ops.implementations("cuda"),
    reason="octavo_kernels._cuda is not built: no nvcc was found",
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Both.
needs_gpu_kernels = pytest.mark.skipif(
    "cuda" not in ops.implementations("cuda") or not torch.cuda.is_available(),
    reason="needs a CUDA device and octavo_kernels._cuda",
)
# OCTAVO_TEST_DEVICE=cuda runs the tests of the whole engine on a GPU: as on a CPU in float32, in
# which no two tokens are as good as equal, so that they expect the same of both.
DEVICE = os.environ.get("OCTAVO_TEST_DEVICE", "cpu")
ENGINE = {"device": DEVICE, "dtype": "float32"}
