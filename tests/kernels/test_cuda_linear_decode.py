"""int4_linear_decode and int4_head on CUDA."""

import pytest
import torch
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.linear import cuda_cases_decode as cases
from qwen_runner.kernels.norm import reference as norm
from qwen_runner.kernels.tolerance import relative_error

EPS = 1e-6
# Outputs are rounded to bfloat16, and so is the normed x: each alone is 0.1 to 0.2 %.
TOLERANCE = 6e-3
BF16 = torch.bfloat16


class Arguments:
    def __init__(self, case: cases.DecodeCase, generator: torch.Generator) -> None:
        self.case = case
        self.x = cases.rows_of(case.rows, case.k, generator=generator)
        self.weight = cases.norm_weight(case.k, generator) if case.norm else None
        self.w = cases.int4_weights(case.n, case.k, group=case.group, generator=generator)
        self.residual = cases.rows_of(case.rows, case.n, generator=generator) if case.residual else None

    def expected(self) -> torch.Tensor:
        x = self.x if self.weight is None else norm.rms_norm(self.x.float(), self.weight, EPS)
        y = x.float() @ self.w.dense.T
        return y if self.residual is None else y + self.residual.float()

    def run(self, gpu: Gpu, rows: slice = slice(None), *, head: bool = False) -> torch.Tensor:
        case, m = self.case, gpu.module
        x = gpu.tensor(self.x[rows])
        weight = None if self.weight is None else gpu.tensor(self.weight)
        tiles, scales = gpu.tensor(self.w.tiles), gpu.tensor(self.w.scales)
        residual = None if self.residual is None else gpu.tensor(self.residual[rows])
        y = gpu.poisoned(len(x), case.n, dtype=torch.float32 if head else BF16)
        matrix = m.Int4Matrix(gpu.ptr(tiles), gpu.ptr(scales), case.n, case.k, case.group)
        before = (gpu.ptr(x), m.RmsNorm(gpu.ptr(weight), EPS), matrix)
        if head:
            m.int4_head(*before, gpu.ptr(y), len(x), gpu.stream())
        else:
            m.int4_linear_decode(*before, gpu.ptr(residual), gpu.ptr(y), len(x), gpu.stream())
        gpu.synchronize()
        return y.cpu()


def _cases(gpu: Gpu) -> list[cases.DecodeCase]:
    return cases.SMALL + cases.WIDE + ([] if gpu.emulated else cases.FULL)


def test_it_matches_the_reference(gpu: Gpu, generator: torch.Generator) -> None:
    for case in _cases(gpu):
        arguments = Arguments(case, generator)
        y = arguments.run(gpu)
        assert relative_error(y, arguments.expected()) < TOLERANCE, case
        assert torch.equal(arguments.run(gpu), y), case


def test_the_head_rounds_to_bfloat16(gpu: Gpu, generator: torch.Generator) -> None:
    for case in (cases.DecodeCase(3, 6350, 64, 32), cases.DecodeCase(1, 65, 192, 64)):
        arguments = Arguments(case, generator)
        y = arguments.run(gpu, head=True)
        assert relative_error(y, arguments.expected()) < TOLERANCE, case
        assert torch.equal(y, y.bfloat16().float())


@pytest.mark.parametrize("group", [32, 128])
def test_a_row_does_not_depend_on_the_others(gpu: Gpu, generator: torch.Generator, group: int) -> None:
    arguments = Arguments(cases.DecodeCase(8, 100, 640, group, residual=True), generator)
    whole = arguments.run(gpu)
    for first, last in ((0, 1), (3, 4), (2, 5), (0, 7)):
        assert torch.equal(arguments.run(gpu, slice(first, last)), whole[first:last])
    arguments.x[4] = float("nan")
    poisoned = arguments.run(gpu)
    assert poisoned[4].isnan().all()
    assert torch.equal(poisoned[[0, 1, 2, 3, 5, 6, 7]], whole[[0, 1, 2, 3, 5, 6, 7]])


@pytest.mark.parametrize("blocks_per_sm", [1, 2, 5])
def test_every_split_gives_the_product(gpu: Gpu, generator: torch.Generator, blocks_per_sm: int) -> None:
    m = gpu.module
    m.override_decode_config(m.DecodeKernel.LINEAR, blocks_per_sm)
    try:
        for case in (cases.DecodeCase(2, 130, 448, 32), cases.DecodeCase(1, 130, 640, 128, residual=True)):
            arguments = Arguments(case, generator)
            assert relative_error(arguments.run(gpu), arguments.expected()) < TOLERANCE, case
    finally:
        m.override_decode_config(m.DecodeKernel.LINEAR, 0)


def test_what_it_cannot_do_is_refused(gpu: Gpu, generator: torch.Generator) -> None:
    for case in (cases.DecodeCase(9, 16, 64, 32), cases.DecodeCase(1, 16, 48, 16)):
        arguments = Arguments(cases.DecodeCase(case.rows, 16, 64, 32), generator)
        arguments.case = case
        with pytest.raises(RuntimeError, match="InvalidValue"):
            arguments.run(gpu)
