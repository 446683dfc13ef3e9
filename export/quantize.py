"""Weight-only quantization: symmetric int4 and int8 codes with one bfloat16 scale a group.

A group is G consecutive weights of a row: rows of several matrices may be concatenated after quantizing as
well as before. Codes are chosen against the scale as it is stored: value = code * float32(scale).

N rows, K columns, G group size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from qwen_runner.kernels.linear.reference import dequantize, dequantize_int4, pack_int4
from torch import Tensor

from .config import ModelConfig
from .errors import ExportError
from .tensor_table import EMBEDDING, HEAD, LAYER_TENSORS, MODEL_TENSORS

Method = Literal["hqq", "rtn"]
Kind = Literal["int4", "int8", "keep"]

GROUP_SIZES = (32, 64, 128)

__all__ = [
    "GROUP_SIZES",
    "QuantizationConfig",
    "check_groups",
    "check_quantizable",
    "dequantize_int4",
    "dequantize_int8",
    "quantize_int4",
    "quantize_int8",
    "weight_kind",
]

_INT4_MIN, _INT4_MAX, _INT8_MAX = -8, 7, 127

# Norms, the router, the gates, the convolution and the decay are kept: they are small, and an error in them
# reaches every channel or picks another expert.
_INT4_SUFFIXES = (
    ".in_proj_qkv.weight",
    ".in_proj_z.weight",
    ".out_proj.weight",
    ".q_proj.weight",
    ".k_proj.weight",
    ".v_proj.weight",
    ".o_proj.weight",
    ".experts.gate_up_proj",
    ".experts.down_proj",
    ".shared_expert.gate_proj.weight",
    ".shared_expert.up_proj.weight",
    ".shared_expert.down_proj.weight",
)

# The scale search starts at these fractions of the scale that covers the group, with either sign: codes are
# not symmetric. On normal and heavy-tailed weights the six starts end within 1 % of the squared error of
# the best of 80 scales; a single start at the rounding scale ends up to 5 % above it.
_START_FRACTIONS = (1.0, 0.85, 0.7)
# Two steps that forgive outliers, then three of least squares; more steps gain less than 0.3 %.
_SHRINKAGES: tuple[float | None, ...] = (2.0, 4.0, None, None, None)
_SHRINKAGE_POWER = 0.7  # the p of the paper's l_p norm

# Weights at a time, by device; the search holds about ten float32 copies. On a CPU, whose caches hold them,
# 2.9 times as fast as with 1 << 22; a GPU is not filled with fewer.
_CHUNK_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True)
class QuantizationConfig:
    """What happens to the weights.

    scheme: "none" keeps them all in floating point; "int4" quantizes as `weight_kind` says.
    group_size: weights that share a scale, one of GROUP_SIZES.
    method: "rtn" takes the scale that covers the group; "hqq" searches for the one with the least error.
    head: the precision of a head that is not tied to the embedding.
    """

    scheme: Literal["none", "int4"] = "int4"
    group_size: int = 32
    method: Method = "hqq"
    head: Literal["int4", "int8"] = "int4"

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("scheme", self.scheme, ("none", "int4")),
            ("group_size", self.group_size, GROUP_SIZES),
            ("method", self.method, ("hqq", "rtn")),
            ("head", self.head, ("int4", "int8")),
        ):
            if value not in allowed:
                raise ExportError(f"quantization {key} {value!r}; supported: {', '.join(map(str, allowed))}")


def weight_kind(name: str, quantization: QuantizationConfig) -> Kind:
    """What becomes of the tensor `name` of a checkpoint: int4 or int8 codes, or kept in floating point."""
    if quantization.scheme == "none":
        return "keep"
    if name == EMBEDDING:  # and the head with it if tied
        return "int8"
    if name == HEAD:
        return quantization.head
    return "int4" if name.endswith(_INT4_SUFFIXES) else "keep"


def check_quantizable(config: ModelConfig, quantization: QuantizationConfig) -> None:
    """Fails before any work if a tensor of the model cannot be quantized.

    Raises:
        ExportError: a tensor's columns are no multiple of the group size.
    """
    for spec in (*MODEL_TENSORS, *LAYER_TENSORS):
        name = spec.name if spec in MODEL_TENSORS else f".{spec.name}"
        if weight_kind(name, quantization) != "keep":
            check_groups(spec.name, spec.shape(config)[-1], quantization.group_size)


def check_groups(name: str, columns: int, group_size: int) -> None:
    """Raises ExportError unless the `columns` of the tensor `name` divide into groups."""
    if columns % group_size == 0:
        return
    fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
    remedy = f"use --group-size {fitting[-1]}" if fitting else "use --quantize none"
    raise ExportError(
        f"tensor {name} has {columns} columns, no multiple of the group size {group_size}; {remedy}"
    )


def quantize_int4(
    weight: Tensor,
    group_size: int,
    method: Method = "hqq",
    *,
    name: str = "weight",
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantizes to codes in [-8, 7], packed two a byte: code + 8, even columns in the low nibble.

    "rtn" takes as scale a group's extreme weight over -8, or its magnitude over 7, whichever has the lower
    squared error. "hqq" is the half-quadratic search of Badri & Shaji, "Half-Quadratic Quantization" (2023),
    for a scale without a zero point; rtn's scale is among those it chooses from, so no group is worse.

    Args:
        weight: [..., N, K] of a floating point type.
        name: of the tensor, for errors.
        device: computes there, a chunk at a time; by default where `weight` is.

    Returns:
        u8 [..., N, K/2] and bf16 [..., N, K/G], on `weight`'s device.

    Raises:
        ExportError: K is no multiple of `group_size`.
    """
    check_groups(name, weight.shape[-1], group_size)
    codes = torch.empty((*weight.shape[:-1], weight.shape[-1] // 2), dtype=torch.uint8, device=weight.device)
    scales = _empty_scales(weight, group_size)
    flat_codes = codes.view(-1, group_size // 2)
    for part, groups in _chunks(weight, group_size, device):
        scale = _int4_scale_rtn(groups)
        if method == "hqq":
            scale = _int4_scale_hqq(groups, scale)
        flat_codes[part] = pack_int4(_int4_codes(groups, scale).to(torch.int8)).to(weight.device)
        scales.view(-1, 1)[part] = scale.to(weight.device, torch.bfloat16)
    return codes, scales


def quantize_int8(
    weight: Tensor, group_size: int, *, name: str = "weight", device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Rounds to the nearest of codes in [-127, 127]; arguments and errors as of `quantize_int4`.

    Returns:
        i8 [..., N, K] and bf16 [..., N, K/G], on `weight`'s device.
    """
    check_groups(name, weight.shape[-1], group_size)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = _empty_scales(weight, group_size)
    for part, groups in _chunks(weight, group_size, device):
        scale = _as_stored(groups.abs().amax(-1, keepdim=True) / _INT8_MAX)
        chunk = torch.round(groups / _divisor(scale)).clamp_(-_INT8_MAX, _INT8_MAX)
        codes.view(-1, group_size)[part] = chunk.to(weight.device, torch.int8)
        scales.view(-1, 1)[part] = scale.to(weight.device, torch.bfloat16)
    return codes, scales


def dequantize_int8(qweight: Tensor, scales: Tensor) -> Tensor:
    """i8 [..., K], bf16 [..., K/G] -> f32 [..., K]."""
    return dequantize(qweight, scales)


def _empty_scales(weight: Tensor, group_size: int) -> Tensor:
    shape = (*weight.shape[:-1], weight.shape[-1] // group_size)
    return torch.empty(shape, dtype=torch.bfloat16, device=weight.device)


def _chunks(
    weight: Tensor, group_size: int, device: torch.device | str | None
) -> Iterator[tuple[slice, Tensor]]:
    """`weight`'s groups, f32 [rows, G] on `device`, with the slice they are of all groups."""
    groups, where = weight.reshape(-1, group_size), torch.device(device or weight.device)
    rows = max(1, _CHUNK_WEIGHTS[where.type] // group_size)
    for start in range(0, groups.shape[0], rows):
        part = slice(start, start + rows)
        yield part, groups[part].to(where, torch.float32)


def _as_stored(scale: Tensor) -> Tensor:
    return scale.to(torch.bfloat16).to(torch.float32)


def _divisor(scale: Tensor) -> Tensor:
    """`scale`, and 1 where it is 0: a group of zeros has code 0 throughout."""
    return torch.where(scale == 0, 1.0, scale)


def _int4_codes(groups: Tensor, scale: Tensor) -> Tensor:
    return torch.round(groups / _divisor(scale)).clamp_(_INT4_MIN, _INT4_MAX)


def _int4_error(groups: Tensor, scale: Tensor) -> Tensor:
    """The squared error of each group, [rows, 1]."""
    return (_int4_codes(groups, scale) * scale).sub_(groups).square_().sum(-1, keepdim=True)


def _extreme(groups: Tensor) -> Tensor:
    """The weight of the largest magnitude of each group, with its sign, [rows, 1]."""
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True))


def _int4_scale_rtn(groups: Tensor) -> Tensor:
    extreme = _extreme(groups)
    wide, narrow = _as_stored(extreme / _INT4_MIN), _as_stored(extreme.abs() / _INT4_MAX)
    return torch.where(_int4_error(groups, wide) <= _int4_error(groups, narrow), wide, narrow)


def _int4_scale_hqq(groups: Tensor, scale: Tensor) -> Tensor:
    """The best scale found, `scale` included."""
    best, least = scale, _int4_error(groups, scale)
    extreme = _extreme(groups)
    for fraction in _START_FRACTIONS:
        for limit in (_INT4_MIN, -_INT4_MIN):
            found = _as_stored(_half_quadratic(groups, extreme * (fraction / limit)))
            error = _int4_error(groups, found)
            best = torch.where(error < least, found, best)
            least = torch.minimum(error, least)
    return best


def _half_quadratic(groups: Tensor, scale: Tensor) -> Tensor:
    """Alternates codes, outliers and scale, each the best for the other two, from `scale`.

    The outliers are what the l_p norm's shrinkage leaves of the residual, in units of the scale; the scale is
    the least-squares fit of the codes to the weights without them.
    """
    for shrinkage in _SHRINKAGES:
        codes = _int4_codes(groups, scale)
        target = groups
        if shrinkage is not None:
            unit = _divisor(scale)
            residual = (groups - codes * scale) / unit
            magnitude = residual.abs()
            threshold = magnitude.clamp_min(1e-8).pow(_SHRINKAGE_POWER - 1) / shrinkage
            target = groups - residual.sign() * (magnitude - threshold).clamp_min_(0) * unit
        square = codes.square().sum(-1, keepdim=True)
        fitted = (target * codes).sum(-1, keepdim=True) / square.clamp_min(1)
        scale = torch.where(square > 0, fitted, scale)
    return scale
