"""The gated delta rule."""

from collections.abc import Callable

import pytest
import torch
from kernel_checks import Kernel, assert_close, assert_kernel_matches, copies
from qwen_runner.kernels.gated_delta import cases, reference

STATES = (6, 7)


@pytest.mark.parametrize("rows", [1, 2, 63, 130])
@torch.no_grad()
def test_reference_matches_hugging_face(generator: torch.Generator, rows: int) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe")
    case = cases.GatedDeltaCase(rows, 2, 6, 24, 16, slots=3)
    arguments = cases.arguments(case, generator)
    mixed, a, b, conv_weight, a_log, dt_bias, conv_state, recurrent_state, slot, _ = copies(arguments)
    actual = reference.gated_delta(*arguments)

    s = int(slot)
    convolution = conv_state[s : s + 1].clone()
    mixed = modeling.causal_conv1d_update(mixed.T[None], convolution, conv_weight, None, "silu")[0].T
    q, k, v = mixed.split([48, 48, 96], dim=-1)
    expected, state = modeling.torch_recurrent_gated_delta_rule(
        # One query and key head a value head: what every version takes.
        q.reshape(1, rows, 2, 24).repeat_interleave(3, dim=2),
        k.reshape(1, rows, 2, 24).repeat_interleave(3, dim=2),
        v.reshape(1, rows, 6, 16),
        g=(-a_log.exp() * torch.nn.functional.softplus(a + dt_bias))[None],
        beta=b.sigmoid()[None],
        initial_state=recurrent_state[s : s + 1],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    assert_close(actual, expected.reshape(rows, 96), torch.float32)
    assert_close(arguments[7][s], state[0], torch.float32)
    assert torch.equal(arguments[6][s], convolution[0])
    for i, before in zip(STATES, (conv_state, recurrent_state), strict=True):
        assert torch.equal(arguments[i][:s], before[:s])


@pytest.mark.parametrize("case", cases.CORRECTNESS, ids=str)
def test_kernel_matches_reference(
    kernel: Kernel, generator: torch.Generator, case: cases.GatedDeltaCase
) -> None:
    assert_kernel_matches(kernel, "gated_delta", cases.arguments(case, generator), case.dtype, STATES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_in_chunks_and_token_by_token_agree_bit_for_bit(
    kernel: Kernel, set_threads: Callable[[int], None], generator: torch.Generator, dtype: torch.dtype
) -> None:
    case = cases.GatedDeltaCase(300, 2, 4, 32, 72, dtype=dtype)
    mixed, a, b, *rest = cases.arguments(case, generator)
    whole_rest = copies(tuple(rest))
    whole = kernel("gated_delta", mixed, a, b, *whole_rest)
    set_threads(3)
    for size in (1, 2, 64, 299):
        chunk_rest = copies(tuple(rest))
        parts = [
            kernel("gated_delta", *part, *chunk_rest)
            for part in zip(mixed.split(size), a.split(size), b.split(size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(chunk_rest[3], whole_rest[3])
        assert torch.equal(chunk_rest[4], whole_rest[4])


def test_a_batch_is_its_rows_alone_bit_for_bit(kernel: Kernel, generator: torch.Generator) -> None:
    arguments = cases.arguments(cases.GatedDeltaCase(3, 2, 4, 32, 40, slots=3, batched=True), generator)
    batch = copies(arguments)
    together = kernel("gated_delta", *batch)
    mixed, a, b, *weights, conv_state, recurrent_state, slot, key_heads = arguments
    for row in range(3):
        one = slice(row, row + 1)
        alone = kernel(
            "gated_delta",
            *(mixed[one], a[one], b[one]),
            *weights,
            *(conv_state, recurrent_state, slot[one].clone(), key_heads),
        )
        assert torch.equal(alone[0], together[row])
    assert torch.equal(conv_state, batch[6])
    assert torch.equal(recurrent_state, batch[7])


@pytest.mark.parametrize("bad_slot", [-1, 2])
def test_a_slot_that_does_not_exist_is_refused_and_nothing_written(
    kernel: Kernel, generator: torch.Generator, bad_slot: int
) -> None:
    arguments = cases.arguments(cases.GatedDeltaCase(2, 1, 2, 8, 8), generator)
    arguments[8][0] = bad_slot
    before = copies(arguments)
    for function in (kernel, lambda name, *a: getattr(torch.ops.qwen, name)(*a)):
        with pytest.raises(IndexError):
            function("gated_delta", *arguments)
        assert all(torch.equal(arguments[i], before[i]) for i in STATES)
