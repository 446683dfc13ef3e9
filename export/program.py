"""From a checkpoint folder to a program folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from executorch.exir import ExecutorchProgramManager

from qwen_runner.chat_jinja import ChatTemplate

from . import contract
from .chat_template import derive_chat_pieces
from .checkpoint import Checkpoint
from .errors import ExportError
from .json_file import read_json_object
from .lower import STAGES as LOWER_STAGES
from .lower import lower
from .manifest import HashingFile, describe, write_manifest
from .model import Model
from .options import ExportOptions
from .staging import staged_folder
from .weights import CheckpointWeights

READ, CHAT, WRITE = "read the weights", "derive the chat pieces", "write the program"
STAGES = (READ, CHAT, *LOWER_STAGES, WRITE)


def write_program(
    checkpoint_path: Path, output: Path, options: ExportOptions, begin: Callable[[str], None]
) -> None:
    """Exports the checkpoint into the folder `output`, replacing a program that is there.

    `begin` is called with each of `STAGES` as it begins.

    Raises:
        ExportError: a checkpoint, an option or an output folder that will not do.
        OSError: `output` cannot be written; what was there before still is.
    """
    output = output.resolve()
    _check_replaceable(output)
    _check_compiler()
    with Checkpoint(checkpoint_path) as checkpoint:
        config = checkpoint.config
        options = options.resolved(config)
        tokenizer = _read_tokenizer(checkpoint_path)
        begin(READ)
        dtype = getattr(torch, str(options.dtype))
        model = Model(
            config,
            CheckpointWeights(checkpoint, options.quantization, dtype),
            slots=options.slots,
            max_seq_len=options.max_seq_len or 0,
            dtype=dtype,
        )
    begin(CHAT)
    template = ChatTemplate.load(checkpoint_path)
    chat = _chat(template, tokenizer)
    metadata = {
        "format_version": contract.FORMAT_VERSION,
        "vocab_size": config.vocab_size,
        "max_seq_len": options.max_seq_len or 0,
        "chunk": options.chunk or 0,
        "slots": options.slots,
    }
    with _compiler_cache():
        program = lower(model, chunk=options.chunk or 0, metadata=metadata, on_stage=begin)
    begin(WRITE)
    with staged_folder(output) as folder:
        files = _write_files(folder, program, tokenizer, template)
        name = checkpoint_path.resolve().name
        write_manifest(folder / contract.MANIFEST_FILE, describe(name, config, options, chat, files))


def _write_files(
    folder: Path, program: ExecutorchProgramManager, tokenizer: bytes, template: ChatTemplate | None
) -> dict[str, Any]:
    """Writes all files but the manifest; their entries in it."""
    files = {}
    with HashingFile(folder / contract.PROGRAM_FILE) as file:
        program.write_to_file(file)
    files[contract.PROGRAM_FILE] = file.entry()
    (cord,) = program._tensor_data.values()
    with HashingFile(folder / contract.WEIGHTS_FILE) as file:
        cord.write_to_file(file)
    files[contract.WEIGHTS_FILE] = file.entry()
    texts = {contract.TOKENIZER_FILE: tokenizer}
    if template is not None:
        texts[contract.CHAT_TEMPLATE_FILE] = template.text.encode()
    for name, text in texts.items():
        with HashingFile(folder / name) as file:
            file.write(text)
        files[name] = file.entry()
    return files


def _read_tokenizer(checkpoint: Path) -> bytes:
    path = checkpoint / contract.TOKENIZER_FILE
    if not path.is_file():
        raise ExportError(f"{path}: no such file; a fast tokenizer (tokenizers' own format) is needed")
    read_json_object(path)
    return path.read_bytes()


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
def _compiler_cache() -> Iterator[None]:
    """Gives Inductor a folder of its own, removed afterwards: what it compiles is not compiled again."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(variable)
    with tempfile.TemporaryDirectory(prefix="qwen_runner-export-") as folder:
        os.environ[variable] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before
