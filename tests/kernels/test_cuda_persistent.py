"""All layers of a decode step in one kernel, and all of the step, against their operations."""

from dataclasses import dataclass

import pytest
import torch
from gpu import needs_gpu_kernels

from octavo_kernels import ops

BF16, FP16 = torch.bfloat16, torch.float16
EPS = 1e-6
# Of two layers, as a share of the result's norm; each of some ten roundings is half of 2^-8.
LIMIT = {BF16: 1.5e-2, FP16: 3e-3}
# Of logits of the same hidden states: one rounding each, of sums in another order.
HEAD_LIMIT = {BF16: 4e-3, FP16: 1e-3}
LENGTHS = [
    [1], [15], [16], [17], [33], [600], [5000], [0], [17, 1], [600, 0, 5000], [3, 600, 17, 16],
    [5000, 1, 2, 700, 33, 0, 64, 65],
]  # fmt: skip


@dataclass
class Stack:
    """Layers of random weights, and a cache in which everything unused is NaN."""

    layers: int = 2
    hidden: int = 256
    inner: int = 512
    heads: int = 4
    kv_heads: int = 2
    dim: int = 128
    dtype: torch.dtype = BF16
    head_norms: bool = True
    blocks: int = 900
    block_size: int = 16
    vocab: int = 512
    tied: bool = False
    device: str = "cuda"

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)
        query, kv = self.heads * self.dim, self.kv_heads * self.dim
        shape = (self.layers, 2, self.blocks, self.block_size, self.kv_heads, self.dim)
        self.cache = torch.full(shape, float("nan"), device=self.device, dtype=self.dtype)
        angles = torch.arange(8192, device=self.device)[:, None] * 1e6 ** (
            -torch.arange(0, self.dim, 2, device=self.device) / self.dim
        )
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), 1).float().contiguous()

        def matrix(n: int, k: int) -> torch.Tensor:
            return self.noise(n, k, scale=k**-0.5)

        def norm(width: int) -> torch.Tensor:
            return (1 + self.noise(width, scale=0.1)).to(self.dtype)

        self.weights = [
            ops.DecoderLayer(
                qkv=matrix(query + 2 * kv, self.hidden),
                output=matrix(self.hidden, query),
                gate_up=matrix(2 * self.inner, self.hidden),
                down=matrix(self.hidden, self.inner),
                input_norm=norm(self.hidden),
                mlp_norm=norm(self.hidden),
                query_norm=norm(self.dim) if self.head_norms else None,
                key_norm=norm(self.dim) if self.head_norms else None,
                keys=self.cache[i, 0],
                values=self.cache[i, 1],
            )
            for i in range(self.layers)
        ]
        embedding = matrix(self.vocab, self.hidden)
        head = embedding if self.tied else matrix(self.vocab, self.hidden)
        self.ends = ops.Ends(embedding, norm(self.hidden), head)

    def noise(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        made = torch.randn(shape, generator=self.generator, device=self.device)
        return (made * scale).to(self.dtype)

    def prepared(self) -> ops.LayerStack | None:
        return ops.layer_stack(
            self.weights,
            heads=self.heads,
            function="silu",
            norm_eps=EPS,
            norm_offset=0.0,
            scale=self.dim**-0.5,
            cos_sin=self.cos_sin,
            ends=self.ends,
        )


@dataclass
class Step:
    """A decode of sequences of some lengths, their blocks scattered over the cache."""

    stack: Stack
    lengths: list[int]

    def __post_init__(self) -> None:
        stack, size, device = self.stack, self.stack.block_size, self.stack.device
        order = torch.randperm(stack.blocks, generator=torch.Generator().manual_seed(1)).tolist()
        width = max(-(-length // size) for length in self.lengths) + 2
        tables = torch.full((len(self.lengths), width), 2**30, dtype=torch.int32)
        slots = []
        for row, length in enumerate(self.lengths):
            mine = [order.pop() for _ in range(-(-length // size))]
            tables[row, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
            slots.append(mine[-1] * size + (length - 1) % size if length else -1)
            for at, block in enumerate(mine):
                used = min(size, length - 1 - at * size)
                shape = (stack.layers, 2, used, stack.kv_heads, stack.dim)
                if used > 0:
                    stack.cache[:, :, block, :used] = stack.noise(*shape)
        self.tables, self.slots = tables.to(device), torch.tensor(slots, device=device)
        self.seq_lens = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        self.positions = (self.seq_lens.long() - 1).clamp(min=0)
        self.x = stack.noise(len(self.lengths), stack.hidden)
        self.tokens = torch.arange(len(self.lengths), device=device) * 7 % stack.vocab
        self.starts = torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=device)

    def run(self, prepared: ops.LayerStack, x: torch.Tensor) -> None:
        args = self.positions, self.slots, self.seq_lens, self.tables
        ops.decode_layers(prepared, x, *args)

    def run_whole(self, prepared: ops.LayerStack, out: torch.Tensor) -> None:
        args = self.positions, self.slots, self.seq_lens, self.tables
        ops.decode_logits(prepared, self.tokens, *args, out)

    def logits(self) -> torch.Tensor:
        shape = len(self.lengths), self.stack.vocab
        return torch.full(shape, float("nan"), device=self.stack.device, dtype=self.stack.dtype)

    def wanted(self, cache: torch.Tensor) -> torch.Tensor:
        """By the reference's operations, one after the other; writes to `cache`."""
        stack, x = self.stack, self.x.clone()
        rotation = ops.Rotation(self.positions, stack.cos_sin)
        lens = self.seq_lens.clamp(min=1)  # a row of padding sees nothing, and gives zeros
        tables = self.tables.clone()
        tables[self.seq_lens == 0] = 0
        for i, layer in enumerate(stack.weights):
            norms = None
            if layer.query_norm is not None and layer.key_norm is not None:
                norms = ops.HeadNorm(layer.query_norm, layer.key_norm, EPS)
            keys, values = cache[i]
            qkv = ops.linear(x, layer.qkv, None, ops.Norm(layer.input_norm, EPS))
            query = ops.qk_norm_rope_write(qkv, keys, values, self.slots, norms, rotation)
            mixed = ops.paged_attention(
                query, keys, values, tables, self.starts, lens, stack.dim**-0.5
            )
            mixed[self.seq_lens == 0] = 0
            ops.linear_add(mixed.flatten(1), layer.output, x)
            norm = ops.Norm(layer.mlp_norm, EPS)
            ops.linear_add(ops.gated_linear(x, layer.gate_up, "silu", None, norm), layer.down, x)
        return x


def check(stack: Stack, lengths: list[int], limit: float) -> None:
    """The step's output, its keys and values, and that nothing else in the cache was touched."""
    prepared = stack.prepared()
    assert prepared is not None
    if len(lengths) > prepared.rows:
        pytest.skip(f"the kernel takes {prepared.rows} rows of these sizes")
    step = Step(stack, lengths)
    cache = stack.cache.clone()
    with ops.forced("reference"):
        wanted = step.wanted(cache).float()
    x = step.x.clone()
    ops.calls.clear()
    step.run(prepared, x)
    assert ops.calls["decode_layers", "cuda"] == 1
    assert (x.float() - wanted).norm() <= limit * wanted.norm()
    new = [slot for slot in step.slots.tolist() if slot >= 0]
    got, right = stack.cache.flatten(2, 3), cache.flatten(2, 3)
    if new:
        torch.testing.assert_close(got[:, :, new], right[:, :, new], rtol=0.1, atol=8 * limit)
    others = torch.ones(got.shape[2], dtype=torch.bool, device="cuda")
    others[new] = False
    assert torch.equal(got.view(torch.int16)[:, :, others], right.view(torch.int16)[:, :, others])
    again = step.x.clone()
    step.run(prepared, again)
    assert torch.equal(again, x)


@needs_gpu_kernels
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "head_norms"),
    [(4, 2, 128, True), (8, 1, 64, False), (2, 2, 128, False)],
)
def test_two_layers(heads, kv_heads, dim, head_norms, dtype, lengths) -> None:
    stack = Stack(heads=heads, kv_heads=kv_heads, dim=dim, head_norms=head_norms, dtype=dtype)
    check(stack, lengths, LIMIT[dtype])


@needs_gpu_kernels
@pytest.mark.parametrize("block_size", [8, 64])
def test_other_blocks(block_size) -> None:
    check(Stack(block_size=block_size, blocks=300), [600, 65, 64], LIMIT[BF16])


@needs_gpu_kernels
@pytest.mark.parametrize("layers", [1, 28])
def test_a_small_model(layers) -> None:
    stack = Stack(layers, 1024, 3072, 16, 8, blocks=150)
    check(stack, [600, 17, 1, 1000], LIMIT[BF16] * max(1, layers / 10))


@needs_gpu_kernels
def test_products_of_many_passes() -> None:
    """More rows of a matrix for each block than have sums at a time, and a ring that goes round."""
    check(Stack(1, 4096, 14336, 32, 8, head_norms=False, blocks=150), [600], LIMIT[BF16])


@needs_gpu_kernels
def test_replays_give_the_same_bits() -> None:
    """What blocks hand each other of one step must never be taken for another's."""
    stack = Stack(4, 1024, 3072, 16, 8, blocks=150)
    prepared = stack.prepared()
    assert prepared is not None
    step = Step(stack, [600, 33])
    x = step.x.clone()
    step.run(prepared, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step.x.clone()
        step.run(prepared, replayed)
    for turn in range(200):
        graph.replay()
        if turn % 7 == 0:
            step.x.float() @ step.x.float().T  # another kernel between, which changes the timing
        assert torch.equal(replayed, x)


def check_whole(stack: Stack, lengths: list[int]) -> None:
    """Logits from tokens, against the same layers between an embedding and a product."""
    prepared = stack.prepared()
    assert prepared is not None
    assert prepared.vocab == stack.vocab
    step = Step(stack, lengths)
    step.tokens[-1] = -1  # what a failed draw left behind: zeros
    x = ops.embed(step.tokens, stack.ends.embedding)
    step.run(prepared, x)
    cache = stack.cache.clone()
    normed = ops.rms_norm(x, stack.ends.norm, EPS)
    wanted = normed.float() @ stack.ends.head.float().T
    for _ in range(2):
        stack.cache.flatten(2, 3)[:, :, [slot for slot in step.slots.tolist() if slot >= 0]] = 7.0
        got = step.logits()
        step.run_whole(prepared, got)
        assert (got.float() - wanted).norm() <= HEAD_LIMIT[stack.dtype] * wanted.norm()
        assert torch.equal(stack.cache.view(torch.int16), cache.view(torch.int16))


@needs_gpu_kernels
@pytest.mark.parametrize("vocab", [8, 200, 4104])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_logits_of_tokens(dim, dtype, vocab) -> None:
    """Heads of which many blocks have no part, and of which each has several passes."""
    for lengths in [33], [600, 1, 0, 17]:
        check_whole(Stack(dim=dim, dtype=dtype, vocab=vocab, tied=vocab == 200), lengths)


@needs_gpu_kernels
@pytest.mark.parametrize("vocab", [128256, 151936])
def test_logits_of_a_large_vocabulary(vocab) -> None:
    check_whole(Stack(2, 1024, 3072, 16, 8, blocks=150, vocab=vocab, tied=True), [600, 17])


@needs_gpu_kernels
def test_logits_of_wide_rows() -> None:
    check_whole(Stack(1, 4096, 14336, 32, 8, head_norms=False, blocks=150, vocab=16384), [600])


@needs_gpu_kernels
def test_both_kinds_of_steps_in_turns() -> None:
    """They share the words that blocks hand each other, and the number of passes so far."""
    stack = Stack(4, 1024, 3072, 16, 8, blocks=150, vocab=8192)
    prepared = stack.prepared()
    assert prepared is not None
    step = Step(stack, [600, 33])
    x, logits = step.x.clone(), step.logits()
    step.run(prepared, x)
    step.run_whole(prepared, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers = step.x.clone()
        step.run(prepared, layers)
        whole = step.logits()
        step.run_whole(prepared, whole)
        step.run_whole(prepared, whole)
    for _ in range(100):
        graph.replay()
        assert torch.equal(layers, x)
        assert torch.equal(whole, logits)


@needs_gpu_kernels
@pytest.mark.parametrize("ahead", [1, 2, 3, 4])
@pytest.mark.parametrize("engine_tokens", [0, 1 << 20])
def test_ways_to_ask_memory_give_the_same_bits(ahead, engine_tokens) -> None:
    stack = Stack(dim=64, blocks=400)
    usual, other = stack.prepared(), stack.prepared()
    assert usual is not None
    assert other is not None
    other.native.ahead, other.native.engine_tokens = ahead, engine_tokens
    step = Step(stack, [5000, 700, 17, 1])
    x, y = step.x.clone(), step.x.clone()
    step.run(usual, x)
    step.run(other, y)
    assert torch.equal(x, y)


@needs_gpu_kernels
def test_a_vocabulary_that_no_unit_divides_has_layers_only() -> None:
    prepared = Stack(vocab=501).prepared()
    assert prepared is not None
    assert prepared.vocab == 0


def test_there_is_no_stack_on_a_cpu() -> None:
    stack = Stack(device="cpu", blocks=4)
    assert stack.prepared() is None


def test_a_wrong_matrix_is_named() -> None:
    stack = Stack(device="cpu", blocks=4, heads=4)
    stack.heads = 6
    with pytest.raises(ValueError, match="layer_stack: columns is 1024, but 6 heads ask for 1280"):
        stack.prepared()


def test_a_wrong_head_is_named() -> None:
    stack = Stack(device="cpu", blocks=4)
    stack.ends = ops.Ends(stack.ends.embedding, stack.ends.norm, stack.ends.head[:, :128])
    with pytest.raises(ValueError, match=r"layer_stack: head"):
        stack.prepared()
