"""router_decode, moe_gate_up_decode and moe_down_decode on CUDA."""

import pytest
import torch
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.linear import cuda_cases_decode as linear
from qwen_runner.kernels.linear.int4_tiles import deinterleave_gate_up
from qwen_runner.kernels.linear.reference import float_linear
from qwen_runner.kernels.moe import cuda_cases_decode as cases
from qwen_runner.kernels.moe import reference
from qwen_runner.kernels.norm import reference as norm
from qwen_runner.kernels.tolerance import TOLERANCE, error
from torch.nn import functional

EPS = 1e-6
BF16, F32 = torch.bfloat16, torch.float32


def _cases(gpu: Gpu) -> list[cases.DecodeCase]:
    return cases.SMALL + ([] if gpu.emulated else cases.FULL)


def _shape(gpu: Gpu, case: cases.DecodeCase) -> object:
    return gpu.module.MoeShape(
        case.hidden, case.experts, case.top_k, case.intermediate, case.shared_intermediate
    )


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return norm.rms_norm(x.float(), weight.float(), EPS)


class RouterArguments:
    def __init__(self, rows: int, hidden: int, experts: int, generator: torch.Generator) -> None:
        self.case = cases.DecodeCase(rows, hidden, experts, 1, 32, 32, 32)
        self.x = linear.rows_of(rows, hidden, generator=generator)
        self.weight = linear.norm_weight(hidden, generator)
        self.router = (torch.randn(experts, hidden, generator=generator) * hidden**-0.5).bfloat16()
        self.gate = (torch.randn(1, hidden, generator=generator) * hidden**-0.5).bfloat16()

    def run(self, gpu: Gpu, rows: slice = slice(None)) -> torch.Tensor:
        """logits"""
        m, p = gpu.module, gpu.ptr
        x, weight = gpu.tensor(self.x[rows]), gpu.tensor(self.weight)
        router, gate = gpu.tensor(self.router), gpu.tensor(self.gate)
        logits = gpu.poisoned(len(x), self.case.experts + 1, dtype=F32)
        before = (p(x), m.RmsNorm(p(weight), EPS), p(router), p(gate))
        m.router_decode(*before, p(logits), _shape(gpu, self.case), len(x), gpu.stream())
        gpu.synchronize()
        return logits.cpu()

    def check(self, gpu: Gpu) -> None:
        logits = self.run(gpu)
        expected = float_linear(_normed(self.x, self.weight), torch.cat((self.router, self.gate)))
        assert error(logits, expected) < TOLERANCE[BF16]
        assert torch.equal(logits, logits.bfloat16().float())
        assert torch.equal(self.run(gpu), logits)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(("hidden", "experts"), [(32, 1), (96, 16), (192, 33), (1280, 40)])
def test_the_router_matches_the_reference(
    gpu: Gpu, generator: torch.Generator, rows: int, hidden: int, experts: int
) -> None:
    RouterArguments(rows, hidden, experts, generator).check(gpu)


def test_the_router_at_the_models_size(gpu: Gpu, generator: torch.Generator) -> None:
    if gpu.emulated:
        pytest.skip("for a GPU")
    for rows in (1, 8):
        RouterArguments(rows, 2048, 256, generator).check(gpu)


def test_a_row_of_the_router_does_not_depend_on_the_others(gpu: Gpu, generator: torch.Generator) -> None:
    arguments = RouterArguments(8, 192, 20, generator)
    whole = arguments.run(gpu)
    for first, last in ((0, 1), (2, 7)):
        assert torch.equal(arguments.run(gpu, slice(first, last)), whole[first:last])


