"""Reads the weights of a Hugging Face checkpoint, shard by shard and one tensor at a time.

Names are those of transformers' text model, whatever layout the files have. Opening a checkpoint matches all
tensors of all files' headers against the tables of `tensor_table`; data is read only when asked for.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from .config import ModelConfig, load_config
from .errors import ExportError
from .json_file import read_json_object
from .tensor_table import (
    DTYPES,
    EMBEDDING,
    HEAD,
    LAYER_TENSORS,
    MODEL_TENSORS,
    SKIPPED_PREFIXES,
    Shape,
    TensorSpec,
    file_names,
    layer_prefix,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Entry:
    """A tensor as a file's header declares it."""

    file: Path
    shape: Shape
    dtype: str  # of safetensors: "BF16"


@dataclass(frozen=True)
class _Source:
    """Where a tensor comes from: one entry, or `parts` by `experts` of them, expert by expert."""

    names: tuple[str, ...]
    shape: Shape
    parts: int = 0  # entries an expert; 0: stored whole


class Checkpoint:
    """The weights of a checkpoint folder: a context manager, for one thread.

    path: the folder.
    config: its configuration, read from it unless given.

    Raises:
        ExportError: what `load_config` raises; a missing or corrupt file; a missing, unexpected or misshapen
            tensor; a dtype other than float32, bfloat16 and float16.
    """

    def __init__(self, path: Path, config: ModelConfig | None = None) -> None:
        self.path = path
        self.config = config or load_config(path)
        self._entries = _read_headers(path)
        self._sources = self._match()
        self._open_file: Path | None = None
        self._open_shard: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the open file; tensors read stay valid."""
        self._open_file = self._open_shard = None

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding: then `lm_head.weight` is not among the names."""
        return self.config.tie_word_embeddings

    def names(self) -> list[str]:
        """Every tensor's name: the embedding, layer after layer, the final norm, the head."""
        return list(self._sources)

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of one layer, keyed by their names within it; see `tensor`."""
        prefix = layer_prefix(index)
        return {
            spec.name: self.tensor(prefix + spec.name)
            for spec in LAYER_TENSORS
            if spec.layer_type in (None, self.config.layer_types[index])
        }

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, one of `names()`, in the checkpoint's dtype; memory-mapped if stored whole.

        Raises:
            ExportError: it cannot be read, holds a value that is not finite, or is the embedding of a tied
                head and the checkpoint has another head.
        """
        source = self._sources[name]
        tensor = self._read(source)
        # A sum meets every value once and makes no copy; it is not finite if any of them is not.
        if not math.isfinite(tensor.sum(dtype=torch.float32).item()):
            raise ExportError(f"{self.path}: tensor {name} holds NaN or infinite values; download it again")
        if (
            name == EMBEDDING
            and self.tied
            and HEAD in self._entries
            and not torch.equal(tensor, self._load(HEAD))
        ):
            raise ExportError(
                f"{self.path}: {HEAD} differs from {EMBEDDING} though tie_word_embeddings is true; "
                "set it to false in config.json to use both"
            )
        return tensor

    def _read(self, source: _Source) -> torch.Tensor:
        if not source.parts:
            return self._load(source.names[0])
        rows = source.shape[1] // source.parts
        stacked = torch.empty(source.shape, dtype=self._load(source.names[0]).dtype)
        for index, name in enumerate(source.names):
            expert, part = divmod(index, source.parts)
            stacked[expert, part * rows : (part + 1) * rows] = self._load(name)
        return stacked

    def _load(self, name: str) -> torch.Tensor:
        file = self._entries[name].file
        try:
            if file != self._open_file:
                self.close()
                self._open_shard, self._open_file = safe_open(file, framework="pt"), file
            return self._open_shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{file}: tensor {name} cannot be read ({error}); download it again") from None

    def _match(self) -> dict[str, _Source]:
        """Finds every needed tensor's source; fails if one is missing or a file's tensor is left over."""
        sources: dict[str, _Source] = {}
        embedding, final_norm, head = MODEL_TENSORS
        sources[embedding.name] = self._find(embedding, "")
        for index, layer_type in enumerate(self.config.layer_types):
            prefix = layer_prefix(index)
            for spec in LAYER_TENSORS:
                if spec.layer_type in (None, layer_type):
                    sources[prefix + spec.name] = self._find(spec, prefix)
        sources[final_norm.name] = self._find(final_norm, "")
        tied_head = {HEAD} if self.tied else set()
        if not self.tied or HEAD in self._entries:
            head_source = self._find(head, "")
            if not self.tied:
                sources[head.name] = head_source

        used = tied_head.union(*(source.names for source in sources.values()))
        for name, entry in self._entries.items():
            if name not in used and not name.startswith(SKIPPED_PREFIXES):
                raise ExportError(
                    f"{entry.file}: unexpected tensor {name} of shape {list(entry.shape)}; "
                    "config.json describes a model without it, so one of the two files is wrong"
                )
        return sources

    def _find(self, spec: TensorSpec, prefix: str) -> _Source:
        """The source of `spec` in the layer `layer_prefix`, its shapes and dtype checked."""
        name = prefix + spec.name
        shape = spec.shape(self.config)
        for candidate in file_names(name):
            if candidate in self._entries:
                self._check(candidate, shape)
                return _Source((candidate,), shape)
        if not spec.parts:
            raise self._missing(name)

        part_shape = (shape[1] // len(spec.parts), shape[2])
        names: list[str] = []
        for expert in range(self.config.num_experts):
            for part in spec.parts:
                part_name = prefix + part.format(expert=expert)
                found = next((n for n in file_names(part_name) if n in self._entries), None)
                if found is None:
                    raise self._missing(name if not names else part_name, parts=not names)
                self._check(found, part_shape)
                names.append(found)
        dtypes = {self._entries[n].dtype for n in names}
        if len(dtypes) > 1:
            raise ExportError(
                f"{self.path}: the experts of {name} have dtypes {sorted(dtypes)}; expected one"
            )
        return _Source(tuple(names), shape, len(spec.parts))

    def _check(self, name: str, shape: Shape) -> None:
        entry = self._entries[name]
        if entry.shape != shape:
            raise ExportError(
                f"{entry.file}: tensor {name} has shape {list(entry.shape)}, "
                f"expected {list(shape)} by config.json"
            )
        if entry.dtype not in DTYPES:
            raise ExportError(
                f"{entry.file}: tensor {name} has dtype {entry.dtype}, expected {', '.join(DTYPES)}"
            )

    def _missing(self, name: str, parts: bool = False) -> ExportError:
        layouts = ", fused or expert by expert" if parts else ""
        return ExportError(f"{self.path}: tensor {name} is missing{layouts}; download the checkpoint again")


def _read_headers(path: Path) -> dict[str, _Entry]:
    """Every tensor that the files of the folder `path` declare."""
    if (path / SINGLE_FILE).exists():
        return _read_header(path / SINGLE_FILE)
    index_path = path / INDEX_FILE
    if not index_path.exists():
        raise ExportError(
            f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors checkpoints are supported"
        )
    weight_map = read_json_object(index_path).section("weight_map").values
    entries: dict[str, _Entry] = {}
    for file in sorted({str(file) for file in weight_map.values()}):
        if Path(file).name != file:
            raise ExportError(f"{index_path}: weight_map names {file!r}; expected a file of the same folder")
        for name, entry in _read_header(path / file).items():
            if weight_map.get(name) != file:
                raise ExportError(
                    f"{entry.file}: unexpected tensor {name}; {index_path.name} does not place it there"
                )
            entries[name] = entry
    for name in weight_map:
        if name not in entries:
            raise ExportError(
                f"{path / weight_map[name]}: tensor {name} is missing, though {INDEX_FILE} names it"
            )
    return entries


def _read_header(file: Path) -> dict[str, _Entry]:
    try:
        with safe_open(file, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.offset_keys()}
            return {n: _Entry(file, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except FileNotFoundError:
        raise ExportError(f"{file}: no such file; the checkpoint is incomplete, download it again") from None
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{file}: not a whole safetensors file ({error}); download it again") from None
