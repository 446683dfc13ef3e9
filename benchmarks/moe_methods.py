"""Ways to compute Qwen3.5's routed experts from given choices, all from the same int4 codes and scales.

T tokens, D hidden size, E experts, A experts a token, I intermediate size, G group size. A method makes, for
an x bf16 [T, D] and some routings, a `call(i)` that returns the weighted sum of routing i, bf16 [T, D].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from qwen_runner.kernels.linear.reference import dequantize_int4
from qwen_runner.kernels.moe.reference import int4_moe
from qwen_runner.kernels.tune.workloads import Model
from torch import Tensor
from torch.nn import functional

# ||out - reference|| / ||reference||: what is further off is wrong.
BOUNDS = {"bf16": 1e-2, "int8": 3e-2, "fp8": 8e-2}


@dataclass(frozen=True)
class Experts:
    """Rows as of `pack_int4`; of gate_up gate rows, then up rows."""

    model: Model
    group: int
    gate_up: Tensor  # u8 [E, 2 I, D/2]
    gate_up_scales: Tensor  # bf16 [E, 2 I, D/G]
    down: Tensor  # u8 [E, D, I/2]
    down_scales: Tensor  # bf16 [E, D, I/G]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.gate_up, self.gate_up_scales, self.down, self.down_scales

    @property
    def bytes_of_one(self) -> int:
        return sum(tensor[0].numel() * tensor.element_size() for tensor in self.tensors)


def random_experts(model: Model, group: int, generator: torch.Generator) -> Experts:
    device = generator.device

    def matrices(n: int, k: int) -> tuple[Tensor, Tensor]:
        shape = (model.experts, n, k // 2)
        codes = torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)
        scales = torch.rand(model.experts, n, k // group, device=device, generator=generator)
        # About unit variance out of unit variance in: codes have a deviation of 4.6.
        return codes, ((scales + 0.5) / (4.6 * k**0.5)).bfloat16()

    hidden, width = model.hidden, model.intermediate
    return Experts(model, group, *matrices(2 * width, hidden), *matrices(hidden, width))


@dataclass(frozen=True)
class Routing:
    """The logits and, best first, what reference.router makes of them."""

    logits: Tensor  # f32 [T, E], rounded to bfloat16
    ids: Tensor  # i64 [T, A]
    weights: Tensor  # f32 [T, A], rounded to bfloat16


def random_routing(model: Model, tokens: int, generator: torch.Generator) -> Routing:
    scores = torch.randn(tokens, model.experts, device=generator.device, generator=generator)
    logits = scores.bfloat16().float()
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, : model.top_k].contiguous()
    values = logits.softmax(dim=-1).gather(1, ids)
    return Routing(logits, ids, (values / values.sum(dim=-1, keepdim=True)).bfloat16().float())


def reference(x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """The loop over experts in plain PyTorch, float32 throughout: f32 [T, D]."""
    return int4_moe(x.float(), routing.ids, routing.weights, *experts.tensors)


Call = Callable[[int], Tensor]


@dataclass(frozen=True)
class Method:
    name: str
    make: Callable[[Tensor, Sequence[Routing]], Call] | None  # None: not to be had here
    activations: str = "bf16"
    most: int | None = None  # tokens that it is for
    captured: bool = True  # by a CUDA graph: no size depends on the routing
    why_not: str = ""


def _each(function: Callable[..., Tensor], experts: Experts) -> Callable[[Tensor, Sequence[Routing]], Call]:
    """Of function(x, ids, weights, gate_up, gate_up_scales, down, down_scales)."""

    def make(x: Tensor, routings: Sequence[Routing]) -> Call:
        return lambda i: function(x, routings[i].ids, routings[i].weights, *experts.tensors)

    return make


def gathered(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor,
    down_scales: Tensor,
) -> Tensor:  # fmt: skip
    """Each choice with its own copy of its expert's dequantized matrices, and so without a loop."""
    flat, rows = ids.flatten(), x.repeat_interleave(ids.shape[1], 0).unsqueeze(1)
    first = dequantize_int4(gate_up, gate_up_scales).to(x.dtype)[flat]
    gate, up = torch.bmm(rows, first.transpose(1, 2)).chunk(2, dim=-1)
    del first  # half of the memory that it takes at most
    second = dequantize_int4(down, down_scales).to(x.dtype)[flat]
    choices = torch.bmm(functional.silu(gate) * up, second.transpose(1, 2))
    return (choices.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def grouped(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor,
    down_scales: Tensor,
) -> Tensor:  # fmt: skip
    """The choices sorted by expert, and PyTorch's product of groups with all experts dequantized."""
    of_choices, order = ids.flatten().sort(stable=True)
    experts = torch.arange(gate_up.shape[0], device=ids.device)
    ends = torch.searchsorted(of_choices, experts, right=True).int()
    first = dequantize_int4(gate_up, gate_up_scales).to(x.dtype).transpose(1, 2)
    gate, up = functional.grouped_mm(x[order // ids.shape[1]], first, offs=ends).chunk(2, dim=-1)
    second = dequantize_int4(down, down_scales).to(x.dtype).transpose(1, 2)
    sorted_choices = functional.grouped_mm(functional.silu(gate) * up, second, offs=ends)
    choices = torch.empty_like(sorted_choices).index_copy(0, order, sorted_choices)
    return (choices.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def pytorch_methods(experts: Experts) -> list[Method]:
    def loop(x: Tensor, routings: Sequence[Routing]) -> Call:
        return lambda i: reference(x, routings[i], experts)

    return [
        Method("loop, float32", loop, captured=False),
        Method("eager", _each(gathered, experts)),
        Method("torch.compile", _each(torch.compile(gathered), experts)),
        Method("torch.compile, grouped_mm", _each(torch.compile(grouped), experts)),
    ]


# ExecuTorch's operators, what they multiply with, and the tokens that they are for: the first has no tile.
EXECUTORCH = (
    ("fused_moe", "bf16", 64),
    ("fused_moe_batched_gemm", "bf16", None),
    ("fused_moe_batched_gemm_int8", "int8", None),
)


def executorch_weights(experts: Experts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ExecuTorch 1.5.1's Triton kernels take them: i8 [E, N, K/2] and bf16 [E, N, K/G].

    A byte holds column k in its low half and k + 1 in its high half, as code + 8: what `pack_int4` writes.
    Gate rows come first there, too.
    """
    gate_up, down = experts.gate_up.view(torch.int8), experts.down.view(torch.int8)
    return gate_up, experts.gate_up_scales, down, experts.down_scales


def executorch_methods(experts: Experts) -> list[Method]:
    """Needs a GPU where the kernels are installed."""
    missing = ""
    try:
        import executorch.backends.cuda.triton.kernels  # noqa: F401 - registers torch.ops.triton
    except ImportError as error:
        missing = f"not installed ({error})"
    model, weights = experts.model, executorch_weights(experts)

    def method(name: str, activations: str, most: int | None) -> Method:
        def make(x: Tensor, routings: Sequence[Routing]) -> Call:
            operator = getattr(torch.ops.triton, name)
            sizes = (model.top_k, model.experts, experts.group)
            return lambda i: operator(x, *weights, routings[i].weights, routings[i].ids, *sizes)

        return Method(f"ExecuTorch {name}", None if missing else make, activations, most, why_not=missing)

    return [method(*operator) for operator in EXECUTORCH]