class ExpertArguments:
    def __init__(self, case: cases.DecodeCase, generator: torch.Generator) -> None:
        self.case = case
        d, i, s = case.hidden, case.intermediate, case.shared_intermediate

        def weights(*shape: int) -> linear.Int4Weights:
            return linear.int4_weights(*shape, group=case.group, generator=generator)

        self.x = linear.rows_of(case.rows, d, generator=generator)
        self.norm = linear.norm_weight(d, generator)
        self.residual = linear.rows_of(case.rows, d, generator=generator)
        self.logits = torch.randn(case.rows, case.experts + 1, generator=generator).bfloat16().float()
        self.gate_up, self.down = weights(case.experts, 2 * i, d), weights(case.experts, d, i)
        self.shared_gate_up, self.shared_down = weights(2 * s, d), weights(d, s)

    def ids(self) -> torch.Tensor:
        order = self.logits[:, :-1].sort(dim=-1, descending=True, stable=True).indices
        return order[:, : self.case.top_k]

    def expected_act(self) -> torch.Tensor:
        x = _normed(self.x, self.norm)
        chosen = deinterleave_gate_up(self.gate_up.dense)[self.ids()]  # [B, A, 2 I, D]
        gate, up = (chosen @ x[:, None, :, None]).squeeze(-1).chunk(2, dim=-1)
        shared_gate, shared_up = (x @ deinterleave_gate_up(self.shared_gate_up.dense).T).chunk(2, dim=-1)
        routed = (functional.silu(gate) * up).flatten(1)
        return torch.cat((routed, functional.silu(shared_gate) * shared_up), dim=1)

    def expected(self, act: torch.Tensor) -> torch.Tensor:
        case = self.case
        logits = self.logits.bfloat16()
        unit = torch.eye(case.experts, dtype=BF16)
        ids, weights = reference.router(logits[:, :-1], unit, case.top_k)
        routed = act.float()[:, : case.top_k * case.intermediate].unflatten(1, (case.top_k, -1))
        shared = act.float()[:, case.top_k * case.intermediate :]
        choices = (self.down.dense[ids] @ routed[..., None]).squeeze(-1)  # [B, A, D]
        y = (choices * weights[..., None]).sum(dim=1)
        y += shared @ self.shared_down.dense.T * logits[:, -1:].sigmoid().float()
        return self.residual.float() + y

    def matrix(self, gpu: Gpu, keep: list[torch.Tensor], weights: linear.Int4Weights) -> object:
        tiles, scales = gpu.tensor(weights.tiles), gpu.tensor(weights.scales)
        keep += [tiles, scales]
        n, k = weights.dense.shape[-2:]
        return gpu.module.Int4Matrix(gpu.ptr(tiles), gpu.ptr(scales), n, k, self.case.group)

    def run_gate_up(self, gpu: Gpu, rows: slice = slice(None)) -> torch.Tensor:
        case, m, p = self.case, gpu.module, gpu.ptr
        x, weight, logits = gpu.tensor(self.x[rows]), gpu.tensor(self.norm), gpu.tensor(self.logits[rows])
        width = case.top_k * case.intermediate + case.shared_intermediate
        act = gpu.poisoned(len(x), width, dtype=BF16)
        keep: list[torch.Tensor] = []
        matrices = (self.matrix(gpu, keep, self.gate_up), self.matrix(gpu, keep, self.shared_gate_up))
        before = (p(x), m.RmsNorm(p(weight), EPS), p(logits))
        m.moe_gate_up_decode(*before, *matrices, p(act), _shape(gpu, case), len(x), gpu.stream())
        gpu.synchronize()
        return act.cpu()

    def run_down(self, gpu: Gpu, act: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        case, p = self.case, gpu.ptr
        act, logits = gpu.tensor(act[rows]), gpu.tensor(self.logits[rows])
        y = gpu.tensor(self.residual[rows])  # in place
        keep: list[torch.Tensor] = []
        matrices = (self.matrix(gpu, keep, self.down), self.matrix(gpu, keep, self.shared_down))
        shape = _shape(gpu, case)
        gpu.module.moe_down_decode(p(act), p(logits), *matrices, p(y), p(y), shape, len(act), gpu.stream())
        gpu.synchronize()
        return y.cpu()

    def check(self, gpu: Gpu) -> None:
        act = self.run_gate_up(gpu)
        expected = self.expected_act()
        assert error(act, expected) < TOLERANCE[BF16], self.case
        assert torch.equal(self.run_gate_up(gpu), act), self.case
        act = expected.bfloat16()
        y = self.run_down(gpu, act)
        assert error(y, self.expected(act)) < TOLERANCE[BF16], self.case
        assert torch.equal(self.run_down(gpu, act), y), self.case


def test_the_experts_match_the_reference(gpu: Gpu, generator: torch.Generator) -> None:
    for case in _cases(gpu):
        ExpertArguments(case, generator).check(gpu)


@pytest.mark.parametrize(("experts", "top_k"), cases.ROUTERS, ids=str)
def test_the_best_experts_are_chosen(gpu: Gpu, generator: torch.Generator, experts: int, top_k: int) -> None:
    ExpertArguments(cases.DecodeCase(2, 32, experts, top_k, 32, 32, 32), generator).check(gpu)


def test_of_equal_logits_the_lowest_expert_comes_first(gpu: Gpu, generator: torch.Generator) -> None:
    for experts, top_k in ((40, 9), (300, 32)):
        arguments = ExpertArguments(cases.DecodeCase(3, 32, experts, top_k, 32, 32, 32), generator)
        # A few values over and over; signed zeros are equal too.
        arguments.logits[:, :-1] = arguments.logits[:, torch.arange(experts) % 4]
        arguments.logits[:, 1:-1:4] = 0
        arguments.logits[:, 5:-1:8] = -0.0
        arguments.check(gpu)


def test_a_nan_of_either_sign_comes_first(gpu: Gpu, generator: torch.Generator) -> None:
    arguments = ExpertArguments(cases.DecodeCase(2, 32, 40, 5, 32, 32, 32), generator)
    arguments.logits[:, 7] = torch.nan
    arguments.logits[:, 3] = -torch.nan
    assert arguments.ids()[:, :2].tolist() == [[3, 7]] * 2
    act = arguments.run_gate_up(gpu)
    assert error(act, arguments.expected_act()) < TOLERANCE[BF16]
    assert arguments.run_down(gpu, act).isnan().all()


@pytest.mark.parametrize("case", [*cases.SMALL[3:6], cases.DecodeCase(8, 128, 4, 2, 64, 64, 32)], ids=str)
def test_a_row_of_the_experts_does_not_depend_on_the_others(
    gpu: Gpu, generator: torch.Generator, case: cases.DecodeCase
) -> None:
    arguments = ExpertArguments(case, generator)
    act = arguments.run_gate_up(gpu)
    y = arguments.run_down(gpu, act)
    for row in range(case.rows):
        part = slice(row, row + 1)
        assert torch.equal(arguments.run_gate_up(gpu, part), act[part])
        assert torch.equal(arguments.run_down(gpu, act, part), y[part])


# Blocks of one tile row, of a few, and with the shared expert's beside them or apart.
@pytest.mark.parametrize("blocks_per_sm", [1, 2, 8, 100])
def test_every_split_gives_the_experts(gpu: Gpu, generator: torch.Generator, blocks_per_sm: int) -> None:
    m = gpu.module
    kernel = m.DecodeKernel.MOE_GATE_UP
    m.override_decode_config(kernel, blocks_per_sm)
    try:
        for case in (cases.SMALL[2], cases.DecodeCase(1, 192, 7, 3, 192, 448, 32)):
            ExpertArguments(case, generator).check(gpu)
    finally:
        m.override_decode_config(kernel, 0)
