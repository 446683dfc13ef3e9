"""What no kernel is made for is refused before anything is launched: the pointers here are null."""

from collections.abc import Callable

import pytest
from qwen_runner.kernels.cuda_native import Gpu

Launch = Callable[[Gpu], None]


def _int4(gpu: Gpu, n: int, k: int, group: int) -> object:
    return gpu.module.Int4Matrix(0, 0, n, k, group)


def _delta_step(*shape: int) -> Launch:
    return lambda gpu: gpu.module.delta_step_decode(*[0] * 7, gpu.module.DeltaShape(*shape), 1, gpu.stream())


def _delta_prefill(*shape: int) -> Launch:
    return lambda gpu: gpu.module.delta_prefill(*[0] * 10, gpu.module.DeltaShape(*shape), 1, gpu.stream())


def _attention(query_heads: int, key_heads: int, head_dim: int, rotary_dim: int) -> Launch:
    def launch(gpu: Gpu) -> None:
        shape = gpu.module.AttentionShape(query_heads, key_heads, head_dim, rotary_dim, 1e4, 1e-6, 8)
        gpu.module.attention_decode(*[0] * 10, shape, 1, gpu.stream())

    return launch


def _experts(experts: int, n: int, k: int, group: int = 32) -> Launch:
    def launch(gpu: Gpu) -> None:
        shape = gpu.module.MoeShape(k, experts, 1, n // 2, 32)
        gpu.module.moe_gate_up_prefill(0, 0, 0, _int4(gpu, n, k, group), 0, shape, 1, gpu.stream())

    return launch


def _linear(n: int, k: int, group: int) -> Launch:
    return lambda gpu: gpu.module.int4_linear_decode(
        0, gpu.module.RmsNorm(0, 1e-6), _int4(gpu, n, k, group), 0, 0, 1, gpu.stream()
    )


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(_delta_step(2, 3, 64, 64, 4), id="value heads no multiple of key heads"),
        pytest.param(_delta_step(1, 1, 64, 96, 4), id="a value dimension that is no power of two"),
        pytest.param(_delta_prefill(1, 1, 64, 64, 5), id="five taps"),
        pytest.param(_delta_prefill(1, 1, 64, 64, 1), id="one tap"),
        pytest.param(_attention(4, 3, 64, 64), id="query heads no multiple of key heads"),
        pytest.param(_attention(4, 2, 40, 8), id="a head of 40"),
        pytest.param(_attention(4, 2, 64, 96), id="more rotary dimensions than dimensions"),
        pytest.param(_experts(512, 8192, 8192), id="more weights than 32 bits count"),
        pytest.param(_experts(4, 24, 64), id="half a tile of gates"),
        pytest.param(_linear(16, 64, 128), id="a group and a half"),
        pytest.param(_linear(16, 48, 32), id="a width no multiple of 32"),
    ],
)
def test_is_refused(gpu: Gpu, launch: Launch) -> None:
    with pytest.raises(RuntimeError, match="invalid argument"):
        launch(gpu)
