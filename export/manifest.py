"""manifest.json: what a program says of itself, and the digests that vouch for every byte of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import contract
from .config import ModelConfig
from .errors import ExportError
from .isa import program_isa
from .json_file import read_json_object
from .options import ResolvedOptions
from .quantize import QuantizationConfig

# Bytes a digest covers: a runner checks blocks on several cores at once.
BLOCK_SIZE = 64 << 20
_NO_DIGEST = "0" * 64


class HashingFile:
    """A new binary file whose bytes are hashed on their way out."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self.digests: list[str] = []
        self._file = path.open("xb")
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            block = view[written : written + BLOCK_SIZE - self.size % BLOCK_SIZE]
            self._file.write(block)
            self._hash.update(block)
            written += len(block)
            self.size += len(block)
            if self.size % BLOCK_SIZE == 0:
                self._end_block()
        return written

    def close(self) -> None:
        self._file.close()
        if self.size % BLOCK_SIZE:
            self._end_block()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def entry(self) -> dict[str, Any]:
        """What the manifest says of the file, once closed."""
        return {"size": self.size, "block_size": BLOCK_SIZE, "sha256": self.digests}

    def _end_block(self) -> None:
        self.digests.append(self._hash.hexdigest())
        self._hash = hashlib.sha256()


def describe(
    name: str, config: ModelConfig, options: ResolvedOptions, chat: dict[str, Any], files: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of a program: `files` are the entries of every other file."""
    model = asdict(config)
    sampling = model.pop("sampling")
    return {
        "format_version": contract.FORMAT_VERSION,
        "name": name,
        "model": model,
        "vocab_size": config.vocab_size,
        "target": {"device": options.target, "isa": program_isa(options.target)},
        "versions": {
            "qwen_runner": _version("qwen_runner"),
            "torch": _version("torch"),
            "executorch": _version("executorch"),
            "triton": None,
            "cuda": None,
        },
        "quantization": _quantization(options.quantization, options.target),
        "dtype": options.dtype,
        "max_seq_len": options.max_seq_len,
        "chunk": options.chunk,
        "slots": options.slots,
        "batch": options.batch,
        "eos_token_ids": list(config.eos_token_ids),
        "sampling": sampling,
        "chat": chat,
        "files": files,
    }


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Writes `manifest` with its own digest as the last key: that of the file with zeros in its place."""
    text = json.dumps(manifest | {"manifest_sha256": _NO_DIGEST}, indent=2, ensure_ascii=False) + "\n"
    # The name of a folder, which is the program's, need not be Unicode.
    data = text.encode(errors="replace")
    before, _, after = data.rpartition(_NO_DIGEST.encode())
    path.write_bytes(before + hashlib.sha256(data).hexdigest().encode() + after)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a program of this format.

    Raises:
        ExportError: no such file, damaged, or of another format.
    """
    manifest = read_json_object(path, "copy or export the program again").values
    digest = manifest.get("manifest_sha256")
    if not isinstance(digest, str) or len(digest) != len(_NO_DIGEST):
        raise ExportError(f"{path}: has no digest; it is not a program's, or damaged")
    before, _, after = path.read_bytes().rpartition(digest.encode())
    if hashlib.sha256(before + _NO_DIGEST.encode() + after).hexdigest() != digest:
        raise ExportError(f"{path}: does not match its own digest; copy or export the program again")
    if manifest.get("format_version") != contract.FORMAT_VERSION:
        raise ExportError(
            f"{path}: program format {manifest.get('format_version')}, this version reads "
            f"{contract.FORMAT_VERSION}; export the checkpoint itself"
        )
    return manifest


def _quantization(config: QuantizationConfig, target: str) -> dict[str, Any]:
    if config.scheme == "none":
        return {"scheme": "none"}
    layout = {"layout": contract.INT4_TILES} if target == contract.CUDA else {}
    return asdict(config) | {"embedding": "int8"} | layout


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return None
