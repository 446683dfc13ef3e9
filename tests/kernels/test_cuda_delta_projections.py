"""delta_input_decode and delta_output_decode on CUDA."""

from dataclasses import dataclass

import pytest
import torch
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.gated_delta import cuda_cases_projections as cases
from qwen_runner.kernels.gated_delta import reference
from qwen_runner.kernels.linear import cuda_cases_decode as linear
from qwen_runner.kernels.linear.reference import float_linear
from qwen_runner.kernels.norm import reference as norm
from qwen_runner.kernels.tolerance import relative_error

EPS = 1e-6
# Outputs are rounded to bfloat16, and so is the normed x: each alone is 0.1 to 0.2 %; the references of z and
# mixed are too.
TOLERANCE = 6e-3
BF16, F32 = torch.bfloat16, torch.float32


def _cases(gpu: Gpu) -> list[cases.ProjectionCase]:
    return cases.SMALL + ([] if gpu.emulated else cases.FULL)


def _shape(gpu: Gpu, case: cases.ProjectionCase) -> object:
    return gpu.module.DeltaShape(case.key_heads, case.value_heads, case.key_dim, case.value_dim, case.taps)


@dataclass
class InputResult:
    mixed: torch.Tensor
    z: torch.Tensor
    gates: torch.Tensor
    conv_state: torch.Tensor


class InputArguments:
    def __init__(self, case: cases.ProjectionCase, generator: torch.Generator) -> None:
        self.case = case
        self.x = linear.rows_of(case.rows, case.hidden, generator=generator)
        self.weight = linear.norm_weight(case.hidden, generator)
        shape = (case.channels + case.value_size, case.hidden)
        self.qkvz = linear.int4_weights(*shape, group=case.group, generator=generator)
        ab = torch.randn(2 * case.value_heads, case.hidden, generator=generator) * case.hidden**-0.5
        self.ab = ab.bfloat16()
        self.conv_weight = torch.randn(case.channels, case.taps, generator=generator).bfloat16()
        self.conv_state = linear.rows_of(case.rows + 2, case.channels, case.taps - 1, generator=generator)
        self.slot = torch.randperm(case.rows + 2, generator=generator)[: case.rows]

    def expected(self) -> InputResult:
        case = self.case
        x = norm.rms_norm(self.x.float(), self.weight, EPS)
        qkvz = (x.float() @ self.qkvz.dense.T).bfloat16()
        conv_state = self.conv_state.clone()
        mixed = [
            reference._convolve(qkvz[row : row + 1, : case.channels], self.conv_weight, conv_state[slot])
            for row, slot in enumerate(self.slot.tolist())
        ]
        gates = float_linear(x, self.ab.float()).float()
        return InputResult(torch.cat(mixed), qkvz[:, case.channels :], gates, conv_state)

    def run(self, gpu: Gpu, rows: slice = slice(None)) -> InputResult:
        case, m, p = self.case, gpu.module, gpu.ptr
        x, weight, ab = gpu.tensor(self.x[rows]), gpu.tensor(self.weight), gpu.tensor(self.ab)
        tiles, scales = gpu.tensor(self.qkvz.tiles), gpu.tensor(self.qkvz.scales)
        conv_weight, conv_state = gpu.tensor(self.conv_weight), gpu.tensor(self.conv_state)
        slot = gpu.tensor(self.slot[rows])
        mixed = gpu.poisoned(len(x), case.channels, dtype=F32)
        z = gpu.poisoned(len(x), case.value_size, dtype=BF16)
        gates = gpu.poisoned(len(x), 2 * case.value_heads, dtype=F32)
        n = case.channels + case.value_size
        m.delta_input_decode(
            p(x),
            m.RmsNorm(p(weight), EPS),
            m.Int4Matrix(p(tiles), p(scales), n, case.hidden, case.group),
            p(ab),
            p(conv_weight),
            p(conv_state),
            p(slot),
            p(mixed),
            p(z),
            p(gates),
            _shape(gpu, case),
            len(x),
            gpu.stream(),
        )
        gpu.synchronize()
        return InputResult(mixed.cpu(), z.cpu(), gates.cpu(), conv_state.cpu())


