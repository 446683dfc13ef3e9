"""The norms, which Inductor compiles, against Hugging Face's modules."""

import pytest
import torch
from qwen_runner.kernels.norm import gated_rms_norm, rms_norm

EPSILON = 1e-6


@pytest.fixture
def modeling() -> object:
    return pytest.importorskip("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_rms_norm_is_hugging_faces(modeling: object, generator: torch.Generator, dtype: torch.dtype) -> None:
    module = modeling.Qwen3_5MoeRMSNorm(48, EPSILON).to(dtype)
    module.weight.copy_(torch.randn(48, generator=generator))
    x = (torch.randn(7, 3, 48, generator=generator) * 5).to(dtype)
    assert torch.equal(rms_norm(x, module.weight, EPSILON), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_gated_rms_norm_is_hugging_faces(
    modeling: object, generator: torch.Generator, dtype: torch.dtype
) -> None:
    module = modeling.Qwen3_5MoeRMSNormGated(48, EPSILON).to(dtype)
    module.weight.copy_(torch.randn(48, generator=generator))
    x, gate = (torch.randn(2, 7, 48, generator=generator) * 5).to(dtype)
    assert torch.equal(gated_rms_norm(x, gate, module.weight, EPSILON), module(x, gate))
