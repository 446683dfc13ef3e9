"""An existing program as a source: its packed weights and its configuration, to be compiled anew."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from . import contract
from .config import ModelConfig, SamplingDefaults
from .errors import ExportError
from .manifest import read_manifest
from .options import ExportOptions, flag
from .ptd import Layout, WeightsFile
from .tokenizer_files import NAMES as TOKENIZER_FILES

# Other options say how weights are packed, and packed they are.
_FREE = ("max_seq_len", "chunk", "slots", "batch")


class PackedProgram:
    """The program in `folder`, its small files checked: `check_weights` does that for the weights.

    Raises:
        ExportError: a file is damaged or no part of the program, or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._manifest = read_manifest(folder / contract.MANIFEST_FILE)
        try:
            self.name = str(self._manifest["name"])
            model = self._manifest["model"]
            tuples = {key: tuple(model[key]) for key in ("layer_types", "eos_token_ids")}
            sampling = SamplingDefaults(**self._manifest["sampling"])
            self.config = ModelConfig(**(model | tuples | {"sampling": sampling}))
            self._options = self._read_options()
            files = self._manifest["files"]
            self._weights_entry = files[contract.WEIGHTS_FILE]
            for name in TOKENIZER_FILES:
                self._check_file(name, files.get(name))
        except (KeyError, TypeError) as error:
            raise ExportError(
                f"{folder / contract.MANIFEST_FILE}: lacks a value or has one of the wrong type ({error}); "
                "export the checkpoint again with this version"
            ) from None

    def options(self, given: dict[str, Any]) -> ExportOptions:
        """The program's options, with those of `given` in their place.

        Raises:
            ExportError: one of them would need other weights.
        """
        given = {name: value for name, value in given.items() if value is not None}
        ExportOptions(**given)
        for name, value in given.items():
            if name in _FREE:
                continue
            if name not in self._options:
                raise ExportError(
                    f"{flag(name)} {value}: it has no effect, {self.path} is not quantized; leave it out"
                )
            if value != self._options[name]:
                raise ExportError(
                    f"{flag(name)} {value}: {self.path} has {self._options[name]}, packed; "
                    "export the checkpoint itself to change it"
                )
        merged = self._options | {name: given[name] for name in _FREE if name in given}
        if "chunk" not in given:
            merged["chunk"] = min(merged["chunk"], merged["max_seq_len"])
        if "slots" in given and "batch" not in given:
            merged["batch"] = None  # the default for as many
        return ExportOptions(**merged)

    def check_weights(self, layout: Layout, note: Callable[[str], None]) -> None:
        """Reads the whole file of the weights.

        Raises:
            ExportError: it is damaged, or its weights are not those of `layout`.
        """
        path = self.path / contract.WEIGHTS_FILE
        note("digests of the weights")
        _verify(path, self._weights_entry)
        found = WeightsFile(path).weights
        for weight in layout.weights:
            if found.get(weight.name) != weight:
                raise ExportError(
                    f"{path}: has no {weight.name} of shape {list(weight.shape)}; it is of another version, "
                    "export the checkpoint again"
                )

    def weights(self, layout: Layout, note: Callable[[str], None]) -> Iterator[tuple[str, Tensor]]:
        """The weights of `layout`, each mapped as it is asked for. REQUIRES: `check_weights`."""
        file = WeightsFile(self.path / contract.WEIGHTS_FILE)
        note("copying")
        return ((weight.name, file.tensor(weight.name)) for weight in layout.weights)

    def _check_file(self, name: str, entry: dict[str, Any] | None) -> None:
        path = self.path / name
        if entry is not None:
            _verify(path, entry)
        elif path.exists():
            raise ExportError(
                f"{path}: it is no part of the program, whose manifest does not list it; move it away first"
            )

    def _read_options(self) -> dict[str, Any]:
        manifest, quantization = self._manifest, self._manifest["quantization"]
        options = {name: manifest[name] for name in ("dtype", "max_seq_len", "chunk", "slots")}
        options["batch"] = manifest.get("batch")  # programs of before there were batches have none
        options |= {"target": manifest["target"]["device"], "quantize": quantization["scheme"]}
        if quantization["scheme"] != "none":
            options |= {"group_size": quantization["group_size"], "quantize_method": quantization["method"]}
            options["head"] = quantization["head"]
        expected = contract.INT4_TILES if options["target"] == contract.CUDA else None
        if quantization.get("layout") != expected:
            raise ExportError(
                f"{self.path}: its weights have the layout {quantization.get('layout')}, this version's is "
                f"{expected}; export the checkpoint again"
            )
        return options


def _verify(path: Path, entry: dict[str, Any]) -> None:
    """Raises ExportError unless the file has the size and the digests that `entry` says."""
    block_size, digests = entry["block_size"], entry["sha256"]

    def is_intact(block: int) -> bool:
        with path.open("rb") as file:
            file.seek(block * block_size)
            return hashlib.sha256(file.read(block_size)).hexdigest() == digests[block]

    intact = path.is_file() and path.stat().st_size == entry["size"]
    if intact:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            intact = all(pool.map(is_intact, range(len(digests))))
    if not intact:
        raise ExportError(
            f"{path}: does not match its digests; the program is damaged, copy or export it again"
        )
