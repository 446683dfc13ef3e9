"""The .ptd: what ExecuTorch would have written, byte for byte, and what its own reader makes of it."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.exir._serialize._cord import Cord
from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
from executorch.exir.tensor_layout import TensorLayout
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer
from qwen_runner.export import ExportError, contract
from qwen_runner.export.ptd import Layout, Weight, WeightsFile
from torch import Tensor


def random_weights() -> dict[str, Tensor]:
    """Of every type, of sizes that fill no alignment."""
    generator = torch.Generator().manual_seed(7)
    shapes = {"z.bytes": (3, 5, 7), "a.norm": (33,), "one": (1, 64), "column": (4, 1), "b.tiles": (2, 3, 512)}
    dtypes = (torch.uint8, torch.bfloat16, torch.float32, torch.int8, torch.uint8)
    return {
        name: (torch.randn(shape, generator=generator) * 50).to(dtype)
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)
    }


def layout_of(weights: dict[str, Tensor]) -> Layout:
    return Layout(Weight(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items())


def written(weights: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    layout_of(weights).write(file, iter(weights.items()))
    return file.getvalue()


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def executorchs(weights: dict[str, Tensor]) -> bytes:
    entries = {
        name: DataEntry(index, contract.WEIGHT_ALIGNMENT, TensorLayout.from_tensor(tensor))
        for index, (name, tensor) in enumerate(weights.items())
    }
    payload = DataPayload([raw(tensor) for tensor in weights.values()], entries)
    return bytes(FlatTensorSerializer().serialize(payload))


def test_the_bytes_are_executorchs() -> None:
    weights = random_weights()
    data = written(weights)
    assert data == executorchs(weights)
    assert len(data) == layout_of(weights).size


def test_executorchs_reader_finds_every_weight() -> None:
    weights = random_weights()
    payload = FlatTensorSerializer().deserialize(Cord(written(weights)))
    assert list(payload.named_data) == list(weights)
    for name, entry in payload.named_data.items():
        assert payload.buffers[entry.buffer_index] == raw(weights[name])
        assert entry.tensor_layout == TensorLayout.from_tensor(weights[name])


def test_weights_are_read_back(tmp_path: Path) -> None:
    weights = random_weights()
    (tmp_path / "model.ptd").write_bytes(written(weights))
    file = WeightsFile(tmp_path / "model.ptd")
    assert list(file.weights) == list(weights)
    for name, tensor in weights.items():
        assert torch.equal(file.tensor(name), tensor)
        assert file.tensor(name).dtype == tensor.dtype


def test_a_file_may_be_larger_than_4_gib(tmp_path: Path) -> None:
    """Sparse on the disk: 6 GiB of zeros between what is written."""

    class Sparse:
        def __init__(self, path: Path) -> None:
            self.file = path.open("wb")

        def write(self, data: memoryview) -> int:
            if len(data) > 1 << 20:
                self.file.seek(len(data), io.SEEK_CUR)
            else:
                self.file.write(data)
            return len(data)

    large = torch.from_numpy(np.memmap(tmp_path / "zeros", np.uint8, "w+", shape=(3, 1 << 30)))
    last = torch.arange(256, dtype=torch.uint8)
    weights = {"first": large, "second": large, "last": last}
    sink = Sparse(tmp_path / "model.ptd")
    layout_of(weights).write(sink, weights.items())
    sink.file.close()
    assert (tmp_path / "model.ptd").stat().st_size == layout_of(weights).size > 6 << 30
    file = WeightsFile(tmp_path / "model.ptd")
    assert torch.equal(file.tensor("last"), last)
    assert file.tensor("second").shape == (3, 1 << 30)


@pytest.mark.parametrize("change", ["other", "missing", "surplus", "misshapen"])
def test_only_the_weights_of_the_layout_are_written(change: str) -> None:
    weights = random_weights()
    layout, given = layout_of(weights), list(weights.items())
    if change == "other":
        given[1] = ("another", given[1][1])
    elif change == "missing":
        del given[-1]
    elif change == "surplus":
        given.append(("one_more", torch.zeros(3)))
    else:
        given[0] = (given[0][0], given[0][1].flatten())
    with pytest.raises((AssertionError, ValueError)):
        layout.write(io.BytesIO(), given)


@pytest.mark.parametrize("length", [0, 20, 100, 2000, -1])
def test_a_cut_file_is_damaged(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.ptd"
    path.write_bytes(written(random_weights())[:length])
    with pytest.raises(ExportError, match="damaged"):
        WeightsFile(path)


def test_another_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.ptd"
    path.write_bytes(bytes(10_000))
    with pytest.raises(ExportError, match="damaged"):
        WeightsFile(path)
