"""The router and the experts."""

from collections.abc import Callable

import pytest
import torch
from kernel_checks import Kernel, assert_close, assert_kernel_matches
from qwen_runner.kernels.linear.reference import dequantize_int4
from qwen_runner.kernels.moe import cases, reference

MAKERS = {"float_moe": cases.float_arguments, "int4_moe": cases.int4_arguments}


def _hugging_face(case: cases.MoeCase, dtype: torch.dtype) -> object:
    modeling = pytest.importorskip("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe")
    configuration = pytest.importorskip("transformers.models.qwen3_5_moe.configuration_qwen3_5_moe")
    config = configuration.Qwen3_5MoeTextConfig(
        hidden_size=case.hidden,
        num_experts=case.experts,
        moe_intermediate_size=case.intermediate,
        num_experts_per_tok=case.top_k,
        shared_expert_intermediate_size=case.intermediate,
    )
    config._experts_implementation = "eager"
    return modeling.Qwen3_5MoeSparseMoeBlock(config).to(dtype)


@pytest.mark.parametrize("case", [c for c in cases.CORRECTNESS if c.tokens < 100], ids=str)
@torch.no_grad()
def test_references_match_hugging_face(generator: torch.Generator, case: cases.MoeCase) -> None:
    block = _hugging_face(case, case.dtype)
    x, weight, top_k = cases.router_arguments(case, generator)
    block.gate.weight.copy_(weight)
    _, expected_weights, expected_ids = block.gate(x)
    ids, weights = reference.router(x, weight, top_k)
    if case.dtype == torch.float32:  # bfloat16 logits tie, and torch.topk breaks ties as it likes
        assert torch.equal(ids, expected_ids)
    assert_close(weights, expected_weights.float(), case.dtype)

    _, ids, weights, gate_up, down = cases.float_arguments(case, generator)
    weights = weights.to(case.dtype).float()
    block.experts.gate_up_proj.copy_(gate_up)
    block.experts.down_proj.copy_(down)
    expected = block.experts(x, ids, weights.to(case.dtype))
    actual = reference.float_moe(x, ids, weights, gate_up, down)
    if case.dtype == torch.float32:
        assert_close(actual, expected, case.dtype)
    else:  # Hugging Face rounds between all steps, the reference once
        assert (actual.float() - expected.float()).abs().max() < 0.03 * expected.float().abs().max()


@pytest.mark.parametrize("case", cases.CORRECTNESS, ids=str)
def test_router_kernel_matches_reference(
    kernel: Kernel, generator: torch.Generator, case: cases.MoeCase
) -> None:
    arguments = cases.router_arguments(case, generator)
    ids, weights = kernel("router", *arguments)
    expected_ids, expected_weights = torch.ops.qwen.router(*arguments)
    assert torch.equal(ids, expected_ids)
    assert_close(weights, expected_weights, case.dtype)
    assert torch.allclose(
        weights.sum(dim=1), torch.ones(case.tokens), atol=1e-5 if case.dtype == torch.float32 else 0.02
    )


def test_equal_logits_take_the_lowest_experts(kernel: Kernel) -> None:
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    weight = torch.zeros(8, 32, dtype=torch.bfloat16)
    weight[5] = 1
    for ids, weights in (kernel("router", x, weight, 3), torch.ops.qwen.router(x, weight, 3)):
        assert ids.tolist() == [[5, 0, 1]] * 2
        assert weights[0, 1] == weights[0, 2]


def test_a_nan_still_routes_to_experts_that_exist(kernel: Kernel) -> None:
    ids, _ = kernel("router", torch.full((2, 32), float("nan")), torch.ones(4, 32), 4)
    assert [sorted(row) for row in ids.tolist()] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("case", cases.CORRECTNESS, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_experts_kernel_matches_reference(
    kernel: Kernel, generator: torch.Generator, case: cases.MoeCase, name: str
) -> None:
    assert_kernel_matches(kernel, name, MAKERS[name](case, generator), case.dtype)


def test_int4_experts_are_float_experts_of_the_dequantized_weights(generator: torch.Generator) -> None:
    x, ids, weights, gate_up, gate_up_scales, down, down_scales = cases.int4_arguments(
        cases.CORRECTNESS[3], generator
    )
    expected = reference.float_moe(
        x, ids, weights, dequantize_int4(gate_up, gate_up_scales), dequantize_int4(down, down_scales)
    )
    assert torch.equal(
        reference.int4_moe(x, ids, weights, gate_up, gate_up_scales, down, down_scales), expected
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_a_token_does_not_depend_on_the_others(
    kernel: Kernel,
    set_threads: Callable[[int], None],
    generator: torch.Generator,
    name: str,
    dtype: torch.dtype,
) -> None:
    case = cases.MoeCase(29, 96, 8, 64, 3, 32, dtype, "one")
    x, ids, weights, *experts = MAKERS[name](case, generator)
    whole = kernel(name, x, ids, weights, *experts)
    set_threads(3)
    for size in (1, 2, 5, 29):
        parts = [
            kernel(name, *(p.contiguous() for p in part), *experts)
            for part in zip(x.split(size), ids.split(size), weights.split(size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("bad_id", [-1, 8])
@pytest.mark.parametrize("name", MAKERS)
def test_an_expert_that_does_not_exist_is_refused(
    kernel: Kernel, generator: torch.Generator, name: str, bad_id: int
) -> None:
    arguments = MAKERS[name](cases.MoeCase(3, 64, 8, 32, 2, 32), generator)
    arguments[1][2, 1] = bad_id
    for function in (kernel, lambda name, *a: getattr(torch.ops.qwen, name)(*a)):
        with pytest.raises(IndexError):
            function(name, *arguments)
