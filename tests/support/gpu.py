"""What a test says that can only run where a GPU is."""

import pytest
import torch

from octavo_kernels import ops

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# ... and our kernels for it.
needs_gpu_kernels = pytest.mark.skipif(
    "cuda" not in ops.implementations("cuda") or not torch.cuda.is_available(),
    reason="needs a CUDA device and octavo_kernels._cuda",
)
