"""Shapes and inputs of the CUDA gated delta rule, for tests and benchmarks."""

from dataclasses import dataclass

import torch

from . import reference


@dataclass(frozen=True)
class Heads:
    """Hk key heads and Hv value heads of Dk and Dv, W convolution taps."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int = 4

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_size

    @property
    def value_size(self) -> int:
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class Nature:
    """How inputs are drawn.

    Rates of decay, exp(a_log), are log-uniform between two bounds. `common` is the size of what all tokens
    share beside each token's own: the larger, the more keys and queries resemble each other.
    """

    slowest: float = 0.01
    fastest: float = 16.0
    common: float = 0.0


@dataclass
class Inputs:
    """What delta_prefill takes, in its order; the states advance in place."""

    qkvz: torch.Tensor  # bf16 [T, C + Z]
    gates: torch.Tensor  # f32 [T, 2 Hv]
    conv_weight: torch.Tensor  # bf16 [C, W]
    a_log: torch.Tensor  # bf16 [Hv]
    dt_bias: torch.Tensor  # bf16 [Hv]
    conv_state: torch.Tensor  # bf16 [S, C, W - 1]
    recurrent_state: torch.Tensor  # f32 [S, Hv, Dk, Dv]
    slot: torch.Tensor  # i64 [1]


FULL = Heads(16, 32, 128, 128)
# Those that run chunk by chunk, and those that run token by token.
CHUNKED = [
    Heads(1, 2, 128, 128),
    Heads(2, 4, 64, 64),
    Heads(1, 3, 64, 32, taps=2),
    Heads(1, 1, 128, 32, taps=3),
]
RECURRENT = [
    Heads(2, 4, 16, 16),
    Heads(1, 2, 32, 8, taps=2),
    Heads(2, 2, 128, 16),
    Heads(1, 2, 16, 8, taps=3),
    Heads(1, 2, 32, 64),
]
TOKENS = [1, 2, 3, 15, 63, 64, 65, 130]
LONG_TOKENS = [500, 1000, 1642, 2048]
NATURES = [
    Nature(),
    Nature(slowest=1e-4, fastest=1e-2, common=1.0),  # a long memory of keys that resemble each other
    Nature(slowest=100.0, fastest=1e6),  # the state wiped out at every token
]


def inputs(
    heads: Heads,
    tokens: int,
    generator: torch.Generator,
    device: torch.device,
    nature: Nature = NATURES[0],
    slots: int = 3,
    slot: int = 1,
) -> Inputs:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    channels, value_heads = heads.channels, heads.value_heads
    qkvz = normal(tokens, channels + heads.value_size) + nature.common * normal(channels + heads.value_size)
    bounds = torch.tensor([nature.slowest, nature.fastest]).log()
    a_log = bounds[0] + (bounds[1] - bounds[0]) * torch.rand(value_heads, generator=generator)
    drawn = Inputs(
        qkvz.bfloat16(),
        normal(tokens, 2 * value_heads).bfloat16().float(),
        (normal(channels, heads.taps) * 0.5).bfloat16(),
        a_log.bfloat16(),
        normal(value_heads).bfloat16(),
        normal(slots, channels, heads.taps - 1).bfloat16(),
        normal(slots, value_heads, heads.key_dim, heads.value_dim) * 0.1,
        torch.tensor([slot]),
    )
    return Inputs(*(tensor.to(device) for tensor in vars(drawn).values()))


def expected(heads: Heads, given: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(core f32 [T, Z], conv_state, recurrent_state) of the reference in float32; keeps `given`."""
    conv_state, recurrent_state = given.conv_state.float(), given.recurrent_state.clone()
    a, b = given.gates.chunk(2, dim=1)
    core = reference.gated_delta(
        given.qkvz[:, : heads.channels].float(),
        a,
        b,
        given.conv_weight,
        given.a_log,
        given.dt_bias,
        conv_state,
        recurrent_state,
        given.slot,
        heads.key_heads,
    )
    return core, conv_state.bfloat16(), recurrent_state
