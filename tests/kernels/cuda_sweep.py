"""What a sweep over a CUDA operator's cases is made of: sizes, seeds, random arguments, errors.

A reference is float32 throughout, on the kernel's device: what the kernel rounds on the way counts as error.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.linear.int4_tiles import dequantize_tiles
from torch import Tensor

BOUND, INT8_BOUND, FLOAT8_BOUND = 1e-2, 2e-2, 6e-2
GROUPS = (32, 128)
EPS, THETA = 1e-6, 1e7
BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32

_CHUNK_ELEMENTS = 1 << 26  # of a matrix dequantized at once: the temporaries take 12 bytes an element


@dataclass(frozen=True)
class Model:
    hidden: int
    key_heads: int
    value_heads: int
    delta_dim: int
    query_heads: int
    cache_heads: int
    head_dim: int
    rotary_dim: int
    experts: int
    top_k: int
    intermediate: int
    shared_intermediate: int
    vocabulary: int
    taps: int = 4

    @property
    def channels(self) -> int:
        return (2 * self.key_heads + self.value_heads) * self.delta_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.delta_dim

    @property
    def qkv(self) -> int:
        return 2 * (self.query_heads + self.cache_heads) * self.head_dim


# Qwen3.5-35B-A3B, but for the vocabulary; and one small enough to emulate.
FULL = Model(2048, 16, 32, 128, 16, 2, 256, 64, 256, 8, 512, 512, vocabulary=20_003)
TINY = Model(128, 1, 2, 64, 2, 1, 64, 16, 8, 2, 128, 128, vocabulary=99)


@dataclass(frozen=True)
class Out:
    """What a kernel writes: poisoned before the call."""

    shape: tuple[int, ...]
    dtype: torch.dtype = BF16


@dataclass(frozen=True)
class State:
    """What a kernel changes: a copy of it."""

    before: Tensor


@dataclass(frozen=True)
class Int4:
    """A random int4 matrix [N, K], or experts [E, N, K]."""

    tiles: Tensor
    scales: Tensor
    struct: Any  # Int4Matrix
    dense: Tensor  # f32


class Sweep:
    """The cases of one operator: collects the worst error of each kernel, `report` tells."""

    def __init__(self, gpu: Gpu, group: int | None = None) -> None:
        assert not torch.backends.cuda.matmul.allow_tf32  # the references' products are of float32
        self.gpu, self.group = gpu, group
        self.model = TINY if gpu.emulated else FULL
        self.tokens = (1, 2, 15, 33) if gpu.emulated else (1, 2, 15, 63, 500, 1642, 4095)
        self.rows = (1, 3) if gpu.emulated else (1, 3, 8)
        self._generator = torch.Generator(gpu.device)
        self._seed = -1
        self._errors: dict[str, tuple[float, str]] = {}  # and where
        self._wrong: list[str] = []

    def seeds(self) -> Iterator[int]:
        for seed in range(1 if self.gpu.emulated else 10):
            self._seed = seed
            self._generator.manual_seed(seed)
            yield seed

    def randn(self, *shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, device=self.gpu.device, generator=self._generator)
        return (values * scale).to(dtype)

    def rand(self, *shape: int) -> Tensor:
        """f32 in [0, 1)."""
        return torch.rand(shape, device=self.gpu.device, generator=self._generator)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, device=self.gpu.device, generator=self._generator)

    def slots(self, rows: int) -> tuple[Tensor, Tensor]:
        """`rows` distinct slots of rows + 2, and the other two."""
        order = self.permutation(rows + 2)
        return order[:rows].contiguous(), order[rows:]

    def codes(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Every value of a byte."""
        low = 0 if dtype == torch.uint8 else -128
        return torch.randint(
            low, low + 256, shape, dtype=dtype, device=self.gpu.device, generator=self._generator
        )

    def int4(self, n: int, k: int, experts: int | None = None) -> Int4:
        """About unit variance out of unit variance in: codes have a deviation of 4.6."""
        assert self.group
        lead = () if experts is None else (experts,)
        row_tiles, column_tiles = -(-n // 16), -(-k // 64)
        tiles = self.codes(*lead, row_tiles, column_tiles, 512, dtype=torch.uint8)
        scales = self.rand(*lead, row_tiles, column_tiles * 64 // self.group, 16) + 0.5
        scales = (scales / (4.6 * k**0.5)).to(BF16)
        struct = self.gpu.module.Int4Matrix(tiles.data_ptr(), scales.data_ptr(), n, k, self.group)
        if experts is None:
            return Int4(tiles, scales, struct, dequantize_tiles(tiles, scales, n, k, self.group))
        dense = torch.empty(experts, n, k, device=self.gpu.device)
        step = max(1, _CHUNK_ELEMENTS // (n * k))
        for begin in range(0, experts, step):
            part = slice(begin, begin + step)
            dense[part] = dequantize_tiles(tiles[part], scales[part], n, k, self.group)
        return Int4(tiles, scales, struct, dense)

    def norm(self, k: int) -> tuple[Tensor, Any]:
        """The weight and the RmsNorm of it, which does not keep it."""
        weight = self.randn(k, scale=0.3)
        return weight, self.gpu.module.RmsNorm(self.gpu.ptr(weight), EPS)

    def run(self, launcher: Callable[..., None], *arguments: Any) -> tuple[Tensor, ...]:
        """What `launcher` makes of its outputs, `Out` and `State` of the arguments: the same bits twice.

        Of tensors it gets the address, and the stream comes last.
        """
        first, second = self._once(launcher, arguments), self._once(launcher, arguments)
        for a, b in zip(first, second, strict=True):
            same = torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            self.require(f"{launcher.__name__}: the second call", [*a.shape], same)
        return first

    def _once(self, launcher: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        gpu = self.gpu
        kept, outputs = [], []
        for argument in arguments:
            if isinstance(argument, Out):
                outputs.append(gpu.poisoned(*argument.shape, dtype=argument.dtype))
                argument = outputs[-1]
            elif isinstance(argument, State):
                outputs.append(argument.before.clone())
                argument = outputs[-1]
            kept.append(gpu.ptr(argument) if argument is None or isinstance(argument, Tensor) else argument)
        launcher(*kept, gpu.stream())
        gpu.synchronize()
        return tuple(outputs)

    def compare(
        self, name: str, case: object, actual: Tensor, expected: Tensor, bound: float = BOUND
    ) -> None:
        """||actual - expected|| / ||expected|| of `name` in a case."""
        error = ((actual.float() - expected).norm() / expected.norm()).item()
        where = f"seed {self._seed}, {case}"
        if not error < bound:
            self._wrong.append(f"{name}: {error:.2e} ({where})")
        if not error <= self._errors.get(name, (-1.0, ""))[0]:
            self._errors[name] = error, where

    def require(self, name: str, case: object, condition: bool) -> None:
        """What is right or wrong, without an error between."""
        if not condition:
            self._wrong.append(f"{name} is wrong (seed {self._seed}, {case})")

    def report(self) -> None:
        """Prints a line for each kernel, and fails for all that is wrong at once."""
        for name, (error, where) in self._errors.items():
            group = f"group {self.group:3}" if self.group else ""
            print(f"\n{name:34} {group:9}: worst {error:.2e} ({where})", end="")
        assert not self._wrong, "\n".join(self._wrong[:20])


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """f32, without a rounding."""
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + EPS) * (1 + weight.float())


def swiglu(product: Tensor) -> Tensor:
    """[..., 2 I], gate and up interleaved by eights -> silu(gate) * up, [..., I]."""
    gate, up = product.unflatten(-1, (-1, 2, 8)).unbind(-2)
    return (torch.nn.functional.silu(gate) * up).flatten(-2)


def attend(
    model: Model,
    qkv: Tensor,
    norms: tuple[Tensor, Tensor],
    past: tuple[Tensor, Tensor],
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rows at consecutive positions after `past`, keys and values [Hkv, P, Dh] of one slot.

    -> out f32 [T, Hq Dh], the rows' keys f32 [Hkv, T, Dh].
    """
    dim, heads = model.head_dim, (model.query_heads, model.cache_heads)
    q_and_gate, k, v = qkv.float().split([2 * heads[0] * dim, heads[1] * dim, heads[1] * dim], dim=-1)
    q, gate = q_and_gate.unflatten(1, (heads[0], 2 * dim)).chunk(2, dim=-1)
    q = rotate(rms_norm(q, norms[0]), positions, model.rotary_dim).transpose(0, 1)
    k = rotate(rms_norm(k.unflatten(1, (heads[1], dim)), norms[1]), positions, model.rotary_dim)
    k, v = k.transpose(0, 1), v.unflatten(1, (heads[1], dim)).transpose(0, 1)
    repeats = heads[0] // heads[1]
    keys = torch.cat((past[0].float(), k), dim=1).repeat_interleave(repeats, dim=0)
    values = torch.cat((past[1].float(), v), dim=1).repeat_interleave(repeats, dim=0)
    scores = q @ keys.mT * dim**-0.5
    later = torch.arange(keys.shape[1], device=qkv.device) > positions[:, None]
    out = scores.masked_fill_(later, -torch.inf).softmax(dim=-1) @ values
    return (out.transpose(0, 1) * gate.sigmoid()).flatten(1), k


def rotate(x: Tensor, positions: Tensor, rotary_dim: int) -> Tensor:
    """x f32 [T, H, Dh] -> the same with its first R dimensions rotated, halves paired; angles in float64."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=x.device) / rotary_dim
    angles = (positions.double()[:, None] * THETA**-exponent)[:, None]
    turn = torch.polar(torch.ones_like(angles), angles)
    first, second, passed = x.split([rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim], dim=-1)
    turned = torch.complex(first.double(), second.double()) * turn
    return torch.cat((turned.real.float(), turned.imag.float(), passed), dim=-1)
