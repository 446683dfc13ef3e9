"""delta_prefill against flash-linear-attention's chunk_gated_delta_rule, on what the model gives both.

An independent implementation: it shares neither the kernel's formulas nor the oracle's. It takes bfloat16, so
its own error, measured against the oracle, widens the bound. Compiling its kernels takes a minute.
"""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from delta_oracle import gated_delta, prepare
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.gated_delta import cuda_cases as cases

BOUND = 1e-2


@pytest.fixture(scope="module")
def chunk_gated_delta_rule() -> Iterator[Any]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    reason = "flash-linear-attention is not installed"
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "fla")  # which the tests' conftest.py hides from transformers
        yield pytest.importorskip(
            "fla.ops.gated_delta_rule", reason=reason, exc_type=ImportError
        ).chunk_gated_delta_rule


@pytest.fixture(scope="module")
def cuda() -> Gpu:
    try:
        return Gpu(emulated=False)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error} (QWEN_BUILD_TESTS, CUDA)")
    except RuntimeError as error:
        pytest.skip(str(error))


def _difference(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 500, 1642])
def test_cuda_delta_prefill_agrees_with_fla(
    cuda: Gpu, chunk_gated_delta_rule: Any, generator: torch.Generator, tokens: int
) -> None:
    heads, module = cases.FULL, cuda.module
    given = cases.inputs(heads, tokens, generator, cuda.device, slots=2)
    slot = int(given.slot)
    initial = given.recurrent_state[slot].clone()
    prepared = prepare(heads, given)
    exact = gated_delta(prepared, initial)

    q, k, v = (x.to(torch.bfloat16)[None].contiguous() for x in prepared[:3])
    decay, beta = (x.float()[None].contiguous() for x in prepared[3:])
    with torch.no_grad():
        theirs = chunk_gated_delta_rule(
            q, k, v, decay, beta, initial_state=initial[None], output_final_state=True
        )
    theirs = theirs[0][0].flatten(1), theirs[1][0]

    shape = module.DeltaShape(
        heads.key_heads, heads.value_heads, heads.key_dim, heads.value_dim, heads.taps
    )  # fmt: skip
    core = cuda.poisoned(tokens, heads.value_size, dtype=torch.float32)
    scratch = cuda.scratch(module.delta_prefill_scratch(shape, tokens))
    pointers = [cuda.ptr(tensor) for tensor in (*vars(given).values(), core, scratch)]
    module.delta_prefill(*pointers, shape, tokens, cuda.stream())
    cuda.synchronize()

    for name, ours, other, wanted in zip(
        ("core", "state"), (core, given.recurrent_state[slot]), theirs, exact, strict=True
    ):
        own, error, apart = _difference(other, wanted), _difference(ours, wanted), _difference(ours, other)
        print(f"\n{name} of {tokens}: ours {error:.2e}, fla {own:.2e}, apart {apart:.2e}", end="")
        assert own < 2 * BOUND, f"{name}: fla and the oracle do not agree: {own:.2e}"
        assert error < BOUND, f"{name}: {error:.2e} from the oracle"
        assert apart < BOUND + own, f"{name}: {apart:.2e} from fla"
