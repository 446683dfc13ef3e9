"""The CUDA sampler against the reference: the same tokens, the same marks."""

import pytest
import torch
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.sample import cases, cuda_cases

Arguments = tuple[torch.Tensor, ...]


def _run(gpu: Gpu, arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """(next_token, seen) after a call, and after another like it."""
    (sessions, vocabulary), tokens = arguments[0].shape, len(arguments[1])
    results = []
    counters = gpu.counters()
    for _ in range(2):
        on_device = [gpu.tensor(a) for a in arguments]
        next_token = gpu.poisoned(sessions, dtype=torch.int64)
        scratch = gpu.scratch(gpu.module.sample_scratch(vocabulary, sessions))
        gpu.module.sample(
            *map(gpu.ptr, on_device),
            gpu.ptr(next_token),
            sessions,
            tokens,
            vocabulary,
            gpu.ptr(scratch),
            gpu.ptr(counters),
            gpu.stream(),
        )
        gpu.synchronize()
        assert not counters.any()
        results.append((next_token.cpu(), on_device[4].cpu()))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    return results[0]


def _check(gpu: Gpu, arguments: Arguments) -> None:
    expected_seen = arguments[4].clone()
    expected = torch.ops.qwen.sample(*arguments[:4], expected_seen, *arguments[5:])
    actual, seen = _run(gpu, arguments)
    assert torch.equal(actual, expected)
    assert torch.equal(seen, expected_seen)


def _arguments(
    case: cases.SampleCase, logits: torch.Tensor, tokens: int, generator: torch.Generator
) -> Arguments:
    """Of random sessions with these logits [B, V]."""
    sessions = len(logits)
    slots = sessions + 2
    return cases.arguments(
        case,
        logits,
        torch.randint(case.vocabulary, (tokens,), generator=generator),
        torch.randint(1 << 40, (sessions,), generator=generator),
        torch.randperm(slots, generator=generator)[:sessions],
        torch.randint(4, (slots, case.vocabulary), generator=generator, dtype=torch.uint8),
        torch.randint(-(2**63), 2**63 - 1, (sessions,), generator=generator),
        torch.randint(1 << 40, (sessions,), generator=generator),
    )


def _one(case: cases.SampleCase, logits: list[float]) -> Arguments:
    """One session whose call is token 0 and whose slot has seen nothing."""
    token, position, slot, seed, generated_from = torch.zeros(5, 1, dtype=torch.int64)
    seen = torch.zeros(1, case.vocabulary, dtype=torch.uint8)
    return cases.arguments(case, torch.tensor([logits]), token, position, slot, seen, seed, generated_from)


@pytest.mark.parametrize("case", cases.CORRECTNESS + cuda_cases.CORRECTNESS + cuda_cases.EXACT_CUT, ids=str)
def test_cuda_sample_draws_what_the_reference_draws(
    gpu: Gpu, generator: torch.Generator, case: cases.SampleCase
) -> None:
    for round_ in range(12 if gpu.emulated else 60):
        sessions = (1, 3)[round_ % 2]
        tokens = sessions if sessions > 1 else (1, 2, 700)[round_ % 3]
        logits = torch.randn(sessions, case.vocabulary, generator=generator) * 3
        if round_ % 3 == 0:
            logits = logits.bfloat16().float() if round_ % 2 else logits.round()  # few or many ties
        _check(gpu, _arguments(case, logits, tokens, generator))


@pytest.mark.parametrize("case", cuda_cases.CROWDED, ids=str)
@pytest.mark.parametrize("values", [1, 3, 6000])
def test_cuda_sample_cuts_exactly_in_a_crowd(
    gpu: Gpu, generator: torch.Generator, case: cases.SampleCase, values: int
) -> None:
    for spread in (1e-3, 1.0):
        logits = torch.randint(values, (2, case.vocabulary), generator=generator) / values * spread
        _check(gpu, _arguments(case, logits, 2, generator))


@pytest.mark.parametrize("case", cuda_cases.BENCHMARK, ids=str)
def test_cuda_sample_of_the_full_vocabulary(
    gpu: Gpu, generator: torch.Generator, case: cases.SampleCase
) -> None:
    logits = (torch.randn(1, case.vocabulary, generator=generator) * 3).bfloat16().float()
    _check(gpu, _arguments(case, logits, 1, generator))


def test_cuda_sample_of_a_session_depends_on_no_other(gpu: Gpu, generator: torch.Generator) -> None:
    options = [cases.SampleCase(3000, 0.0), cases.SampleCase(3000, 0.9), cases.SampleCase(3000, 0.8, 30, 0.9)]
    logits = torch.randn(8, 3000, generator=generator)
    mixed = list(_arguments(options[0], logits, 8, generator))
    for i in range(8):
        for argument, value in zip(
            mixed[5:], _arguments(options[i % 3], logits[:1], 1, generator)[5:11], strict=False
        ):
            argument[i] = value[0]
    together, seen = _run(gpu, tuple(mixed))
    for i in range(8):
        alone = tuple(a if n == 4 else a[i : i + 1].clone() for n, a in enumerate(mixed))
        token, marks = _run(gpu, alone)
        assert token[0] == together[i]
        assert torch.equal(marks[mixed[3][i]], seen[mixed[3][i]])


def test_cuda_sample_takes_the_lowest_of_equals_and_no_nan(gpu: Gpu) -> None:
    nan, inf = torch.nan, torch.inf
    greedy, narrow, free = (0.0, 1.0), (1.0, 0.01), (1.0, 1.0)  # (temperature, top_p)
    for logits, expected, options in (
        ([1.0, 3.0, 3.0, 2.0, 3.0], 1, [greedy]),
        ([-0.0, 0.0, -1.0, 0.0, -2.0], 0, [greedy]),
        ([-1.0, -0.0, 0.0, 0.0, -2.0], 1, [greedy]),
        ([nan, 1.0, nan, 2.0, 0.0], 3, [greedy, narrow]),
        ([nan] * 5, 0, [greedy, narrow, free]),
        ([-inf] * 5, 0, [greedy, narrow, free]),
        ([0.0, inf, 5.0, inf, 0.0], 1, [greedy, narrow, free]),
        ([0.0] * 5000 + [inf] + [1.0] * 1000 + [inf], 5000, [greedy, narrow, free]),
    ):
        for temperature, top_p in options:
            arguments = _one(cases.SampleCase(len(logits), temperature=temperature, top_p=top_p), logits)
            assert int(_run(gpu, arguments)[0]) == expected
            assert int(torch.ops.qwen.sample(*arguments)) == expected


def test_cuda_sample_marks_no_token_that_does_not_exist(gpu: Gpu) -> None:
    for token in (-1, 5, -(2**40), 2**40):
        arguments = _one(cases.SampleCase(5, temperature=0.0), [0.0, 0.0, 1.0, 0.0, 0.0])
        arguments[1][0] = token
        arguments = (*arguments[:4], torch.zeros(3, 5, dtype=torch.uint8), *arguments[5:])
        arguments[3][0] = 1
        next_token, seen = _run(gpu, arguments)
        assert next_token.tolist() == [2]
        assert not seen.any()


def test_cuda_sample_marks_neighbours(gpu: Gpu) -> None:
    """Tokens that share words, of slots whose rows do, before and after the first that was generated."""
    case = cases.SampleCase(4099, temperature=0.0, presence_penalty=1.5, repetition_penalty=1.3)
    tokens = torch.tensor([0, 1, 2, 3, 1, 2046, 2047, 2048, 2049, 4097, 4098, 1, 4098, 2047])
    for slot in range(3):
        position, slots, seed, generated_from = torch.tensor([[7], [slot], [0], [7 + 5]])
        seen = torch.zeros(3, case.vocabulary, dtype=torch.uint8)
        logits = torch.full((1, case.vocabulary), -3.0)
        _check(gpu, cases.arguments(case, logits, tokens, position, slots, seen, seed, generated_from))


def test_cuda_sample_refuses_sizes_that_do_not_fit(gpu: Gpu, generator: torch.Generator) -> None:
    with pytest.raises(RuntimeError):
        _run(gpu, _arguments(cases.SampleCase(5), torch.zeros(2, 5), 3, generator))
