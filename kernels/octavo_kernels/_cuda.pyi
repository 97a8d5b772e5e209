def device_report(device: int) -> dict[str, int | str]: ...
def set_overlap(on: bool) -> None: ...
def set_releasing_lanes(lanes: int) -> None: ...

class Upload:
    def __init__(
        self, paths: list[str], pieces: list[tuple[int, int, int, int]], total: int, readers: int
    ) -> None: ...
    @property
    def done(self) -> int: ...
    def wait(self, seconds: float) -> bool: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, object]: ...

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
    ahead: int,
    ahead_bytes: int,
    shared_limit: int,
    stream: int,
) -> None: ...
def skinny_gemm_serves(rows: int, k: int, norm: bool) -> bool: ...
def gated_gemm(
    *,
    dtype: int,
    x: int,
    x_stride: int,
    w: int,
    out: int,
    rows: int,
    n: int,
    k: int,
    function: int,
    stream: int,
) -> None: ...
def gated_gemm_serves(n: int, k: int, function: int, device: int) -> bool: ...
def lt_version() -> int: ...
def mixture(
    *,
    dtype: int,
    x: int,
    logits: int,
    gate_up: int,
    gate_up_bias: int,
    down: int,
    down_bias: int,
    out: int,
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    top_k: int,
    normalized: bool,
    function: int,
    swiglu_alpha: float,
    swiglu_limit: float,
    weights: int,
    chosen: int,
    order: int,
    place: int,
    tiles: int,
    activated: int,
    results: int,
    stream: int,
) -> None: ...
def mixture_serves(hidden: int, inner: int, experts: int, top_k: int) -> bool: ...
def mixture_tiles(tokens: int, experts: int, top_k: int) -> int: ...
def lt_candidates(
    *,
    dtype: int,
    x: int,
    x_stride: int,
    w: int,
    bias: int,
    out: int,
    rows: int,
    n: int,
    k: int,
    add: bool,
    workspace_bytes: int,
    count: int,
    split: bool,
) -> list[bytes]: ...
def lt_product(
    *,
    dtype: int,
    x: int,
    x_stride: int,
    w: int,
    bias: int,
    out: int,
    rows: int,
    n: int,
    k: int,
    add: bool,
    algorithm: bytes,
    workspace: int,
    workspace_bytes: int,
    stream: int,
) -> bool: ...
def lt_rank(
    *,
    dtype: int,
    x: int,
    x_stride: int,
    weights: list[int],
    bias: int,
    out: int,
    rows: int,
    n: int,
    k: int,
    add: bool,
    algorithms: list[bytes],
    workspace: int,
    workspace_bytes: int,
    stream: int,
) -> list[float]: ...
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
    adjusted: int,
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

class LayerStack:
    def __init__(
        self,
        *,
        dtype: int,
        layers: int,
        num_layers: int,
        hidden: int,
        inner: int,
        heads: int,
        kv_heads: int,
        dim: int,
        function: int,
        norm_eps: float,
        norm_offset: float,
        scale: float,
        cos_sin: int,
        max_positions: int,
        num_blocks: int,
        block_size: int,
        vocab: int,
        embedding: int,
        final_norm: int,
        head: int,
    ) -> None: ...
    ahead: int
    engine_tokens: int
    def rows(self) -> int: ...
    def workspace_bytes(self) -> int: ...
    def decode(
        self,
        *,
        residual: int,
        tokens: int,
        logits: int,
        rows: int,
        positions: int,
        slots: int,
        seq_lens: int,
        block_tables: int,
        max_blocks: int,
        workspace: int,
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
        warpgroups: bool,
        any_batch: bool,
    ) -> None: ...
    @property
    def list_words(self) -> int: ...
    @property
    def partial_floats(self) -> int: ...
    @property
    def splits(self) -> bool: ...
    @property
    def warpgroups(self) -> bool: ...
    def plan(
        self,
        *,
        query_start: int,
        seq_lens: int,
        seqs: int,
        num_decodes: int,
        lists: int,
        partials: int,
        stream: int,
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

MAX_VOCAB: int
MAX_TOP: int

def sample_workspace(rows: int, vocab: int) -> int: ...
def sample(
    *,
    dtype: int,
    logits: int,
    rows: int,
    vocab: int,
    stride: int,
    scale: float,
    softcap: float,
    slots: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    draw_stream: int,
    count: int,
    adjusted: int,
    adjustments: list[int],
    marks_stride: int,
    list_stride: int,
    stop_ids: int,
    max_tokens: int,
    flags: int,
    tokens: int,
    kept: int,
    workspace: int,
    stream: int,
) -> None: ...
def restart_marks(
    *,
    row: int,
    length: int,
    prompt: int,
    num_prompt: int,
    drawn: int,
    num_drawn: int,
    allowed: int,
    num_allowed: int,
    listed: int,
    num_listed: int,
    stream: int,
) -> None: ...
def token_logprobs(
    *,
    dtype: int,
    logits: int,
    rows: int,
    vocab: int,
    stride: int,
    scale: float,
    softcap: float,
    tokens: int,
    wanted: int,
    logprob: int,
    rank: int,
    top_ids: int,
    top_logprobs: int,
    top: int,
    stream: int,
) -> None: ...
def prefill_serves(dim: int, block_size: int) -> bool: ...
def decode_serves(dim: int, block_size: int) -> bool: ...

class DecodeWork:
    def __init__(
        self,
        *,
        list_size: int,
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
