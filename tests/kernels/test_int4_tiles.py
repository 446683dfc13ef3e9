"""The tile layout of int4 weights on CUDA."""

import pytest
import torch
from qwen_runner.kernels.linear import int4_tiles
from qwen_runner.kernels.linear.reference import dequantize, pack_int4

SHAPES = [(16, 64), (1, 32), (33, 96), (100, 256), (3, 40, 160), (2, 2, 17, 32)]


def _codes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)


def _code_of(tiles: torch.Tensor, row: int, column: int) -> int:
    """As cuda/types.h describes the layout, bit by bit."""
    lane = 4 * (row % 8) + column % 8 // 2
    word = 2 * (row % 16 // 8) + column % 64 // 32
    at = lane * 16 + word * 4
    bits = int.from_bytes(bytes(tiles[row // 16, column // 64, at : at + 4].tolist()), "little")
    within = column % 32
    nibble = 2 * (within // 16) + within % 16 // 8 + 4 * (within % 2)
    unsigned = bits >> (4 * nibble) & 0xF
    return unsigned - 16 if unsigned > 7 else unsigned


def test_a_code_is_where_the_kernels_look_for_it(generator: torch.Generator) -> None:
    codes = _codes((24, 96), generator)
    tiles = int4_tiles.pack_int4_tiles(codes)
    assert tiles.shape == (2, 2, 512)
    found = [[_code_of(tiles, row, column) for column in range(128)] for row in range(32)]
    assert torch.equal(torch.tensor(found, dtype=torch.int8)[:24, :96], codes)
    assert not torch.tensor(found)[24:].any()
    assert not torch.tensor(found)[:, 96:].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_survive_packing(generator: torch.Generator, shape: tuple[int, ...]) -> None:
    codes = _codes(shape, generator)
    tiles = int4_tiles.pack_int4_tiles(codes)
    assert torch.equal(int4_tiles.unpack_int4_tiles(tiles, *shape[-2:]), codes)


@pytest.mark.parametrize("shape", [*SHAPES, (1000, 2080)], ids=str)
def test_rows_of_a_program_become_the_same_tiles(
    generator: torch.Generator, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = _codes(shape, generator)
    tiles = int4_tiles.pack_int4_tiles(codes)
    assert torch.equal(int4_tiles.tiles_of_rows(pack_int4(codes)), tiles)
    monkeypatch.setattr(int4_tiles, "_CHUNK_BYTES", 1 << 12)
    out = torch.full_like(tiles, 0xFF)
    assert int4_tiles.tiles_of_rows(pack_int4(codes), out) is out
    assert torch.equal(out, tiles)


@pytest.mark.parametrize(
    ("shape", "group"), [((16, 64), 32), ((33, 96), 32), ((3, 40, 192), 64), ((17, 256), 128)], ids=str
)
def test_scales_survive_packing(generator: torch.Generator, shape: tuple[int, ...], group: int) -> None:
    k = shape[-1]
    scales = torch.rand((*shape[:-1], k // group), generator=generator).bfloat16()
    packed = int4_tiles.pack_scales(scales, k)
    assert packed.shape == (*shape[:-2], -(-shape[-2] // 16), -(-k // 64) * 64 // group, 16)
    assert packed.is_contiguous()
    row = min(9, shape[-2] - 1)
    assert torch.equal(packed[..., row // 16, 1, row % 8 * 2 + row // 8 % 2], scales[..., row, 1])
    assert torch.equal(int4_tiles.unpack_scales(packed, shape[-2], k // group), scales)
    codes = _codes(shape, generator)
    dense = int4_tiles.dequantize_tiles(int4_tiles.pack_int4_tiles(codes), packed, *shape[-2:], group)
    assert torch.equal(dense, dequantize(codes, scales))


def test_gate_and_up_are_interleaved_by_eights() -> None:
    rows = torch.arange(32)[:, None].expand(2, 32, 3)
    interleaved = int4_tiles.interleave_gate_up(rows)
    expected = [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
    assert interleaved[1, :, 2].tolist() == expected
    assert torch.equal(int4_tiles.deinterleave_gate_up(interleaved), rows)


def test_shapes_without_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        int4_tiles.tiles_of_rows(torch.zeros(16, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="groups of 32"):
        int4_tiles.pack_scales(torch.zeros(16, 4, dtype=torch.bfloat16), 64)
    with pytest.raises(ValueError, match="out must be"):
        int4_tiles.tiles_of_rows(torch.zeros(16, 16, dtype=torch.uint8), torch.zeros(1, 1, 512))
