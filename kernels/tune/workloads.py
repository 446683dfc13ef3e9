"""What is swept: the kernels with a choice of block sizes, on a model's shapes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cuda_native import Gpu

OPERATORS = ("linear", "gated_delta", "moe")
EPS = 1e-6
Config = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """The sizes that a sweep is for."""

    hidden: int = 2048
    key_heads: int = 16
    value_heads: int = 32
    delta_dim: int = 128
    taps: int = 4
    query_heads: int = 16
    cache_heads: int = 2
    head_dim: int = 256
    experts: int = 256
    top_k: int = 8
    intermediate: int = 512
    vocabulary: int = 248_320

    @property
    def channels(self) -> int:
        return (2 * self.key_heads + self.value_heads) * self.delta_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.delta_dim

    @property
    def qkv(self) -> int:
        return (2 * self.query_heads + 2 * self.cache_heads) * self.head_dim


QWEN3_5_35B_A3B = Model()

# Where a line of a prefill table may begin: tokens, and rows that an expert is expected to have.
TOKENS = (32, 64, 128, 256, 512, 1024, 1536, 2048, 4096, 8192)
EXPERT_ROWS = (2, 4, 6, 8, 12, 16, 32, 48, 64, 128, 256)

# {blocks_per_sm} (linear/decode_configs.h) and {tokens, rows} (linear/prefill_configs.h).
_DECODE = ((1,), (2,))
_DENSE = ((16, 8), (32, 8), (32, 1), (128, 8), (128, 16))
_EXPERTS = ((8, 16), (16, 16), (16, 8), (32, 8), (64, 16), (64, 32), (128, 16))
CONFIGS: dict[tuple[str, str], tuple[Config, ...]] = {
    ("decode", "LINEAR"): _DECODE,
    ("decode", "HEAD"): _DECODE,
    ("decode", "DELTA_INPUT"): _DECODE,
    ("decode", "DELTA_OUTPUT"): _DECODE,
    ("decode", "MOE_GATE_UP"): _DECODE,
    ("prefill", "LINEAR"): _DENSE,
    ("prefill", "SWIGLU"): _DENSE,
    ("prefill", "MOE_GATE_UP"): _EXPERTS,
    ("prefill", "MOE_DOWN"): _EXPERTS,
}


@dataclass(frozen=True)
class Work:
    """A kernel on one shape.

    `call(i)` enqueues it on its i-th set of weights, of `sets`; `outputs` are what it writes. `n`, `k`,
    `group` and `rows` are those of a line of the table (cuda/tuning.h).
    """

    operator: str
    phase: str  # "decode" or "prefill"
    kernel: str  # of DecodeKernel or PrefillKernel
    n: int
    k: int
    group: int
    call: Callable[[int], None]
    outputs: tuple[Tensor, ...]
    state: tuple[Tensor, ...] = ()  # read and written
    sets: int = 1
    rows: int = 0

    @property
    def configs(self) -> tuple[Config, ...]:
        return CONFIGS[self.phase, self.kernel]


class Arguments:
    """Random arguments on a GPU, alive as long as this is.

    Weights have as many sets as `cold_bytes` hold, so that no call finds its own in the L2 cache.
    """

    def __init__(self, gpu: Gpu, cold_bytes: int) -> None:
        self.gpu = gpu
        self.cold_bytes = cold_bytes
        self.generator = torch.Generator(gpu.device).manual_seed(0)

    def sets(self, bytes_of_one: int) -> int:
        return max(1, min(128, -(-self.cold_bytes // bytes_of_one)))

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.gpu.device, generator=self.generator)

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, device=self.gpu.device, generator=self.generator)
        return (values * scale).bfloat16()

    def norm(self, k: int) -> tuple[Tensor, object]:
        weight = self.randn(k, scale=0.1)
        return weight, self.gpu.module.RmsNorm(self.gpu.ptr(weight), EPS)


class Int4:
    """Random int4 matrices [n, k] in tiles; `structs` points to them."""

    def __init__(self, a: Arguments, n: int, k: int, group: int, experts: int = 1, sets: int = 0) -> None:
        tiles, groups = (-(-n // 16), -(-k // 64)), -(-k // 64) * 64 // group
        sets = sets or a.sets(experts * n * k // 2)
        self.tiles = torch.randint(
            256,
            (sets, experts, *tiles, 512),
            dtype=torch.uint8,
            device=a.gpu.device,
            generator=a.generator,
        )
        # About unit variance out of unit variance in: codes have a deviation of 4.6.
        self.scales = ((a.rand(sets, experts, tiles[0], groups, 16) + 0.5) / (4.6 * k**0.5)).bfloat16()
        self.n, self.k, self.group, self.sets = n, k, group, sets
        self.structs = [
            a.gpu.module.Int4Matrix(a.gpu.ptr(self.tiles[i]), a.gpu.ptr(self.scales[i]), n, k, group)
            for i in range(sets)
        ]


def _linear_decode(a: Arguments, model: Model, group: int) -> Iterator[Work]:
    gpu, m = a.gpu, a.gpu.module
    D, Z = model.hidden, model.values

    def work(kernel: str, n: int, k: int, normed: bool) -> Work:
        w, x = Int4(a, n, k, group), a.randn(1, k)
        weight, norm = a.norm(k) if normed else (None, m.RmsNorm(0, 0.0))
        residual = None if normed else a.randn(1, n)
        y = gpu.poisoned(1, n, dtype=torch.float32 if kernel == "HEAD" else torch.bfloat16)

        def call(i: int, kept: object = weight) -> None:
            before = (gpu.ptr(x), norm, w.structs[i % w.sets])
            if kernel == "HEAD":
                m.int4_head(*before, gpu.ptr(y), 1, gpu.stream())
            else:
                m.int4_linear_decode(*before, gpu.ptr(residual), gpu.ptr(y), 1, gpu.stream())

        return Work("linear", "decode", kernel, n, k, group, call, (y,), sets=w.sets)

    yield work("LINEAR", model.qkv, D, normed=True)
    yield work("LINEAR", D, Z, normed=False)
    yield work("HEAD", model.vocabulary, D, normed=True)


def _delta_decode(a: Arguments, model: Model, group: int) -> Iterator[Work]:
    gpu, m = a.gpu, a.gpu.module
    D, Z, C, Hv = model.hidden, model.values, model.channels, model.value_heads
    shape = m.DeltaShape(model.key_heads, Hv, model.delta_dim, model.delta_dim, model.taps)
    slot = torch.zeros(1, dtype=torch.int64, device=gpu.device)
    x, residual = a.randn(1, D), a.randn(1, D)

    w = Int4(a, C + Z, D, group)
    weight, norm = a.norm(D)
    ab, taps = a.randn(2 * Hv, D, scale=D**-0.5), a.randn(C, model.taps, scale=0.5)
    history = a.randn(1, C, model.taps - 1)
    mixed, z = gpu.poisoned(1, C, dtype=torch.float32), gpu.poisoned(1, Z, dtype=torch.bfloat16)
    gates = gpu.poisoned(1, 2 * Hv, dtype=torch.float32)

    def delta_input(i: int, w: Int4 = w, kept: Tensor = weight) -> None:
        weights = (norm, w.structs[i % w.sets], gpu.ptr(ab), gpu.ptr(taps))
        outputs = (gpu.ptr(mixed), gpu.ptr(z), gpu.ptr(gates))
        m.delta_input_decode(
            gpu.ptr(x), *weights, gpu.ptr(history), gpu.ptr(slot), *outputs, shape, 1, gpu.stream()
        )

    yield Work(
        "gated_delta",
        "decode",
        "DELTA_INPUT",
        w.n,
        w.k,
        group,
        delta_input,
        (mixed, z, gates),
        (history,),
        w.sets,
    )

    w = Int4(a, D, Z, group)
    core, gate = a.randn(1, Z).float(), a.randn(1, Z)
    head_norm, y = a.randn(model.delta_dim, scale=0.1), gpu.poisoned(1, D, dtype=torch.bfloat16)

    def delta_output(i: int, w: Int4 = w) -> None:
        inputs = (gpu.ptr(core), gpu.ptr(gate), gpu.ptr(head_norm), EPS, w.structs[i % w.sets])
        m.delta_output_decode(*inputs, gpu.ptr(residual), gpu.ptr(y), shape, 1, gpu.stream())

    yield Work("gated_delta", "decode", "DELTA_OUTPUT", w.n, w.k, group, delta_output, (y,), sets=w.sets)


def _moe_decode(a: Arguments, model: Model, group: int) -> Iterator[Work]:
    gpu, m = a.gpu, a.gpu.module
    D, E, A, I = model.hidden, model.experts, model.top_k, model.intermediate  # noqa: E741
    shape = m.MoeShape(D, E, A, I, I)
    weight, norm = a.norm(D)
    x = a.randn(1, D)

    # Calls choose other experts rather than other matrices.
    sets = a.sets(A * D * I)
    scores = a.randn(sets, E + 1).float()

    gate_up, shared_gate_up = Int4(a, 2 * I, D, group, E, 1), Int4(a, 2 * I, D, group, 1, 1)
    act = gpu.poisoned(1, (A + 1) * I, dtype=torch.bfloat16)

    def moe_gate_up(i: int, kept: Tensor = weight) -> None:
        matrices = (gate_up.structs[0], shared_gate_up.structs[0])
        before = (gpu.ptr(x), norm, gpu.ptr(scores[i % sets]))
        m.moe_gate_up_decode(*before, *matrices, gpu.ptr(act), shape, 1, gpu.stream())

    yield Work("moe", "decode", "MOE_GATE_UP", 2 * I, D, group, moe_gate_up, (act,), sets=sets)


def _linear_prefill(a: Arguments, model: Model, group: int, all_tokens: tuple[int, ...]) -> Iterator[Work]:
    gpu, m = a.gpu, a.gpu.module
    D, Z, I = model.hidden, model.values, model.intermediate  # noqa: E741

    def works(kernel: str, n: int, k: int) -> Iterator[Work]:
        w, x = Int4(a, n, k, group), a.randn(max(all_tokens), k)
        width = n // 2 if kernel == "SWIGLU" else n
        for tokens in all_tokens:
            y = gpu.poisoned(tokens, width, dtype=torch.bfloat16)

            def call(i: int, tokens: int = tokens, y: Tensor = y) -> None:
                before = (gpu.ptr(x), w.structs[i % w.sets])
                if kernel == "SWIGLU":
                    m.int4_swiglu_prefill(*before, gpu.ptr(y), tokens, gpu.stream())
                else:
                    m.int4_linear_prefill(*before, 0, gpu.ptr(y), tokens, gpu.stream())

            yield Work("linear", "prefill", kernel, n, k, group, call, (y,), sets=w.sets, rows=tokens)

    shapes = {(model.channels + Z, D), (model.qkv, D), (D, Z), (D, I)}
    for n, k in sorted(shapes, reverse=True):
        yield from works("LINEAR", n, k)
    yield from works("SWIGLU", 2 * I, D)


def _moe_prefill(a: Arguments, model: Model, group: int, all_rows: tuple[int, ...]) -> Iterator[Work]:
    gpu, m = a.gpu, a.gpu.module
    D, E, A, I = model.hidden, model.experts, model.top_k, model.intermediate  # noqa: E741
    shape = m.MoeShape(D, E, A, I, I)
    gate_up, down = Int4(a, 2 * I, D, group, E, 1), Int4(a, D, I, group, E, 1)
    for rows in all_rows:
        tokens = rows * E // A
        ids = a.rand(tokens, E).argsort(-1)[:, :A].int().contiguous()
        order = gpu.poisoned(tokens * A, dtype=torch.int32)
        offsets = gpu.poisoned(E + 1, dtype=torch.int32)
        scratch = gpu.scratch(m.moe_sort_scratch(shape, tokens))
        m.moe_sort(
            gpu.ptr(ids), gpu.ptr(order), gpu.ptr(offsets), gpu.ptr(scratch), shape, tokens, gpu.stream()
        )
        gpu.synchronize()
        x, acts = a.randn(tokens, D), a.randn(tokens * A, I)

        def work(
            kernel: str, w: Int4, source: Tensor, target: Tensor, rows: int = rows, order: Tensor = order,
            offsets: Tensor = offsets, tokens: int = tokens,
        ) -> Work:  # fmt: skip
            launcher = getattr(m, f"{kernel.lower()}_prefill")

            def call(_: int) -> None:
                routed = (gpu.ptr(source), gpu.ptr(order), gpu.ptr(offsets), w.structs[0])
                launcher(*routed, gpu.ptr(target), shape, tokens, gpu.stream())

            return Work("moe", "prefill", kernel, w.n, w.k, group, call, (target,), rows=rows)

        act = gpu.poisoned(tokens * A, I, dtype=torch.bfloat16)
        yield work("MOE_GATE_UP", gate_up, x, act)
        yield work("MOE_DOWN", down, acts, gpu.poisoned(tokens * A, D, dtype=torch.bfloat16))


def workloads(
    gpu: Gpu,
    operators: tuple[str, ...],
    group: int,
    model: Model = QWEN3_5_35B_A3B,
    *,
    tokens: tuple[int, ...] = TOKENS,
    expert_rows: tuple[int, ...] = EXPERT_ROWS,
    cold_bytes: int = 128 << 20,  # more than any card's L2 cache
) -> Iterator[Work]:
    """Each work's tensors live until the next is taken."""
    a = Arguments(gpu, cold_bytes)
    if "gated_delta" in operators:
        yield from _delta_decode(a, model, group)
    if "linear" in operators:
        yield from _linear_decode(a, model, group)
        yield from _linear_prefill(a, model, group, tokens)
    if "moe" in operators:
        yield from _moe_decode(a, model, group)
        yield from _moe_prefill(a, model, group, expert_rows)
