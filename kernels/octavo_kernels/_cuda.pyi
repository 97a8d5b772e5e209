def device_report(device: int) -> dict[str, int | str]: ...
def set_overlap(on: bool) -> None: ...
def skinny_gemm(
    *,
    dtype: int,
    x: int,
    x_stride: int,
    norm_weight: int,
    norm_eps: float,
    norm_offset: float,
    w: int,
    bias: int,
    out: int,
    rows: int,
    n: int,
    k: int,
    epilogue: int,
    function: int,
    shared_limit: int,
    stream: int,
) -> None: ...
def skinny_gemm_serves(rows: int, k: int, norm: bool) -> bool: ...
