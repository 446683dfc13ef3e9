"""Matrix products with float, int8 and int4 weights, and the int8 embedding.

T tokens, K in-features, N out-features, G group size, V vocabulary, D hidden size.
"""

import torch

from ..registration import register
from . import reference

__all__ = ["reference"]


def _float_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    torch._check(weight.shape[1] == x.shape[1], lambda: "float_linear: weight is not [N, K]")
    return x.new_empty((x.shape[0], weight.shape[0]))


def _int8_linear(x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    torch._check(qweight.dtype == torch.int8, lambda: "int8_linear: qweight is not int8")
    torch._check(qweight.shape[1] == x.shape[1], lambda: "int8_linear: qweight is not [N, K]")
    _check_scales("int8_linear", scales, qweight.shape[0], qweight.shape[1])
    return x.new_empty((x.shape[0], qweight.shape[0]))


def _int4_linear(x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    torch._check(qweight.dtype == torch.uint8, lambda: "int4_linear: qweight is not uint8")
    torch._check(qweight.shape[1] * 2 == x.shape[1], lambda: "int4_linear: qweight is not [N, K/2]")
    _check_scales("int4_linear", scales, qweight.shape[0], qweight.shape[1] * 2)
    return x.new_empty((x.shape[0], qweight.shape[0]))


def _int8_embedding(ids: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    torch._check(qweight.dtype == torch.int8, lambda: "int8_embedding: qweight is not int8")
    _check_scales("int8_embedding", scales, qweight.shape[0], qweight.shape[1])
    return qweight.new_empty((ids.shape[0], qweight.shape[1]), dtype=torch.float32)


def _check_scales(op: str, scales: torch.Tensor, rows: int, columns: int) -> None:
    torch._check(scales.dtype == torch.bfloat16, lambda: f"{op}: scales are not bfloat16")
    torch._check(
        scales.dim() == 2 and scales.shape[0] == rows and columns % scales.shape[1] == 0,
        lambda: f"{op}: scales {list(scales.shape)} are not [{rows}, {columns}/G]",
    )


register("float_linear(Tensor x, Tensor weight) -> Tensor", reference.float_linear, _float_linear)
register(
    "int8_linear(Tensor x, Tensor qweight, Tensor scales) -> Tensor", reference.int8_linear, _int8_linear
)
register(
    "int4_linear(Tensor x, Tensor qweight, Tensor scales) -> Tensor", reference.int4_linear, _int4_linear
)
register(
    "int8_embedding(Tensor ids, Tensor qweight, Tensor scales) -> Tensor",
    reference.int8_embedding,
    _int8_embedding,
)
