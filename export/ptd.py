"""The .ptd, ExecuTorch's FlatTensor format: read and written one weight at a time, however large the file.

A header, a flatbuffer that says where each weight is, then the weights. ExecuTorch's own serializer wants all
of it in memory; its schema, header and flatbuffer compiler are what is used here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from executorch.exir._serialize._program import _insert_flatbuffer_header
from executorch.exir._serialize.padding import aligned_size, pad_to
from executorch.exir.scalar_type import ScalarType
from executorch.exir.tensor import scalar_type_enum
from executorch.exir.tensor_layout import TensorLayout
from executorch.extension.flat_tensor.serialize.flat_tensor_schema import DataSegment, FlatTensor, NamedData
from executorch.extension.flat_tensor.serialize.serialize import (
    _FLAT_TENSOR_VERSION,
    _FLATBUFFER_ALIGNMENT,
    FlatTensorConfig,
    FlatTensorHeader,
    _deserialize_to_flat_tensor,
    _serialize_to_flatbuffer,
)
from torch import Tensor

from . import contract
from .errors import ExportError

_ALIGNMENT = math.lcm(FlatTensorConfig().segment_alignment, contract.WEIGHT_ALIGNMENT)
_MAGIC = r"FT[0-9a-zA-Z][0-9a-zA-Z]"
_HEADER_BEGIN = 8  # behind the flatbuffer's root offset and its magic
_DTYPES = (torch.uint8, torch.int8, torch.int64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Weight:
    """What is known of a weight before its data is."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Sink(Protocol):
    def write(self, data: memoryview) -> int: ...


class Layout:
    """Where each of `weights` is in a file of all of them, in this order.

    size: of the file, in bytes.
    """

    def __init__(self, weights: Iterable[Weight]) -> None:
        self.weights = tuple(weights)
        segments: list[DataSegment] = []
        end = 0
        for weight in self.weights:
            segments.append(DataSegment(offset=aligned_size(end, _ALIGNMENT), size=weight.nbytes))
            end = segments[-1].offset + segments[-1].size
        named = [
            NamedData(key=weight.name, segment_index=index, tensor_layout=_tensor_layout(weight))
            for index, weight in enumerate(self.weights)
        ]
        table = bytes(_serialize_to_flatbuffer(FlatTensor(_FLAT_TENSOR_VERSION, segments, named)))
        header_size = aligned_size(FlatTensorHeader.EXPECTED_LENGTH, _FLATBUFFER_ALIGNMENT)
        base = aligned_size(header_size + len(table), FlatTensorConfig().segment_alignment)
        header = FlatTensorHeader(
            flatbuffer_offset=header_size,
            flatbuffer_size=len(table),
            segment_base_offset=base,
            segment_data_size=end,
        )
        with_header = _insert_flatbuffer_header(
            flatbuffer_data=table, magic_regex=_MAGIC, header_data=pad_to(header.to_bytes(), header_size)
        )
        self._head = pad_to(with_header, base)
        self._offsets = [base + segment.offset for segment in segments]
        self.size = base + end

    def write(self, sink: _Sink, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Writes the file. `tensors`: all of the weights with their data, in order, let go one by one."""
        position = sink.write(memoryview(self._head))
        expected = zip(self.weights, self._offsets, strict=True)
        for (name, tensor), (weight, offset) in zip(tensors, expected, strict=True):
            given = Weight(name, tensor.dtype, tuple(tensor.shape))
            assert given == weight, f"{given} came where {weight} belongs"
            position += sink.write(memoryview(bytes(offset - position)))
            position += sink.write(_bytes_of(tensor))


class WeightsFile:
    """The weights of an existing .ptd, each mapped into memory when asked for, on its own.

    Raises:
        ExportError: the file is no .ptd, or cut short.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_HEADER_BEGIN + FlatTensorHeader.EXPECTED_LENGTH)
            if len(start) < _HEADER_BEGIN + FlatTensorHeader.EXPECTED_LENGTH:
                raise self._damaged()
            header = FlatTensorHeader.from_bytes(start[_HEADER_BEGIN:])
            end = header.segment_base_offset + header.segment_data_size
            if not header.is_valid() or end > size:
                raise self._damaged()
            file.seek(0)
            table = _deserialize_to_flat_tensor(file.read(header.flatbuffer_offset + header.flatbuffer_size))
        self._entries: dict[str, tuple[Weight, int]] = {}
        dtypes = {scalar_type_enum(dtype): dtype for dtype in _DTYPES}
        for named in table.named_data:
            layout, segment = named.tensor_layout, table.segments[named.segment_index]
            if layout is None or ScalarType(layout.scalar_type) not in dtypes:
                raise self._damaged()
            weight = Weight(named.key, dtypes[ScalarType(layout.scalar_type)], tuple(layout.sizes))
            if weight.nbytes != segment.size or segment.offset + segment.size > header.segment_data_size:
                raise self._damaged()
            self._entries[named.key] = (weight, header.segment_base_offset + segment.offset)

    @property
    def weights(self) -> dict[str, Weight]:
        return {name: weight for name, (weight, _) in self._entries.items()}

    def tensor(self, name: str) -> Tensor:
        """The weight `name`, which must be among `weights`, read from the file as it is used."""
        weight, offset = self._entries[name]
        data = np.memmap(self.path, np.uint8, "r", offset, (weight.nbytes,))
        return torch.from_numpy(data).view(weight.dtype).view(weight.shape)

    def _damaged(self) -> ExportError:
        return ExportError(f"{self.path}: damaged; export or copy the program again")


def weights_of(name: str, part: torch.nn.Module | torch.nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model's part `name`, by fully qualified name."""
    if isinstance(part, torch.nn.Parameter):
        yield name, part.detach()
    else:
        for key, parameter in part.named_parameters(prefix=name):
            yield key, parameter.detach()


def _tensor_layout(weight: Weight) -> TensorLayout:
    return TensorLayout(scalar_type_enum(weight.dtype), list(weight.shape), list(range(len(weight.shape))))


def _bytes_of(tensor: Tensor) -> memoryview:
    plain = tensor.cpu().contiguous()
    return plain.view(-1).view(torch.uint8).numpy().data
