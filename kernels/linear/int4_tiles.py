"""Int4 matrices in the tiles that the CUDA kernels read (`Int4Matrix` in cuda/types.h), packed and unpacked.

N out-features, K in-features (a multiple of 32), G group size, N16 = ceil(N / 16) tile rows and K64 =
ceil(K / 64) tile columns. A row is n = 16 t + 8 u + r, a column k = 64 j + 32 w + 16 s + 8 h + 2 q + o; a
tile's byte is indexed by [r, q, u, w, o, s] and holds h = 0 in its low half, h = 1 in its high half. Leading
dimensions (experts) pass through. Everything runs on the device of its argument.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .reference import dequantize

TILE_ROWS, TILE_COLUMNS = 16, 64
_CHUNK_BYTES = 1 << 19  # of source a step: its temporaries stay in a CPU's cache


def pack_int4_tiles(codes: Tensor) -> Tensor:
    """i8 [..., N, K] in [-8, 7] -> u8 [..., N16, K64, 512]."""
    unsigned = (codes + 8).view(torch.uint8)
    return tiles_of_rows(unsigned[..., 0::2] | (unsigned[..., 1::2] << 4))


def tiles_of_rows(qweight: Tensor, out: Tensor | None = None) -> Tensor:
    """u8 [..., N, K/2], rows as of `pack_int4`, -> u8 [..., N16, K64, 512], written to `out` if given.

    Beside the result it takes a few MiB, whatever the size.
    """
    *lead, n, half_k = qweight.shape
    if half_k % 16:
        raise ValueError(f"{2 * half_k} columns: int4 tiles take a multiple of 32")
    row_tiles, column_tiles = -(-n // TILE_ROWS), -(-2 * half_k // TILE_COLUMNS)
    shape = (*lead, row_tiles, column_tiles, TILE_ROWS * TILE_COLUMNS // 2)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=qweight.device)
    elif out.shape != shape or out.dtype != torch.uint8 or not out.is_contiguous():
        raise ValueError(f"out must be u8 {shape}, contiguous")
    padded_bytes = TILE_COLUMNS // 2 * column_tiles
    step = max(1, _CHUNK_BYTES // (TILE_ROWS * padded_bytes))  # tile rows
    matrices, results = qweight.reshape(-1, n, half_k), out.view(-1, row_tiles, *shape[-2:])
    for matrix, result in zip(matrices, results, strict=True):
        for begin in range(0, row_tiles, step):
            rows = matrix[begin * TILE_ROWS : (begin + step) * TILE_ROWS]
            _convert(rows, result[begin : begin + step])
    return out


def _convert(rows: Tensor, tiles: Tensor) -> None:
    """u8 [<= 16 T, K/2] -> `tiles` u8 [T, K64, 512]."""
    row_tiles, column_tiles = tiles.shape[:2]
    missing = (column_tiles * TILE_COLUMNS // 2 - rows.shape[1], row_tiles * TILE_ROWS - rows.shape[0])
    if any(missing):
        rows = functional.pad(rows, (0, missing[0], 0, missing[1]), value=0x88)  # a pair of zeros
    # Words of the bytes q, every word already where its tile's lanes will have it: [s, h, t, j, r, u, w].
    words = rows.view(torch.int32).view(row_tiles, 2, 8, column_tiles, 2, 2, 2).permute(5, 6, 0, 3, 2, 1, 4)
    (low_0, high_0), (low_1, high_1) = words.contiguous()
    even_0, odd_0 = _pair_halves(low_0, high_0)
    even_1, odd_1 = _pair_halves(low_1, high_1)
    # Four words (o, s) of four bytes q become four words q of bytes (o, s).
    even, odd = _interleave_bytes(even_0, even_1), _interleave_bytes(odd_0, odd_1)
    target = tiles.view(torch.int32).view(row_tiles, column_tiles, 8, 4, 2, 2)  # [t, j, r, q, u, w]
    for q in range(2):
        target[:, :, :, q] = (even[q] & 0xFFFF) | (odd[q] << 16)
        target[:, :, :, q + 2] = ((even[q] >> 16) & 0xFFFF) | (odd[q] & -0x10000)


def _pair_halves(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of the columns (k, k + 1), and of (k + 8, k + 9) -> bytes of (k, k + 8), and of (k + 1, k + 9).

    The rows' nibbles are code + 8, the tiles' two's complement: they differ in the top bit.
    """
    odd = ((low >> 4) & 0x0F0F0F0F) | (high & -0x0F0F0F10)
    return ((low & 0x0F0F0F0F) | ((high << 4) & -0x0F0F0F10)) ^ -0x77777778, odd ^ -0x77777778


