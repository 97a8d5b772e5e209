"""The library's products in half precision, done in float64 and rounded instead.

For oracles under compute-sanitizer, which cuBLAS's kernels for half precision on Hopper are too
much for: racecheck, told to look at our kernels alone, dies with an internal error at the first of
them, and initcheck does not see what they write through tensor maps (release notes of 2025.3 to
2026.3, known limitations).
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HALVES = (torch.bfloat16, torch.float16)
_aten = torch.ops.aten
_SERVED = [p.default for p in (_aten.mm, _aten.addmm, _aten.mv, _aten.bmm, _aten.baddbmm)]
# The last three come as one of those above, but in inference mode as they are.
_OTHERS = [
    _aten.addmm_, _aten.addmv_, _aten.baddbmm_, _aten.addbmm, _aten.dot,
    _aten.linear, _aten.matmul, _aten.einsum,
]  # fmt: skip
_PRODUCTS = {*(func.overloadpacket for func in _SERVED), *_OTHERS}


class WideProducts(TorchDispatchMode):
    """Within it: one rounding of the exact result, where the library has sums in float32."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        of_halves = any(
            isinstance(a, torch.Tensor) and a.dtype in _HALVES for a in tree_leaves(args)
        )
        if func.overloadpacket not in _PRODUCTS or not of_halves:
            return func(*args, **kwargs)
        if func not in _SERVED:  # nothing may slip by to the library: the tool would die of it
            raise NotImplementedError(f"{func} of half precision")
        wide = (a.double() if isinstance(a, torch.Tensor) else a for a in args)
        return func(*wide, **kwargs).to(args[0].dtype)
