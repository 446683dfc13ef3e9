"""Quantization: packing, error bounds, the scale search, chunks, and what is quantized at all."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_runner.export import quantize
from qwen_runner.export.checkpoint import Checkpoint
from qwen_runner.export.config import load_config
from qwen_runner.export.errors import ExportError
from qwen_runner.export.quantize import (
    GROUP_SIZES,
    QuantizationConfig,
    check_quantizable,
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8,
    weight_kind,
)

INT4 = QuantizationConfig()


def weights(seed: int, *shape: int, tail: float | None = None, scale: float = 0.02) -> torch.Tensor:
    """Normal weights, or Student's t of `tail` degrees of freedom, as a bfloat16 checkpoint holds them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if tail is not None:
        chi2 = torch.randn((int(tail), *shape), generator=generator).square().sum(0)
        values = values / (chi2 / tail).sqrt()
    return (values * scale).to(torch.bfloat16)


def group_errors(weight: torch.Tensor, group_size: int, method: str) -> torch.Tensor:
    """Squared error of each group, float64."""
    restored = dequantize_int4(*quantize_int4(weight, group_size, method))
    return (restored.double() - weight.double()).square().unflatten(-1, (-1, group_size)).sum(-1)


def test_packing_order_is_low_nibble_first_and_code_plus_8() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([-8.0, 7.0, 1.0, -3.0])
    qweight, scales = quantize_int4(weight, 32, "rtn")
    assert scales.tolist() == [[1.0]]
    assert qweight[0, :2].tolist() == [0 | 15 << 4, 9 | 5 << 4]
    assert qweight[0, 2:].tolist() == [0x88] * 14


def test_rtn_takes_the_better_of_its_two_scales() -> None:
    # An extreme of -8 units is met exactly by -8; magnitudes of +-7 units only by the symmetric scale.
    exact = torch.arange(-8, 8).repeat(2).float().view(1, 32)
    assert torch.equal(dequantize_int4(*quantize_int4(exact, 32, "rtn")), exact)
    assert torch.equal(dequantize_int4(*quantize_int4(-exact, 32, "rtn")), -exact)
    symmetric = exact.clamp(-7, 7)
    assert torch.equal(dequantize_int4(*quantize_int4(symmetric, 32, "rtn")), symmetric)


@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    exponent=st.integers(-30, 30),
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
)
def test_int4_round_trip(
    method: str, group_size: int, seed: int, exponent: int, rows: int, groups: int
) -> None:
    weight = weights(seed, 2, rows, groups * group_size, tail=3, scale=2.0**exponent)
    qweight, scales = quantize_int4(weight, group_size, method)
    assert (qweight.shape, qweight.dtype) == ((2, rows, groups * group_size // 2), torch.uint8)
    assert (scales.shape, scales.dtype) == ((2, rows, groups), torch.bfloat16)
    restored = dequantize_int4(qweight, scales)
    assert (restored.shape, restored.dtype) == (weight.shape, torch.float32)
    # Codes are the nearest to the stored scale: half a step, or what the range of codes cuts off.
    grouped = weight.double().unflatten(-1, (groups, group_size))
    step = scales.double().unsqueeze(-1)
    nearest = (grouped / step).round().clamp(-8, 7) * step
    assert torch.equal(restored.double().unflatten(-1, (groups, group_size)), nearest)
    if method == "rtn":  # which covers the group but for a code of +8, to bfloat16's rounding of the scale
        assert ((nearest - grouped).abs() <= step.abs() * (1 + 8 * 2**-8)).all()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), tail=st.sampled_from([None, 1, 2, 4]))
