"""The CUDA gated delta rule against the reference in float32: results, states, what may not change."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from qwen_runner.kernels.gated_delta import cuda_cases as cases
from qwen_runner.kernels.gated_delta import reference
from torch.nn import functional

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # core, conv_state, recurrent_state

BOUND = 1e-2  # of bfloat16 factors
EXACT_BOUND = 1e-5  # of float32


def _native(gpu: Any, heads: cases.Heads) -> Any:
    return gpu.module.DeltaShape(
        heads.key_heads, heads.value_heads, heads.key_dim, heads.value_dim, heads.taps
    )


def _prefill(gpu: Any, heads: cases.Heads, given: cases.Inputs) -> Result:
    """Keeps `given`."""
    shape, tokens = _native(gpu, heads), len(given.qkvz)
    given = replace(given, conv_state=given.conv_state.clone(), recurrent_state=given.recurrent_state.clone())
    core = gpu.poisoned(tokens, heads.value_size, dtype=torch.float32)
    scratch = gpu.scratch(gpu.module.delta_prefill_scratch(shape, tokens))
    pointers = [gpu.ptr(tensor) for tensor in vars(given).values()]
    gpu.module.delta_prefill(*pointers, gpu.ptr(core), gpu.ptr(scratch), shape, tokens, gpu.stream())
    gpu.synchronize()
    return core, given.conv_state, given.recurrent_state


def _step(
    gpu: Any,
    heads: cases.Heads,
    mixed: torch.Tensor,
    given: cases.Inputs,
    state: torch.Tensor,
    slot: torch.Tensor,
) -> torch.Tensor:
    """core [B, Z] of rows of `mixed` with given.gates; advances `state`."""
    rows = len(mixed)
    core = gpu.poisoned(rows, heads.value_size, dtype=torch.float32)
    tensors = (mixed, given.gates, given.a_log, given.dt_bias, state, slot, core)
    gpu.module.delta_step_decode(*map(gpu.ptr, tensors), _native(gpu, heads), rows, gpu.stream())
    gpu.synchronize()
    return core


def _difference(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual - wanted).norm() / wanted.norm()).item()


def _check_prefill(gpu: Any, heads: cases.Heads, given: cases.Inputs, bound: float) -> None:
    actual = _prefill(gpu, heads, given)
    core, conv_state, recurrent_state = cases.expected(heads, given)
    slot = int(given.slot)
    assert _difference(actual[0], core) < bound
    assert _difference(actual[2][slot], recurrent_state[slot]) < bound
    assert torch.equal(actual[1], conv_state)
    others = torch.arange(len(recurrent_state), device=gpu.device) != slot
    assert torch.equal(actual[2][others], given.recurrent_state[others])
    for first, second in zip(actual, _prefill(gpu, heads, given), strict=True):
        assert torch.equal(first, second)


def _of_rows(given: cases.Inputs, begin: int, end: int) -> cases.Inputs:
    return replace(given, qkvz=given.qkvz[begin:end].clone(), gates=given.gates[begin:end].clone())


def _convolved(heads: cases.Heads, given: cases.Inputs) -> torch.Tensor:
    """silu of the convolution, f32 [T, C]."""
    before = given.conv_state[int(given.slot)].float()
    history = torch.cat((before, given.qkvz[:, : heads.channels].float().T), dim=1)
    mixed = functional.conv1d(history[None], given.conv_weight.float()[:, None], groups=heads.channels)
    return functional.silu(mixed[0].T).contiguous()


@pytest.mark.parametrize("tokens", cases.TOKENS)
@pytest.mark.parametrize("heads", cases.CHUNKED, ids=str)
def test_cuda_delta_prefill(gpu: Any, generator: torch.Generator, heads: cases.Heads, tokens: int) -> None:
    _check_prefill(gpu, heads, cases.inputs(heads, tokens, generator, gpu.device), BOUND)


@pytest.mark.parametrize("tokens", [1, 2, 3, 65])
@pytest.mark.parametrize("heads", cases.RECURRENT, ids=str)
def test_cuda_delta_prefill_of_small_heads(
    gpu: Any, generator: torch.Generator, heads: cases.Heads, tokens: int
) -> None:
    _check_prefill(gpu, heads, cases.inputs(heads, tokens, generator, gpu.device), EXACT_BOUND)


@pytest.mark.parametrize("nature", cases.NATURES, ids=str)
def test_cuda_delta_prefill_of_extreme_inputs(
    gpu: Any, generator: torch.Generator, nature: cases.Nature
) -> None:
    for heads in cases.CHUNKED[:2]:
        given = cases.inputs(heads, 200, generator, gpu.device, nature)
        _check_prefill(gpu, heads, given, BOUND)


@pytest.mark.parametrize("tokens", cases.LONG_TOKENS)
def test_cuda_delta_prefill_at_full_shape(gpu: Any, generator: torch.Generator, tokens: int) -> None:
    if gpu.emulated:
        pytest.skip("too slow without a GPU")
    for nature in cases.NATURES:
        given = cases.inputs(cases.FULL, tokens, generator, gpu.device, nature, slots=2)
        _check_prefill(gpu, cases.FULL, given, BOUND)


@pytest.mark.parametrize("heads", [cases.CHUNKED[1], cases.RECURRENT[0]], ids=str)
def test_cuda_delta_prefill_whole_in_chunks_and_token_by_token(
    gpu: Any, generator: torch.Generator, heads: cases.Heads
) -> None:
    given = cases.inputs(heads, 130, generator, gpu.device)
    slot = int(given.slot)
    whole, conv_state, recurrent_state = _prefill(gpu, heads, given)
    for sizes in ([64, 66], [1, 2, 3, 60, 64], [65, 65], [127, 2, 1]):
        states, begin, cores = given, 0, []
        for size in sizes:
            core, *after = _prefill(gpu, heads, _of_rows(states, begin, begin + size))
            states = replace(states, conv_state=after[0], recurrent_state=after[1])
            cores.append(core)
            begin += size
        assert torch.equal(states.conv_state, conv_state)
        assert _difference(torch.cat(cores), whole) < BOUND
        assert _difference(states.recurrent_state[slot], recurrent_state[slot]) < BOUND

    mixed, state = _convolved(heads, given), given.recurrent_state.clone()
    cores = [
        _step(gpu, heads, mixed[t : t + 1].clone(), _of_rows(given, t, t + 1), state, given.slot)
        for t in range(len(mixed))
    ]
    assert _difference(torch.cat(cores), whole) < BOUND
    assert _difference(state[slot], recurrent_state[slot]) < BOUND


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("heads", [*cases.RECURRENT, *cases.CHUNKED, cases.FULL], ids=str)
def test_cuda_delta_step(gpu: Any, generator: torch.Generator, heads: cases.Heads, rows: int) -> None:
    if gpu.emulated and heads == cases.FULL and rows > 1:
        pytest.skip("too slow without a GPU")
    given = cases.inputs(heads, rows, generator, gpu.device, slots=rows + 1)
    slot = torch.randperm(rows + 1, generator=generator)[:rows].to(gpu.device)
    x = given.qkvz[:, : heads.channels].float()
    wanted_state, no_state = given.recurrent_state.clone(), x.new_empty(rows + 1, heads.channels, 0)
    wanted = reference.gated_delta(
        x,
        *given.gates.chunk(2, dim=1),
        x.new_ones(heads.channels, 1),  # one tap: no convolution, silu alone
        given.a_log,
        given.dt_bias,
        no_state,
        wanted_state,
        slot,
        heads.key_heads,
    )
    mixed, state = functional.silu(x).contiguous(), given.recurrent_state.clone()
    core = _step(gpu, heads, mixed, given, state, slot)
    assert _difference(core, wanted) < EXACT_BOUND
    assert _difference(state, wanted_state) < EXACT_BOUND
    untouched = [s for s in range(rows + 1) if s not in slot.tolist()]
    assert torch.equal(state[untouched], given.recurrent_state[untouched])

    # A row depends on no other row, nor on how many there are.
    last = given.recurrent_state.clone()
    alone = _step(gpu, heads, mixed[-1:].clone(), _of_rows(given, rows - 1, rows), last, slot[-1:].clone())
    assert torch.equal(alone, core[-1:])
    assert torch.equal(last[slot[-1]], state[slot[-1]])
