"""What a benchmark of CUDA kernels is made of: random arguments, a check, a time, the card's peaks.

The shapes are Qwen3.5-35B-A3B's.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from qwen_runner.kernels.linear.int4_tiles import dequantize_tiles
from torch import Tensor

D, LAYERS = 2048, 40
KEY_HEADS, VALUE_HEADS, DELTA_DIM, TAPS = 16, 32, 128, 4
QUERY_HEADS, CACHE_HEADS, HEAD_DIM, ROTARY_DIM = 16, 2, 256, 64
EXPERTS, TOP_K, INTERMEDIATE = 256, 8, 512
VOCABULARY = 248_320
CHANNELS, VALUES = (2 * KEY_HEADS + VALUE_HEADS) * DELTA_DIM, VALUE_HEADS * DELTA_DIM
QKV = (2 * QUERY_HEADS + 2 * CACHE_HEADS) * HEAD_DIM
EPS = 1e-6


@dataclass
class Workload:
    """One kernel: how to call it, what it moves and computes.

    `call(i)` enqueues it on its i-th set of arguments; `check` compares set 0 with the reference.
    """

    name: str
    call: Callable[[int], None]
    bytes: float
    operations: float = 0.0
    per_token: int = 1  # calls in a decode step, or in a prefill chunk
    check: Callable[[], float] | None = None  # relative error


class Bench:
    """Random arguments on the GPU, and the launchers."""

    def __init__(self, group: int) -> None:
        from qwen_runner import _cuda_kernels

        self.module = _cuda_kernels
        self.group = group
        self.generator = torch.Generator("cuda").manual_seed(0)
        self.counters = torch.zeros(_cuda_kernels.COUNTERS, dtype=torch.int32, device="cuda")
        self.kept: list[Tensor] = []

    def keep(self, tensor: Tensor) -> Tensor:
        self.kept.append(tensor)
        return tensor

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, device="cuda", generator=self.generator) * scale
        return self.keep(values.to(dtype))

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return self.keep(torch.full(shape, float("nan"), device="cuda").to(dtype))

    def scratch(self, size: int) -> Tensor:
        return self.keep(torch.empty(max(size, 16), dtype=torch.uint8, device="cuda"))

    def int4(self, n: int, k: int, experts: int = 0) -> "Int4":
        return Int4(self, n, k, experts)

    def norm(self, k: int) -> tuple[Tensor, object]:
        weight = self.randn(k, scale=0.1)
        return weight, self.module.RmsNorm(weight.data_ptr(), EPS)

    @property
    def no_norm(self) -> object:
        return self.module.RmsNorm(0, 0.0)


class Int4:
    """A random int4 matrix [N, K] in tiles, or `experts` of them."""

    def __init__(self, bench: Bench, n: int, k: int, experts: int) -> None:
        lead = (experts,) if experts else ()
        groups = -(-k // 64) * 64 // bench.group
        shape = (*lead, -(-n // 16), -(-k // 64), 512)
        self.tiles = bench.keep(
            torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=bench.generator)
        )
        # About unit variance out of unit variance in: codes have a deviation of 4.6.
        scales = torch.rand((*lead, -(-n // 16), groups, 16), device="cuda", generator=bench.generator)
        self.scales = bench.keep(((scales + 0.5) / (4.6 * k**0.5)).to(torch.bfloat16))
        self.n, self.k, self.group = n, k, bench.group
        self.bytes = self.tiles[0].numel() * 1.0 if experts else self.tiles.numel() * 1.0
        self.bytes += 2.0 * (self.scales[0].numel() if experts else self.scales.numel())
        self.struct = bench.module.Int4Matrix(
            self.tiles.data_ptr(), self.scales.data_ptr(), n, k, bench.group
        )

    def dense(self, expert: int | None = None) -> Tensor:
        """f32 [N, K]."""
        tiles, scales = (
            (self.tiles, self.scales) if expert is None else (self.tiles[expert], self.scales[expert])
        )
        return dequantize_tiles(tiles, scales, self.n, self.k, self.group)


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1 + weight.float())).bfloat16().float()


def microseconds(work: Workload, calls: int = 64, replays: int = 20) -> float:
    """The median over replays of a graph of `calls` calls."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for i in range(8):
            work.call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            work.call(i)
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[2:])


def peaks() -> tuple[float, float]:
    """(bytes a second of a copy, read and written; operations a second of a bfloat16 product).

    Not from a graph: there a copy becomes a copy engine's, at two thirds of what the multiprocessors reach.
    """
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy = _eager_seconds(lambda: target.copy_(source))
    product = _eager_seconds(lambda: torch.mm(a, b))
    return 8.0 * source.numel() / copy, 2.0 * 8192**3 / product


def _eager_seconds(call: Callable[[], object]) -> float:
    """The median of ten calls after three to warm up."""
    times = []
    for _ in range(13):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])
