"""Rotary embedding and attention."""

from collections.abc import Callable

import pytest
import torch
from kernel_checks import Kernel, assert_close, assert_kernel_matches, copies
from qwen_runner.kernels.attention import cases, reference, rotary

CACHES = (3, 4)


def _modeling() -> object:
    return pytest.importorskip("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_rotary_is_hugging_faces(generator: torch.Generator, dtype: torch.dtype) -> None:
    modeling = _modeling()
    configuration = pytest.importorskip("transformers.models.qwen3_5_moe.configuration_qwen3_5_moe")
    config = configuration.Qwen3_5MoeTextConfig(
        head_dim=64,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
        },
    )
    x = torch.randn(9, 5, 64, generator=generator).to(dtype)
    positions = torch.tensor([0, 1, 2, 3, 100, 101, 4095, 32767, 262143])
    cosine, sine = modeling.Qwen3_5MoeTextRotaryEmbedding(config)(x, positions[None, None])
    expected, _ = modeling.apply_rotary_pos_emb(
        x.transpose(0, 1)[None], x.transpose(0, 1)[None], cosine, sine
    )
    assert torch.equal(rotary(x, positions, 16, 1e7), expected[0].transpose(0, 1))


@torch.no_grad()
def test_reference_matches_hugging_face(generator: torch.Generator) -> None:
    case = cases.AttentionCase(63, 37, 6, 2, 40, 100)
    q, k, v, key_cache, value_cache, position, slot = cases.arguments(case, generator)
    actual = reference.attention(q, k, v, key_cache, value_cache, position, slot)

    class Module:
        num_key_value_groups = 3
        training = False

    keys, values = key_cache[slot, :, :100], value_cache[slot, :, :100]
    mask = torch.full((63, 100), -torch.inf).triu(diagonal=38)
    expected, _ = _modeling().eager_attention_forward(
        Module(), q.transpose(0, 1)[None], keys, values, mask, scaling=40**-0.5
    )
    assert_close(actual, expected[0], torch.float32)


@pytest.mark.parametrize("case", cases.CORRECTNESS, ids=str)
def test_kernel_matches_reference(
    kernel: Kernel, generator: torch.Generator, case: cases.AttentionCase
) -> None:
    assert_kernel_matches(kernel, "attention", cases.arguments(case, generator), case.dtype, CACHES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_past_the_position_or_in_other_slots_is_read(
    kernel: Kernel, generator: torch.Generator, dtype: torch.dtype
) -> None:
    arguments = cases.arguments(cases.AttentionCase(5, 17, 4, 2, 32, 64, 3, dtype), generator)
    clean = kernel("attention", *copies(arguments))
    for i in CACHES:
        arguments[i][:2] = torch.nan
        arguments[i][2, :, 17:] = torch.nan
    before = [arguments[i].clone() for i in CACHES]
    assert torch.equal(kernel("attention", *arguments), clean)
    for i, old in zip(CACHES, before, strict=True):
        old[2, :, 17:22] = arguments[i - 2].transpose(0, 1)
        assert torch.equal(arguments[i].nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_in_chunks_and_token_by_token_agree_bit_for_bit(
    kernel: Kernel, set_threads: Callable[[int], None], generator: torch.Generator, dtype: torch.dtype
) -> None:
    case = cases.AttentionCase(70, 3, 10, 2, 48, 80, 2, dtype)
    q, k, v, *caches, position, slot = cases.arguments(case, generator)
    whole_caches = [c.clone() for c in caches]
    whole = kernel("attention", q, k, v, *whole_caches, position, slot)
    set_threads(3)
    for size in (1, 16, 69):
        chunk_caches = [c.clone() for c in caches]
        parts, start = [], position.clone()
        for part in zip(q.split(size), k.split(size), v.split(size), strict=True):
            parts.append(kernel("attention", *part, *chunk_caches, start, slot))
            start += part[0].shape[0]
        assert torch.equal(torch.cat(parts), whole)
        assert all(torch.equal(a, b) for a, b in zip(chunk_caches, whole_caches, strict=True))


def test_a_batch_is_its_rows_alone_bit_for_bit(kernel: Kernel, generator: torch.Generator) -> None:
    arguments = cases.arguments(cases.AttentionCase(4, 20, 4, 2, 32, 64, 4, batched=True), generator)
    batch = copies(arguments)
    together = kernel("attention", *batch)
    q, k, v, *caches, position, slot = arguments
    for row in range(4):
        one = slice(row, row + 1)
        alone = kernel("attention", q[one], k[one], v[one], *caches, position[one].clone(), slot[one].clone())
        assert torch.equal(alone[0], together[row])
    assert all(torch.equal(caches[i], batch[3 + i]) for i in range(2))


@pytest.mark.parametrize(
    ("position", "slot"),
    [([-1], [0]), ([62], [0]), ([0], [2]), ([0], [-1]), ([0, 0, 64], [0, 1, 0]), ([0, 0], [0, 1])],
)
def test_what_does_not_exist_is_refused_and_nothing_written(
    kernel: Kernel, generator: torch.Generator, position: list[int], slot: list[int]
) -> None:
    arguments = (*cases.arguments(cases.AttentionCase(3, 0, 2, 2, 8, 64), generator)[:5],)
    before = copies(arguments)
    for function in (kernel, lambda name, *a: getattr(torch.ops.qwen, name)(*a)):
        with pytest.raises((IndexError, ValueError)):
            function("attention", *arguments, torch.tensor(position), torch.tensor(slot))
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