def _interleave_bytes(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Words of bytes a0..a3 and b0..b3 -> words (a0, b0, a2, b2) and (a1, b1, a3, b3)."""
    return (a & 0x00FF00FF) | ((b & 0x00FF00FF) << 8), ((a >> 8) & 0x00FF00FF) | (b & -0x00FF0100)


def unpack_int4_tiles(tiles: Tensor, n: int, k: int) -> Tensor:
    """u8 [..., N16, K64, 512] -> i8 [..., N, K] in [-8, 7]: the inverse of `pack_int4_tiles`."""
    *lead, row_tiles, column_tiles, _ = tiles.shape
    nibbles = torch.stack((tiles & 0xF, tiles >> 4), dim=-1)
    split = nibbles.view(-1, row_tiles, column_tiles, 8, 4, 2, 2, 2, 2, 2)
    # [e, t, j, r, q, u, w, o, s, h] -> [e, t, u, r, j, w, s, h, q, o]
    rows = split.permute(0, 1, 5, 3, 2, 6, 8, 9, 4, 7)
    rows = rows.reshape(*lead, row_tiles * TILE_ROWS, column_tiles * TILE_COLUMNS)
    return ((rows ^ 8).view(torch.int8) - 8)[..., :n, :k].contiguous()


def pack_scales(scales: Tensor, k: int) -> Tensor:
    """bf16 [..., N, K/G] of a matrix of K = `k` columns -> bf16 [..., N16, ceil64(K)/G, 16].

    The last dimension is [r, u]: pairs of the rows r and r + 8. Padding is zero.
    """
    n, groups = scales.shape[-2:]
    group = k // groups
    if group not in (32, 64, 128) or group * groups != k:
        raise ValueError(f"{groups} groups of {k} columns: int4 tiles take groups of 32, 64 or 128")
    padding = (0, -k % TILE_COLUMNS // group, 0, -n % TILE_ROWS)
    padded = functional.pad(scales, padding) if any(padding) else scales
    # [..., t, u, r, g] -> [..., t, g, r, u]
    return padded.unflatten(-2, (-1, 2, 8)).permute(*range(scales.dim() - 2), -4, -1, -2, -3).flatten(-2)


def unpack_scales(packed: Tensor, n: int, groups: int) -> Tensor:
    """bf16 [..., N16, ceil64(K)/G, 16] -> bf16 [..., N, `groups`]: the inverse of `pack_scales`."""
    split = packed.unflatten(-1, (8, 2))  # [..., t, g, r, u] -> [..., t, u, r, g]
    rows = split.permute(*range(packed.dim() - 3), -4, -1, -2, -3).flatten(-4, -2)
    return rows[..., :n, :groups].contiguous()


def dequantize_tiles(tiles: Tensor, packed_scales: Tensor, n: int, k: int, group: int) -> Tensor:
    """The matrix that tiles and scales stand for: f32 [..., N, K]."""
    return dequantize(unpack_int4_tiles(tiles, n, k), unpack_scales(packed_scales, n, k // group))


def interleave_gate_up(rows: Tensor) -> Tensor:
    """[..., 2 I, X], I gate rows, then I up rows -> gate and up interleaved by eights; I is a multiple of 8.

    Applies to weights, packed weights and scales alike.
    """
    return rows.unflatten(-2, (2, -1, 8)).transpose(-4, -3).flatten(-4, -2)


def deinterleave_gate_up(rows: Tensor) -> Tensor:
    """The inverse of `interleave_gate_up`."""
    return rows.unflatten(-2, (-1, 2, 8)).transpose(-4, -3).flatten(-4, -2)
