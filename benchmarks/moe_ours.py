"""The experts by this project's kernels (moe_methods.py says what a method is)."""

from collections.abc import Sequence

import torch
from moe_methods import Call, Experts, Method, Routing
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.linear.int4_tiles import interleave_gate_up, pack_scales, tiles_of_rows
from torch import Tensor

DECODE_ROWS = 8  # kMaxDecodeRows in cuda/types.h
KINDS = {"bf16": "BFLOAT16", "int8": "INT8", "fp8": "FLOAT8"}  # of ExpertActivations in moe/cuda.h


class Ours:
    """The experts in tiles, on a GPU or on the emulated one.

    The kernels add a shared expert and a residual, too. Both are zeros here, and the shared expert of decode
    is as narrow as it can be.
    """

    def __init__(self, gpu: Gpu, experts: Experts) -> None:
        self.gpu, self.experts = gpu, experts
        model, group = experts.model, experts.group
        hidden, width = model.hidden, model.intermediate
        self._kept: list[Tensor] = []
        gate_up = interleave_gate_up(experts.gate_up), interleave_gate_up(experts.gate_up_scales)
        self.gate_up = self._matrix(*gate_up)
        self.down = self._matrix(experts.down, experts.down_scales)

        def zeros(n: int, k: int) -> object:
            codes = torch.full((n, k // 2), 0x88, dtype=torch.uint8, device=gpu.device)
            return self._matrix(codes, torch.zeros(n, k // group, dtype=torch.bfloat16, device=gpu.device))

        self.shared_gate_up, self.shared_down = zeros(2 * group, hidden), zeros(hidden, group)
        self.shape = gpu.module.MoeShape(hidden, model.experts, model.top_k, width, group)

    def _matrix(self, rows: Tensor, scales: Tensor) -> object:
        n, k = rows.shape[-2], 2 * rows.shape[-1]
        tiles, packed = tiles_of_rows(rows), pack_scales(scales, k).contiguous()
        self._kept += [tiles, packed]
        pointers = self.gpu.ptr(tiles), self.gpu.ptr(packed)
        return self.gpu.module.Int4Matrix(*pointers, n, k, self.experts.group)

    def decode(self, x: Tensor, routings: Sequence[Routing]) -> Call:
        """They choose by the logits themselves, and normalize x first, which its rows are already."""
        gpu, m, model = self.gpu, self.gpu.module, self.experts.model
        rows = x.shape[0]
        last = torch.zeros(rows, 1, device=gpu.device)
        logits = [torch.cat((routing.logits, last), 1).contiguous() for routing in routings]
        act = gpu.poisoned(rows, model.top_k * model.intermediate + self.experts.group, dtype=x.dtype)
        residual, y = torch.zeros_like(x), gpu.poisoned(*x.shape, dtype=x.dtype)
        norm_weight = torch.zeros(x.shape[1], dtype=x.dtype, device=gpu.device)
        norm = m.RmsNorm(gpu.ptr(norm_weight), 1e-6)

        def call(i: int, _: Tensor = norm_weight) -> Tensor:  # kept
            chosen, on = gpu.ptr(logits[i]), (self.shape, rows, gpu.stream())
            matrices = self.gate_up, self.shared_gate_up
            m.moe_gate_up_decode(gpu.ptr(x), norm, chosen, *matrices, gpu.ptr(act), *on)
            matrices = self.down, self.shared_down
            m.moe_down_decode(gpu.ptr(act), chosen, *matrices, gpu.ptr(residual), gpu.ptr(y), *on)
            return y

        return call

    def prefill(self, x: Tensor, routings: Sequence[Routing], activations: str = "bf16") -> Call:
        gpu, m, model = self.gpu, self.gpu.module, self.experts.model
        tokens, rows = x.shape[0], x.shape[0] * model.top_k
        ids = [routing.ids.int().contiguous() for routing in routings]
        order = gpu.poisoned(rows, dtype=torch.int32)
        offsets = gpu.poisoned(model.experts + 1, dtype=torch.int32)
        sorting = gpu.scratch(m.moe_sort_scratch(self.shape, tokens))
        act = gpu.poisoned(rows, model.intermediate, dtype=x.dtype)
        choices = gpu.poisoned(rows, model.hidden, dtype=x.dtype)
        zeros, zero_logits = torch.zeros_like(x), torch.zeros(tokens, device=gpu.device)
        y = gpu.poisoned(*x.shape, dtype=x.dtype)
        quantized = gpu.scratch(m.moe_8bit_scratch(self.shape, tokens) if activations != "bf16" else 0)
        kind = getattr(m.ExpertActivations, KINDS[activations])

        def product(name: str, source: Tensor, matrix: object, target: Tensor) -> None:
            routed = gpu.ptr(source), gpu.ptr(order), gpu.ptr(offsets), matrix, gpu.ptr(target)
            on = self.shape, tokens, gpu.stream()
            if activations == "bf16":
                getattr(m, f"{name}_prefill")(*routed, *on)
            else:
                getattr(m, f"{name}_prefill_8bit")(kind, *routed, gpu.ptr(quantized), *on)

        def call(i: int) -> Tensor:
            on = self.shape, tokens, gpu.stream()
            m.moe_sort(gpu.ptr(ids[i]), gpu.ptr(order), gpu.ptr(offsets), gpu.ptr(sorting), *on)
            product("moe_gate_up", x, self.gate_up, act)
            product("moe_down", act, self.down, choices)
            summed = gpu.ptr(routings[i].weights), gpu.ptr(choices)
            nothing = gpu.ptr(zeros), gpu.ptr(zero_logits), gpu.ptr(zeros)
            m.moe_combine(*summed, *nothing, gpu.ptr(y), *on)
            return y

        return call

    def methods(self) -> list[Method]:
        def of(activations: str) -> Method:
            def make(x: Tensor, routings: Sequence[Routing]) -> Call:
                return self.prefill(x, routings, activations)

            return Method(f"ours, prefill, {activations}", make, activations)

        return [Method("ours, decode", self.decode, most=DECODE_ROWS), *map(of, KINDS)]
