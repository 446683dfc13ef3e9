"""Sampling."""

from typing import Any

import pytest
import torch
from kernel_checks import Kernel
from qwen_runner.kernels.sample import cases, reference
from qwen_runner.kernels.sample.philox import philox, uniforms

# Random123's known answers for philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
DRAWS = 20_000


def _reference(name: str, *arguments: Any) -> Any:
    return getattr(torch.ops.qwen, name)(*arguments)


def _one(case: cases.SampleCase, logits: torch.Tensor, position: int = 5, seed: int = 0) -> tuple[Any, ...]:
    """Arguments for one session whose call is one token, and whose slot has seen nothing yet."""
    return cases.arguments(
        case,
        logits[None],
        torch.tensor([0]),
        torch.tensor([position]),
        torch.tensor([0]),
        torch.zeros(1, logits.shape[0], dtype=torch.uint8),
        torch.tensor([seed]),
        torch.tensor([0]),
    )


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(
    kernel: Kernel, counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    from qwen_runner import _kernels

    words = philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in words) == expected
    assert _kernels.philox(*counter, *key) == expected


def test_uniforms_are_never_0_or_1_and_differ_by_seed_and_position() -> None:
    ids = torch.arange(300_000)
    a, b, c = uniforms(ids, 1, 1), uniforms(ids, 2, 1), uniforms(ids, 1, 1 + 2**32)
    for u in (a, b, c):
        assert u.min() > 0
        assert u.max() < 1
        assert abs(u.mean() - 0.5) < 0.005
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("case", cases.CORRECTNESS, ids=str)
def test_kernel_draws_what_the_reference_draws(
    kernel: Kernel, generator: torch.Generator, case: cases.SampleCase
) -> None:
    for round_ in range(40):
        sessions = 1 if round_ % 2 else 3
        tokens = sessions if sessions > 1 else 1 + round_ % 4
        logits = torch.randn(sessions, case.vocabulary, generator=generator) * 3
        if round_ % 5 == 0:
            logits = logits.round()  # many ties
        arguments = cases.arguments(
            case,
            logits,
            torch.randint(case.vocabulary, (tokens,), generator=generator),
            torch.randint(1 << 40, (sessions,), generator=generator),
            torch.randperm(3, generator=generator)[:sessions],
            torch.randint(4, (3, case.vocabulary), generator=generator, dtype=torch.uint8),
            torch.randint(-(2**63), 2**63 - 1, (sessions,), generator=generator),
            torch.randint(1 << 40, (sessions,), generator=generator),
        )
        for_kernel = tuple(a.clone() for a in arguments)
        assert torch.equal(kernel("sample", *for_kernel), torch.ops.qwen.sample(*arguments))
        assert torch.equal(for_kernel[4], arguments[4])


