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
BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32


def _cases(gpu: Gpu) -> list[cases.DecodeCase]:
    return cases.SMALL + ([] if gpu.emulated else cases.FULL)


def _shape(gpu: Gpu, case: cases.DecodeCase) -> object:
    return gpu.module.MoeShape(
        case.hidden, case.experts, case.top_k, case.intermediate, case.shared_intermediate
    )


class RouterArguments:
    def __init__(self, rows: int, hidden: int, experts: int, top_k: int, generator: torch.Generator) -> None:
        self.case = cases.DecodeCase(rows, hidden, experts, top_k, 32, 32, 32)
        self.x = linear.rows_of(rows, hidden, generator=generator)
        self.weight = linear.norm_weight(hidden, generator)
        self.router = (torch.randn(experts, hidden, generator=generator) * hidden**-0.5).bfloat16()
        self.gate = (torch.randn(1, hidden, generator=generator) * hidden**-0.5).bfloat16()

    def run(self, gpu: Gpu, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """normed, ids, weights"""
        case, m, p = self.case, gpu.module, gpu.ptr
        x, weight = gpu.tensor(self.x[rows]), gpu.tensor(self.weight)
        router, gate = gpu.tensor(self.router), gpu.tensor(self.gate)
        count, shape, counters = len(x), _shape(gpu, case), gpu.counters()
        scratch = gpu.scratch(m.router_decode_scratch(shape, count))
        normed = gpu.poisoned(count, case.hidden, dtype=BF16)
        ids = gpu.poisoned(count, case.top_k, dtype=I32)
        weights = gpu.poisoned(count, case.top_k + 1, dtype=F32)
        before = (p(x), m.RmsNorm(p(weight), EPS), p(router), p(gate))
        after = (p(scratch), p(counters), shape, count, gpu.stream())
        m.router_decode(*before, p(normed), p(ids), p(weights), *after)
        gpu.synchronize()
        assert not counters.any()
        return normed.cpu(), ids.cpu(), weights.cpu()

    def check(self, gpu: Gpu) -> None:
        normed, ids, weights = self.run(gpu)
        assert error(normed, norm.rms_norm(self.x, self.weight, EPS)) < TOLERANCE[BF16]
        # From here on by the kernel's own rounding of the norm, so that near ties agree.
        logits = float_linear(normed, self.router).float()
        chosen = logits.gather(1, ids.long())
        best, _ = reference.router(normed, self.router, self.case.top_k)
        assert error(chosen, logits.gather(1, best)) < TOLERANCE[BF16]
        assert all(len(set(row)) == self.case.top_k for row in ids.tolist())
        expected = chosen.softmax(dim=-1)
        assert error(weights[:, :-1], expected) < 2 * TOLERANCE[BF16]
        gate = float_linear(normed, self.gate).sigmoid()
        assert error(weights[:, -1:], gate) < TOLERANCE[BF16]
        assert torch.equal(weights, weights.bfloat16().float())
        for again, value in zip(self.run(gpu), (normed, ids, weights), strict=True):
            assert torch.equal(again, value)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(("experts", "top_k"), cases.ROUTERS, ids=str)
def test_the_router_matches_the_reference(
    gpu: Gpu, generator: torch.Generator, rows: int, experts: int, top_k: int
) -> None:
    RouterArguments(rows, 96, experts, top_k, generator).check(gpu)


def test_the_router_at_the_models_size(gpu: Gpu, generator: torch.Generator) -> None:
    if gpu.emulated:
        pytest.skip("for a GPU")
    for rows in (1, 8):
        RouterArguments(rows, 2048, 256, 8, generator).check(gpu)


def test_of_equal_logits_the_lowest_expert_comes_first(gpu: Gpu, generator: torch.Generator) -> None:
    for experts, top_k in ((40, 9), (300, 32)):
        arguments = RouterArguments(3, 64, experts, top_k, generator)
        # A few experts over and over: every logit is there many times; signed zeros are equal too.
        arguments.router = arguments.router[torch.arange(experts) % 4]
        arguments.router[1::4] = 0
        arguments.router[5::8] = -0.0
        normed, ids, weights = arguments.run(gpu)
        expected_ids, expected_weights = reference.router(normed, arguments.router, top_k)
        assert torch.equal(ids.long(), expected_ids)
        assert error(weights[:, :-1], expected_weights) < TOLERANCE[BF16]


def test_a_nan_of_either_sign_comes_first(gpu: Gpu, generator: torch.Generator) -> None:
    arguments = RouterArguments(2, 64, 40, 5, generator)
    arguments.router[7] = torch.nan
    arguments.router[3] = -torch.nan
    _, ids, _ = arguments.run(gpu)
    logits = float_linear(arguments.x, arguments.router).float()
    assert logits[:, [3, 7]].isnan().all()
    assert ids[:, :2].tolist() == [[3, 7]] * 2


def test_a_row_of_the_router_does_not_depend_on_the_others(gpu: Gpu, generator: torch.Generator) -> None:
    arguments = RouterArguments(8, 192, 20, 4, generator)
    whole = arguments.run(gpu)
    for first, last in ((0, 1), (2, 7)):
        for part, value in zip(arguments.run(gpu, slice(first, last)), whole, strict=True):
            assert torch.equal(part, value[first:last])


class ExpertArguments:
    def __init__(self, case: cases.DecodeCase, generator: torch.Generator) -> None:
        self.case = case
        d, i, s = case.hidden, case.intermediate, case.shared_intermediate

        def weights(*shape: int) -> linear.Int4Weights:
            return linear.int4_weights(*shape, group=case.group, generator=generator)

        self.normed = linear.rows_of(case.rows, d, generator=generator)
        self.residual = linear.rows_of(case.rows, d, generator=generator)
        scores = torch.rand(case.rows, case.experts, generator=generator)
        self.ids = scores.topk(case.top_k).indices.int()
        self.weights = torch.rand(case.rows, case.top_k + 1, generator=generator).bfloat16().float()
        self.gate_up, self.down = weights(case.experts, 2 * i, d), weights(case.experts, d, i)
        self.shared_gate_up, self.shared_down = weights(2 * s, d), weights(d, s)

    def expected_act(self) -> torch.Tensor:
        x = self.normed.float()
        chosen = deinterleave_gate_up(self.gate_up.dense)[self.ids.long()]  # [B, A, 2 I, D]
        gate, up = (chosen @ x[:, None, :, None]).squeeze(-1).chunk(2, dim=-1)
        shared_gate, shared_up = (x @ deinterleave_gate_up(self.shared_gate_up.dense).T).chunk(2, dim=-1)
        routed = (functional.silu(gate) * up).flatten(1)
        return torch.cat((routed, functional.silu(shared_gate) * shared_up), dim=1)

    def expected(self, act: torch.Tensor) -> torch.Tensor:
        case = self.case
        routed = act.float()[:, : case.top_k * case.intermediate].unflatten(1, (case.top_k, -1))
        shared = act.float()[:, case.top_k * case.intermediate :]
        choices = (self.down.dense[self.ids.long()] @ routed[..., None]).squeeze(-1)  # [B, A, D]
        y = (choices * self.weights[:, :-1, None]).sum(dim=1)
        return self.residual.float() + y + shared @ self.shared_down.dense.T * self.weights[:, -1:]

    def matrix(self, gpu: Gpu, keep: list[torch.Tensor], weights: linear.Int4Weights) -> object:
        tiles, scales = gpu.tensor(weights.tiles), gpu.tensor(weights.scales)
        keep += [tiles, scales]
        n, k = weights.dense.shape[-2:]
        return gpu.module.Int4Matrix(gpu.ptr(tiles), gpu.ptr(scales), n, k, self.case.group)

    def run_gate_up(self, gpu: Gpu, rows: slice = slice(None)) -> torch.Tensor:
        case, p = self.case, gpu.ptr
        normed, ids = gpu.tensor(self.normed[rows]), gpu.tensor(self.ids[rows])
        width = case.top_k * case.intermediate + case.shared_intermediate
        act = gpu.poisoned(len(normed), width, dtype=BF16)
        keep: list[torch.Tensor] = []
        matrices = (self.matrix(gpu, keep, self.gate_up), self.matrix(gpu, keep, self.shared_gate_up))
        shape = _shape(gpu, case)
        gpu.module.moe_gate_up_decode(p(normed), p(ids), *matrices, p(act), shape, len(normed), gpu.stream())
        gpu.synchronize()
        return act.cpu()

    def run_down(self, gpu: Gpu, act: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        case, p = self.case, gpu.ptr
        act, ids, weights = gpu.tensor(act[rows]), gpu.tensor(self.ids[rows]), gpu.tensor(self.weights[rows])
        y = gpu.tensor(self.residual[rows])  # in place
        keep: list[torch.Tensor] = []
        matrices = (self.matrix(gpu, keep, self.down), self.matrix(gpu, keep, self.shared_down))
        shape = _shape(gpu, case)
        gpu.module.moe_down_decode(
            p(act), p(ids), p(weights), *matrices, p(y), p(y), shape, len(act), gpu.stream()
        )
        gpu.synchronize()
        return y.cpu()


def test_gate_up_matches_the_reference(gpu: Gpu, generator: torch.Generator) -> None:
    for case in _cases(gpu):
        arguments = ExpertArguments(case, generator)
        act = arguments.run_gate_up(gpu)
        assert error(act, arguments.expected_act()) < TOLERANCE[BF16], case
        assert torch.equal(arguments.run_gate_up(gpu), act), case


def test_down_matches_the_reference(gpu: Gpu, generator: torch.Generator) -> None:
    for case in _cases(gpu):
        arguments = ExpertArguments(case, generator)
        act = arguments.expected_act().bfloat16()
        y = arguments.run_down(gpu, act)
        assert error(y, arguments.expected(act)) < TOLERANCE[BF16], case
        assert torch.equal(arguments.run_down(gpu, act), y), case


@pytest.mark.parametrize("case", cases.SMALL[3:6], ids=str)
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


@pytest.mark.parametrize(("warps", "row_tiles", "parts"), [(1, 1, 1), (8, 2, 4), (6, 1, 3)])
def test_every_split_gives_the_experts(
    gpu: Gpu, generator: torch.Generator, warps: int, row_tiles: int, parts: int
) -> None:
    m = gpu.module
    m.override_decode_config(m.DecodeKernel.MOE_GATE_UP, warps, row_tiles)
    m.override_decode_config(m.DecodeKernel.MOE_DOWN, parts, 1)
    try:
        for case in (cases.SMALL[2], cases.DecodeCase(1, 192, 7, 3, 192, 448, 32)):
            arguments = ExpertArguments(case, generator)
            act = arguments.expected_act()
            assert error(arguments.run_gate_up(gpu), act) < TOLERANCE[BF16], case
            y = arguments.run_down(gpu, act.bfloat16())
            assert error(y, arguments.expected(act.bfloat16())) < TOLERANCE[BF16], case
    finally:
        m.override_decode_config(m.DecodeKernel.MOE_GATE_UP, 0, 0)
        m.override_decode_config(m.DecodeKernel.MOE_DOWN, 0, 0)
