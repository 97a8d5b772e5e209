def paged_attention(
    *,
    dtype: int,
    query: int,
    query_stride: int,
    key_cache: int,
    value_cache: int,
    block_tables: int,
    query_start: int,
    seq_lens: int,
    out: int,
    tokens: int,
    seqs: int,
    max_blocks: int,
    blocks: int,
    block_size: int,
    heads: int,
    kv_heads: int,
    dim: int,
    scale: float,
    threads: int,
) -> None: ...
def write_kv(
    *,
    key: int,
    key_stride: int,
    value: int,
    value_stride: int,
    key_cache: int,
    value_cache: int,
    slots: int,
    tokens: int,
    num_slots: int,
    row_bytes: int,
) -> None: ...
def rms_norm(
    *,
    dtype: int,
    x: int,
    weight: int,
    residual: int,
    out: int,
    tokens: int,
    width: int,
    eps: float,
    threads: int,
) -> None: ...
def rope(
    *,
    dtype: int,
    x: int,
    stride: int,
    positions: int,
    cos_sin: int,
    max_positions: int,
    tokens: int,
    heads: int,
    dim: int,
    threads: int,
) -> None: ...
def silu_and_mul(
    *, dtype: int, x: int, out: int, tokens: int, width: int, threads: int
) -> None: ...
def copy_blocks(
    *, cache: int, planes: int, blocks: int, block_bytes: int, pairs: int, num_pairs: int
) -> None: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