def test_hqq_is_never_worse_than_rtn(group_size: int, seed: int, tail: float | None) -> None:
    weight = weights(seed, 16, group_size, tail=tail)
    rtn, hqq = (group_errors(weight, group_size, method) for method in ("rtn", "hqq"))
    assert (hqq <= rtn * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("group_size", "tail", "gain"), [(32, None, 0.06), (32, 4, 0.04), (128, None, 0.08), (128, 4, 0.10)]
)
def test_hqq_is_better_than_rtn(group_size: int, tail: float | None, gain: float) -> None:
    weight = weights(0, 2000, group_size, tail=tail)
    rtn, hqq = (group_errors(weight, group_size, method).mean() for method in ("rtn", "hqq"))
    assert hqq <= rtn * (1 - gain)


def test_hqq_comes_close_to_an_exhaustive_search() -> None:
    weight = weights(1, 1000, 128)
    groups = weight.float()
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    least = torch.full((1000, 1), torch.inf)
    for fraction in torch.linspace(0.5, 1.1, 60):
        for limit in (8, -8):
            scale = (extreme * fraction / limit).bfloat16().float()
            error = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(-1, keepdim=True)
            least = torch.minimum(least, error)
    assert group_errors(weight, 128, "hqq").mean() <= least.mean() * 1.015


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-30, 30), group_size=st.sampled_from(GROUP_SIZES))
def test_int8_round_trip(seed: int, exponent: int, group_size: int) -> None:
    weight = weights(seed, 3, 2 * group_size, scale=2.0**exponent)
    qweight, scales = quantize_int8(weight, group_size)
    assert (qweight.shape, qweight.dtype) == (weight.shape, torch.int8)
    assert (scales.shape, scales.dtype) == ((3, 2), torch.bfloat16)
    step = scales.float().repeat_interleave(group_size, dim=-1)
    error = (dequantize_int8(qweight, scales) - weight.float()).abs()
    assert (error <= step * (0.5 + 127 * 2**-8)).all()
    assert error.square().mean().sqrt() <= 0.5 * step.mean()


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_zeros_and_extremes_stay_finite(method: str) -> None:
    weight = torch.zeros(4, 32)
    weight[1, 5], weight[2, 0], weight[3] = 1e-40, 1e30, -2e-3
    restored = dequantize_int4(*quantize_int4(weight, 32, method))
    assert torch.equal(restored[0], weight[0])
    assert restored.isfinite().all()
    torch.testing.assert_close(restored[2:], weight[2:], rtol=2**-8, atol=0)
    restored = dequantize_int8(*quantize_int8(weight, 32))
    assert torch.equal(restored[0], weight[0])
    torch.testing.assert_close(restored[2:], weight[2:], rtol=2**-8, atol=0)


@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("chunk", [1, 32 * 7, 32 * 64])
def test_chunks_equal_the_whole(monkeypatch: pytest.MonkeyPatch, method: str, chunk: int) -> None:
    weight = weights(2, 3, 17, 96, tail=3)
    whole, whole_int8 = quantize_int4(weight, 32, method), quantize_int8(weight, 32)
    monkeypatch.setitem(quantize._CHUNK_WEIGHTS, "cpu", chunk)
    assert all(map(torch.equal, quantize_int4(weight, 32, method), whole))
    assert all(map(torch.equal, quantize_int8(weight, 32), whole_int8))


def test_no_chunk_is_larger_than_the_limit() -> None:
    weight = torch.zeros(9, 1024, 2048, dtype=torch.bfloat16)  # nine of Qwen3.5-35B-A3B's experts
    chunks = [(part, groups.numel()) for part, groups in quantize._chunks(weight, 128, None)]
    assert max(size for _, size in chunks) <= quantize._CHUNK_WEIGHTS["cpu"]
    assert sum(size for _, size in chunks) == weight.numel()
    assert all(left.stop == right.start for (left, _), (right, _) in itertools.pairwise(chunks))


def test_rows_concatenate_after_quantizing_as_before() -> None:
    parts = [weights(3, 5, 64), weights(4, 9, 64, tail=2)]
    together = quantize_int4(torch.cat(parts), 32)
    apart = [torch.cat(tensors) for tensors in zip(*(quantize_int4(part, 32) for part in parts), strict=True)]
    assert all(map(torch.equal, together, apart))


