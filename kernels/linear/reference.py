"""Weight-only quantized matrix products in plain PyTorch.

T tokens, K in-features, N out-features, G group size (consecutive in-features sharing a scale), V vocabulary,
D hidden size. x is float32 or bfloat16; products accumulate in float32.
"""

import torch


def unpack_int4(qweight: torch.Tensor) -> torch.Tensor:
    """u8 [..., K/2] of two codes a byte, low nibble = even k -> i8 [..., K] in [-8, 7]."""
    low = (qweight & 0xF).to(torch.int8) - 8
    high = (qweight >> 4).to(torch.int8) - 8
    return torch.stack((low, high), dim=-1).flatten(-2)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """i8 [..., K] in [-8, 7], K even -> u8 [..., K/2]; the inverse of `unpack_int4`."""
    unsigned = (codes + 8).to(torch.uint8)
    return unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """i8 codes [..., K] times bf16 scales [..., K/G] -> f32 [..., K]."""
    groups = codes.float().unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales.float().unsqueeze(-1)).flatten(-2)


def dequantize_int4(qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """u8 [..., K/2], bf16 [..., K/G] -> f32 [..., K]."""
    return dequantize(unpack_int4(qweight), scales)


def float_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K] @ weight [N, K] (float32 or bfloat16), transposed -> [T, N] in x.dtype."""
    return (x.float() @ weight.float().T).to(x.dtype)


def int8_linear(x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [T, K], qweight i8 [N, K], scales bf16 [N, K/G] -> [T, N] in x.dtype."""
    return float_linear(x, dequantize(qweight, scales))


def int4_linear(x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [T, K], qweight u8 [N, K/2] as of `pack_int4`, scales bf16 [N, K/G] -> [T, N] in x.dtype."""
    return float_linear(x, dequantize_int4(qweight, scales))


def int8_embedding(ids: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """ids i64 [T] in [0, V), qweight i8 [V, D], scales bf16 [V, D/G] -> f32 [T, D].

    Raises:
        IndexError: an id is out of range.
    """
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= qweight.shape[0]):
        raise IndexError(f"int8_embedding: an id is not in [0, {qweight.shape[0]})")
    return dequantize(qweight[ids], scales[ids])
