"""From a checkpoint folder to a program folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from executorch.exir import ExecutorchProgramManager
from qwen_runner import _core
from qwen_runner.chat_jinja import ChatTemplate

from . import contract
from .chat_template import derive_chat_pieces
from .checkpoint import Checkpoint
from .config import ModelConfig
from .errors import ExportError
from .json_file import read_json_object
from .lower import STAGES as LOWER_STAGES
from .lower import lower
from .manifest import HashingFile, describe, write_manifest
from .model import Model
from .options import ExportOptions, ResolvedOptions
from .staging import staged_folder
from .weights import CheckpointWeights

READ, CHAT, WRITE = "read the weights", "derive the chat pieces", "write the program"
STAGES = (READ, CHAT, *LOWER_STAGES, WRITE)


def write_program(
    checkpoint_path: Path,
    output: Path,
    options: ExportOptions,
    begin: Callable[[str], None],
    note: Callable[[str], None] = lambda detail: None,
) -> None:
    """Exports the checkpoint into the folder `output`, replacing a program that is there.

    `begin` is called with each of `STAGES` as it begins, `note` with how far a long one is.

    Raises:
        ExportError: a checkpoint, an option or an output folder that will not do.
        OSError: `output` cannot be written; what was there before still is.
    """
    output = output.resolve()
    _check_replaceable(output)
    _check_compiler()
    with Checkpoint(checkpoint_path) as checkpoint:
        config = checkpoint.config
        resolved = options.resolved(config)
        template = _load_template(checkpoint_path)
        texts = _read_texts(checkpoint_path, template)
        # Staged before the work, which takes minutes, so that a folder that cannot be written is found first.
        with staged_folder(output) as stage:
            begin(READ)
            model = _read_model(checkpoint, resolved, note)
            begin(CHAT)
            chat = _chat(template, texts[contract.TOKENIZER_FILE])
            with _compiler_cache(stage.scratch):
                program = lower(
                    model, chunk=resolved.chunk, metadata=_metadata(config, resolved), on_stage=begin
                )
            begin(WRITE)
            files = _write_files(stage.content, program, texts)
            manifest = describe(checkpoint_path.resolve().name, config, resolved, chat, files)
            write_manifest(stage.content / contract.MANIFEST_FILE, manifest)


def _read_model(checkpoint: Checkpoint, options: ResolvedOptions, note: Callable[[str], None]) -> Model:
    dtype: torch.dtype = getattr(torch, options.dtype)
    layers = len(checkpoint.config.layer_types)
    return Model(
        checkpoint.config,
        CheckpointWeights(checkpoint, options.quantization, dtype),
        slots=options.slots,
        max_seq_len=options.max_seq_len,
        dtype=dtype,
        on_layer=lambda layer: note(f"layer {layer + 1} of {layers}"),
    )


def _metadata(config: ModelConfig, options: ResolvedOptions) -> dict[str, int]:
    """What the .pte says of itself, for the runner to compare with the manifest."""
    return {
        "format_version": contract.FORMAT_VERSION,
        "vocab_size": config.vocab_size,
        "max_seq_len": options.max_seq_len,
        "chunk": options.chunk,
        "slots": options.slots,
    }


def _write_files(folder: Path, program: ExecutorchProgramManager, texts: dict[str, bytes]) -> dict[str, Any]:
    """Writes all files but the manifest, `texts` by name among them; their entries in it."""
    files = {}
    with HashingFile(folder / contract.PROGRAM_FILE) as file:
        program.write_to_file(file)
    files[contract.PROGRAM_FILE] = file.entry()
    (cord,) = program._tensor_data.values()
    with HashingFile(folder / contract.WEIGHTS_FILE) as file:
        cord.write_to_file(file)
    files[contract.WEIGHTS_FILE] = file.entry()
    for name, text in texts.items():
        with HashingFile(folder / name) as file:
            file.write(text)
        files[name] = file.entry()
    return files


def _load_template(checkpoint: Path) -> ChatTemplate | None:
    try:
        return ChatTemplate.load(checkpoint)
    except ValueError as error:
        raise ExportError(str(error)) from error


def _read_texts(checkpoint: Path, template: ChatTemplate | None) -> dict[str, bytes]:
    """The files, by name, that a program takes from its checkpoint; the runner can load their tokenizer."""
    path = checkpoint / contract.TOKENIZER_FILE
    if not path.is_file():
        raise ExportError(f"{path}: no such file; a fast tokenizer (tokenizers' own format) is needed")
    read_json_object(path)
    try:
        _core.Tokenizer(str(path))
    except RuntimeError as error:
        raise ExportError(str(error)) from error
    texts = {contract.TOKENIZER_FILE: path.read_bytes()}
    config = checkpoint / contract.TOKENIZER_CONFIG_FILE
    if config.is_file():
        texts[contract.TOKENIZER_CONFIG_FILE] = config.read_bytes()
    if template is not None:
        texts[contract.CHAT_TEMPLATE_FILE] = template.text.encode()
    return texts


def _chat(template: ChatTemplate | None, tokenizer: bytes) -> dict[str, Any]:
    added = [str(token["content"]) for token in json.loads(tokenizer).get("added_tokens") or []]
    text, special = (None, None) if template is None else (template.text, template.special_tokens)
    return derive_chat_pieces(text, added_tokens=added, special_tokens=special).to_json()


def _check_replaceable(output: Path) -> None:
    """Only an empty folder or a program may be replaced: anything else holds what is not ours to delete."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ExportError(f"{output}: it is a file; give the folder that the program shall be")
    names = {path.name for path in output.iterdir()}
    if not names:
        return
    try:
        manifest = json.loads((output / contract.MANIFEST_FILE).read_bytes())
        own = {contract.MANIFEST_FILE, *manifest["files"]}
        is_program = "format_version" in manifest and contract.PROGRAM_FILE in own
    except (OSError, ValueError, TypeError, KeyError):
        own, is_program = set(), False
    if not is_program:
        raise ExportError(f"{output}: the folder is not empty and no program; give another, or remove it")
    foreign = sorted(names - own)
    if foreign:
        raise ExportError(f"{output}: {foreign[0]} is no part of the program there; move it away first")


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ExportError(f"no C++ compiler {compiler}; install one (apt install g++), or set CXX")


@contextmanager
def _compiler_cache(folder: Path) -> Iterator[None]:
    """Has Inductor keep its files in `folder`: no two exports compile the same code."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(variable)
    os.environ[variable] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