def test_a_view_quantizes_as_its_copy() -> None:
    view = weights(5, 64, 40).T
    assert not view.is_contiguous()
    assert all(map(torch.equal, quantize_int4(view, 64), quantize_int4(view.contiguous(), 64)))


def test_columns_must_divide_into_groups() -> None:
    weight = torch.zeros(4, 96)
    with pytest.raises(ExportError, match=r"tensor a\.b has 96 columns, .* 64; use --group-size 32"):
        quantize_int4(weight, 64, name="a.b")
    with pytest.raises(ExportError, match=r"has 40 columns, .* 32; use --quantize none"):
        quantize_int8(torch.zeros(4, 40), 32)


@pytest.mark.parametrize(
    ("key", "value"), [("scheme", "int3"), ("group_size", 16), ("method", "gptq"), ("head", "keep")]
)
def test_an_unknown_option_is_an_error(key: str, value: object) -> None:
    with pytest.raises(ExportError, match=rf"quantization {key} .*{value}.*supported: "):
        QuantizationConfig(**{key: value})


def test_what_is_quantized(random_checkpoint) -> None:
    with Checkpoint(random_checkpoint("interval")) as checkpoint:
        kinds = {name: weight_kind(name, INT4) for name in checkpoint.names()}
        assert {weight_kind(name, QuantizationConfig("none")) for name in kinds} == {"keep"}
    layer = {name.split(".", 3)[-1]: kind for name, kind in kinds.items() if name.startswith("model.layers.")}
    assert {name for name, kind in layer.items() if kind == "keep"} == {
        "input_layernorm.weight",
        "linear_attn.A_log",
        "linear_attn.conv1d.weight",
        "linear_attn.dt_bias",
        "linear_attn.in_proj_a.weight",
        "linear_attn.in_proj_b.weight",
        "linear_attn.norm.weight",
        "mlp.gate.weight",
        "mlp.shared_expert_gate.weight",
        "post_attention_layernorm.weight",
        "self_attn.k_norm.weight",
        "self_attn.q_norm.weight",
    }
    assert "int8" not in layer.values()
    assert kinds["model.embed_tokens.weight"] == "int8"
    assert kinds["model.norm.weight"] == "keep"
    assert kinds["lm_head.weight"] == "int4"
    assert weight_kind("lm_head.weight", QuantizationConfig(head="int8")) == "int8"


def test_a_model_that_cannot_be_quantized_fails_before_any_work(random_checkpoint) -> None:
    config = load_config(random_checkpoint("interval"))
    check_quantizable(config, QuantizationConfig(group_size=32))
    check_quantizable(config, QuantizationConfig("none", group_size=128))
    with pytest.raises(ExportError, match=r"has 64 columns, .* group size 128; use --group-size 64"):
        check_quantizable(config, QuantizationConfig(group_size=128))
    check_quantizable(load_config(random_checkpoint("group_128")), QuantizationConfig(group_size=128))


@pytest.mark.parametrize("name", ["group_128", "nested_per_expert"])
def test_transformers_runs_with_the_dequantized_weights(random_checkpoint, name: str) -> None:
    from oracle import fake_quantized_state_dict, load_weights
    from random_checkpoints import SPECS, hf_greedy, hf_model, random_prompt

    path = random_checkpoint(name)
    model, prompt = hf_model(path), random_prompt(SPECS[name], 9)
    _, exact = hf_greedy(model, prompt, 1)
    with Checkpoint(path) as checkpoint:
        for quantization, low, high in ((QuantizationConfig("none"), 0.0, 0.0), (INT4, 0.01, 0.8)):
            state = fake_quantized_state_dict(checkpoint, checkpoint.config, quantization, torch.float32)
            load_weights(model, state)
            _, logits = hf_greedy(model, prompt, 1)
            error = float((logits - exact).norm() / exact.norm())
            assert low <= error <= high