def test_the_input_projection_matches_the_reference(gpu: Gpu, generator: torch.Generator) -> None:
    for case in _cases(gpu):
        arguments = InputArguments(case, generator)
        expected, actual, again = arguments.expected(), arguments.run(gpu), arguments.run(gpu)
        for name, value in vars(actual).items():
            assert relative_error(value, getattr(expected, name)) < TOLERANCE, (case, name)
            assert torch.equal(value, getattr(again, name)), (case, name)
        others = [s for s in range(case.rows + 2) if s not in arguments.slot.tolist()]
        assert torch.equal(actual.conv_state[others], arguments.conv_state[others])
        assert torch.equal(actual.gates, actual.gates.bfloat16().float())


def test_a_row_of_the_input_projection_does_not_depend_on_the_others(
    gpu: Gpu, generator: torch.Generator
) -> None:
    arguments = InputArguments(cases.ProjectionCase(8, 192, 2, 4, 16, 16, 4, 32), generator)
    whole = arguments.run(gpu)
    for first, last in ((0, 1), (2, 7)):
        part = arguments.run(gpu, slice(first, last))
        for name in ("mixed", "z", "gates"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[first:last])
        slots = arguments.slot[first:last]
        assert torch.equal(part.conv_state[slots], whole.conv_state[slots])


class OutputArguments:
    def __init__(self, case: cases.ProjectionCase, generator: torch.Generator) -> None:
        self.case = case
        self.core = torch.randn(case.rows, case.value_size, generator=generator)
        self.z = linear.rows_of(case.rows, case.value_size, generator=generator)
        self.weight = (torch.randn(case.value_dim, generator=generator) * 0.3 + 1).bfloat16()
        shape = (case.hidden, case.value_size)
        self.out = linear.int4_weights(*shape, group=case.group, generator=generator)
        self.residual = linear.rows_of(case.rows, case.hidden, generator=generator)

    def expected(self) -> torch.Tensor:
        heads = (self.case.value_heads, self.case.value_dim)
        core, z = self.core.bfloat16().unflatten(1, heads), self.z.unflatten(1, heads)
        mixed = norm.gated_rms_norm(core, z, self.weight, EPS).flatten(1)
        return mixed.float() @ self.out.dense.T + self.residual.float()

    def run(self, gpu: Gpu, rows: slice = slice(None)) -> torch.Tensor:
        case, m, p = self.case, gpu.module, gpu.ptr
        core, z, weight = gpu.tensor(self.core[rows]), gpu.tensor(self.z[rows]), gpu.tensor(self.weight)
        tiles, scales = gpu.tensor(self.out.tiles), gpu.tensor(self.out.scales)
        y = gpu.tensor(self.residual[rows])  # in place
        matrix = m.Int4Matrix(p(tiles), p(scales), case.hidden, case.value_size, case.group)
        shape = _shape(gpu, case)
        m.delta_output_decode(
            p(core), p(z), p(weight), EPS, matrix, p(y), p(y), shape, len(core), gpu.stream()
        )
        gpu.synchronize()
        return y.cpu()


def test_the_output_projection_matches_the_reference(gpu: Gpu, generator: torch.Generator) -> None:
    for case in _cases(gpu):
        arguments = OutputArguments(case, generator)
        y = arguments.run(gpu)
        assert relative_error(y, arguments.expected()) < TOLERANCE, case
        assert torch.equal(arguments.run(gpu), y), case


def test_a_row_of_the_output_projection_does_not_depend_on_the_others(
    gpu: Gpu, generator: torch.Generator
) -> None:
    arguments = OutputArguments(cases.ProjectionCase(8, 192, 2, 4, 16, 16, 4, 32), generator)
    whole = arguments.run(gpu)
    for first, last in ((0, 1), (2, 7)):
        assert torch.equal(arguments.run(gpu, slice(first, last)), whole[first:last])


@pytest.mark.parametrize("taps", [1, 5])
def test_other_filters_are_refused(gpu: Gpu, generator: torch.Generator, taps: int) -> None:
    with pytest.raises(RuntimeError, match="InvalidValue"):
        InputArguments(cases.ProjectionCase(1, 64, 2, 2, 16, 16, taps, 32), generator).run(gpu)