@pytest.mark.parametrize(
    "case",
    [
        cases.SampleCase(40),
        cases.SampleCase(40, temperature=0.7, top_k=12),
        cases.SampleCase(40, temperature=1.3, top_p=0.8),
        cases.SampleCase(40, temperature=0.8, top_k=20, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_draws_follow_hugging_faces_filtered_softmax(
    kernel: Kernel, generator: torch.Generator, case: cases.SampleCase
) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    stats = pytest.importorskip("scipy.stats")
    logits = torch.randn(case.vocabulary, generator=generator) * 2
    scores = process.TemperatureLogitsWarper(case.temperature)(None, logits[None])
    if case.top_k:
        scores = process.TopKLogitsWarper(case.top_k)(None, scores)
    if case.top_p < 1:
        scores = process.TopPLogitsWarper(case.top_p)(None, scores)
    if case.min_p:
        scores = process.MinPLogitsWarper(case.min_p)(None, scores)
    probabilities = scores[0].double().softmax(dim=-1)

    arguments = _one(case, logits)
    counts = torch.zeros(case.vocabulary)
    for draw in range(DRAWS):
        arguments[2][0] = draw % 100
        arguments[11][0] = draw // 100
        counts[kernel("sample", *arguments)] += 1
    kept = probabilities > 0
    assert counts[~kept].sum() == 0
    likely = kept & (probabilities * DRAWS >= 5)
    observed = [*counts[likely].tolist(), counts[kept & ~likely].sum().item()]
    expected = [*(probabilities[likely] * DRAWS).tolist(), probabilities[kept & ~likely].sum().item() * DRAWS]
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    scale = sum(observed) / sum(expected)
    assert stats.chisquare(observed, [e * scale for e in expected]).pvalue > 1e-3


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_filters_keep_hugging_faces_tokens(generator: torch.Generator, p: float) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    for _ in range(20):
        logits = torch.randn(500, generator=generator) * 4
        expected = process.TopKLogitsWarper(100)(None, logits[None])
        expected = process.TopPLogitsWarper(p)(None, expected)
        expected = process.MinPLogitsWarper(0.02)(None, expected)[0]
        assert torch.equal(reference.filter_logits(logits, 100, p, 0.02) > -torch.inf, expected > -torch.inf)


@pytest.mark.parametrize("side", ["kernel", "reference"])
def test_penalties(kernel: Kernel, side: str) -> None:
    sample = kernel if side == "kernel" else _reference
    case = cases.SampleCase(4, temperature=0.0, presence_penalty=1.5, repetition_penalty=2.0)
    seen = torch.zeros(2, 4, dtype=torch.uint8)

    def greedy(logits: list[float], token: int, position: int) -> int:
        arguments = cases.arguments(
            case,
            torch.tensor([logits]),
            torch.tensor([token]),
            torch.tensor([position]),
            torch.tensor([1]),
            seen,
            torch.tensor([0]),
            torch.tensor([10]),
        )
        return int(sample("sample", *arguments))

    # Token 0 is in the prompt: 3 / 2 loses to 1.6.
    assert greedy([3.0, 1.6, 0.0, 0.0], token=0, position=9) == 1
    assert seen.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
    # Token 1 was generated: 4 / 2 - 1.5 = 0.5 loses to 0.6; a negative logit doubles.
    assert greedy([-0.1, 4.0, 0.6, 0.0], token=1, position=10) == 2
    assert seen[1].tolist() == [1, 2, 0, 0]
    assert greedy([-1.0, -1.0, -1.9, -1.8], token=1, position=11) == 3
    assert greedy([0.0, 0.0, 0.0, 0.0], token=0, position=12) == 2
    assert seen[1].tolist() == [3, 2, 0, 0]


@pytest.mark.parametrize("side", ["kernel", "reference"])
def test_a_prefill_marks_prompt_and_generated_tokens_by_position(kernel: Kernel, side: str) -> None:
    sample = kernel if side == "kernel" else _reference
    seen = torch.zeros(1, 6, dtype=torch.uint8)
    arguments = cases.arguments(
        cases.SampleCase(6),
        torch.zeros(1, 6),
        torch.tensor([1, 2, 1, 4]),
        torch.tensor([7]),
        torch.tensor([0]),
        seen,
        torch.tensor([0]),
        torch.tensor([9]),
    )
    sample("sample", *arguments)
    assert seen.tolist() == [[0, 3, 1, 0, 2, 0]]


@pytest.mark.parametrize("side", ["kernel", "reference"])
def test_the_draw_is_keyed_by_the_last_input_position(
    kernel: Kernel, side: str, generator: torch.Generator
) -> None:
    sample = kernel if side == "kernel" else _reference
    logits = torch.randn(1000, generator=generator)
    for last in range(20, 30):
        one = _one(cases.SampleCase(1000), logits, position=last, seed=3)
        many = list(_one(cases.SampleCase(1000), logits, position=last - 4, seed=3))
        many[1] = torch.zeros(5, dtype=torch.int64)
        assert sample("sample", *one) == sample("sample", *many)


@pytest.mark.parametrize("side", ["kernel", "reference"])
def test_greedy_takes_the_lowest_of_equals_and_no_nan(kernel: Kernel, side: str) -> None:
    sample = kernel if side == "kernel" else _reference
    case = cases.SampleCase(5, temperature=0.0)
    for logits, expected in (
        ([1.0, 3.0, 3.0, 2.0, 3.0], 1),
        ([torch.nan, 1.0, torch.nan, 2.0, 0.0], 3),
        ([torch.nan] * 5, 0),
        ([-torch.inf] * 5, 0),
        ([0.0, torch.inf, 5.0, torch.inf, 0.0], 1),
    ):
        for temperature in (0.0, 1.0) if not all(map(torch.isfinite, torch.tensor(logits))) else (0.0,):
            case = cases.SampleCase(5, temperature=temperature, top_p=0.01)
            assert int(sample("sample", *_one(case, torch.tensor(logits)))) == expected


@pytest.mark.parametrize("side", ["kernel", "reference"])
@pytest.mark.parametrize(("argument", "value"), [(1, -1), (1, 5), (2, -1), (3, -1), (3, 1)])
def test_what_does_not_exist_is_refused_and_nothing_marked(
    kernel: Kernel, side: str, argument: int, value: int
) -> None:
    sample = kernel if side == "kernel" else _reference
    arguments = _one(cases.SampleCase(5), torch.zeros(5))
    arguments[argument][0] = value
    with pytest.raises(IndexError):
        sample("sample", *arguments)
    assert not arguments[4].any()
