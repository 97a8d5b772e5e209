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
def apply_updates(words: int, message: int, stretches: int, stream: int) -> None: ...
def build_inputs(
    *,
    records: int,
    tables: int,
    batch: int,
    token_at: int,
    query_start: int,
    chunk: int,
    table_width: int,
    groups: int,
    block_size: int,
    token_ids: int,
    positions: int,
    slots: int,
    seq_lens: int,
    block_tables: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    draw_stream: int,
    count: int,
    max_tokens: int,
    rows: int,
    sequences: int,
    stream: int,
) -> None: ...
def record_tokens(
    *,
    records: int,
    batch: int,
    tokens: int,
    sequences: int,
    drawn: int,
    rows: int,
    counter: int,
    stream: int,
) -> None: ...

class PrefillStep:
    def __init__(
        self,
        *,
        tokens: int,
        seqs: int,
        num_decodes: int,
        max_query_len: int,
        heads: int,
        kv_heads: int,
        dim: int,
        min_span: int,
    ) -> None: ...
    @property
    def list_words(self) -> int: ...
    @property
    def partial_floats(self) -> int: ...
    @property
    def max_items(self) -> int: ...
    def plan(
        self, *, query_start: int, seq_lens: int, lists: int, partials: int, stream: int
    ) -> None: ...
    def attend(
        self,
        *,
        dtype: int,
        query: int,
        query_stride: int,
        key_cache: int,
        value_cache: int,
        block_tables: int,
        max_blocks: int,
        block_size: int,
        out: int,
        scale: float,
        window: int,
        softcap: float,
        sinks: int,
        stream: int,
    ) -> None: ...

def prefill_serves(dim: int, block_size: int) -> bool: ...
def decode_serves(dim: int, block_size: int) -> bool: ...
def decode_row_tiles(heads: int, kv_heads: int) -> int: ...

class DecodeWork:
    def __init__(
        self,
        *,
        max_seqs: int,
        chunk: int,
        max_chunks: int,
        num_windows: int,
        windows: int,
        chunks: int,
        counts: int,
        ticket: int,
        arrivals: int,
        values: int,
        sums: int,
    ) -> None: ...
    def plan(self, *, seq_lens: int, num_decodes: int, stream: int) -> None: ...
    def attend(
        self,
        *,
        dtype: int,
        query: int,
        query_stride: int,
        key_cache: int,
        value_cache: int,
        block_tables: int,
        max_blocks: int,
        block_size: int,
        out: int,
        heads: int,
        kv_heads: int,
        dim: int,
        scale: float,
        softcap: float,
        sinks: int,
        window: int,
        stages: int,
        blocks_per_sm: int,
        stream: int,
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
    offset: float,
    stream: int,
) -> None: ...
def layer_norm(
    *,
    dtype: int,
    x: int,
    weight: int,
    bias: int,
    residual: int,
    out: int,
    tokens: int,
    width: int,
    eps: float,
    stream: int,
) -> None: ...
def activation(
    *,
    dtype: int,
    function: int,
    gated: bool,
    x: int,
    out: int,
    tokens: int,
    width: int,
    stream: int,
) -> None: ...
def embed(
    *,
    dtype: int,
    token_ids: int,
    table: int,
    scale: float,
    positions: int,
    position_table: int,
    out: int,
    tokens: int,
    vocabulary: int,
    max_positions: int,
    width: int,
    stream: int,
) -> None: ...
def heads(
    *,
    dtype: int,
    groups: list[tuple[int, int, int, int, int, int, bool, bool]],
    tokens: int,
    dim: int,
    eps: float,
    offset: float,
    positions: int,
    cos_sin: int,
    max_positions: int,
    rotary: int,
    interleaved: bool,
    slots: int,
    num_slots: int,
    stream: int,
) -> None: ...
def copy_blocks(
    *,
    cache: int,
    planes: int,
    blocks: int,
    block_bytes: int,
    pairs: int,
    num_pairs: int,
    stream: int,
) -> None: ...
def swap_blocks(
    *,
    cache: int,
    planes: int,
    blocks: int,
    block_bytes: int,
    pairs: int,
    num_pairs: int,
    host: int,
    host_blocks: int,
    out: bool,
    stream: int,
) -> None: ...
