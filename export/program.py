"""From a source of weights to a program folder."""

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

from . import contract
from .config import ModelConfig
from .errors import ExportError
from .lower import lower
from .lower import stages as lower_stages
from .manifest import HashingFile, describe, write_manifest
from .model import LanguageModel
from .options import ResolvedOptions
from .preflight import check_resources
from .ptd import Layout, Weight, weights_of
from .sources import MODELS, Source
from .staging import staged_folder
from .weights import MetaWeights

CHECK, CHAT = "check the source", "derive the chat pieces"
WEIGHTS, WRITE = "write the weights", "write the program"


def stages(options: ResolvedOptions) -> tuple[str, ...]:
    """Those of `write_program`, in order."""
    return (CHECK, CHAT, *lower_stages(options.batch), WEIGHTS, WRITE)


def write_program(
    source: Source,
    output: Path,
    begin: Callable[[str], None],
    note: Callable[[str], None] = lambda detail: None,
) -> None:
    """Writes the folder `output`, replacing a program that is there.

    `begin` is called with each of `stages` as it begins, `note` with how far a long one is.

    Raises:
        ExportError: a source or an output folder that will not do, or a machine that is too small.
        OSError: `output` cannot be written; what was there before still is.
    """
    output = output.resolve()
    _check_replaceable(output)
    _check_compiler()
    config, options = source.config, source.options
    tokenizer = source.tokenizer()
    model, layout = hollow_model(config, options)
    check_resources(output, layout, config, options, source.device)
    # Staged before the work, which takes minutes, so that a folder that cannot be written is found first.
    with staged_folder(output) as stage:
        begin(CHECK)
        source.check(layout, note)
        begin(CHAT)
        chat = tokenizer.chat()
        with _compiler_cache(stage.scratch):
            program = lower(
                model,
                target=options.target,
                chunk=options.chunk,
                batch=options.batch,
                metadata=_metadata(config, options),
                on_stage=begin,
            )
        del model
        begin(WEIGHTS)
        with HashingFile(stage.content / contract.WEIGHTS_FILE) as weights:
            layout.write(weights, source.weights(layout, note))
        begin(WRITE)
        files = _write_files(stage.content, program, tokenizer.files) | {
            contract.WEIGHTS_FILE: weights.entry()
        }
        manifest = describe(source.name, config, options, chat, files)
        write_manifest(stage.content / contract.MANIFEST_FILE, manifest)


def hollow_model(config: ModelConfig, options: ResolvedOptions) -> tuple[LanguageModel, Layout]:
    """The model without its weights, for the compiler, and where they are going to be.

    Its tensors are memory that nobody has written to, nor shall: it takes no room.
    """
    dtype: torch.dtype = getattr(torch, options.dtype)
    source = MetaWeights(config, options.quantization, dtype)
    with torch.device("meta"):
        model = MODELS[options.target](
            config, source, slots=options.slots, max_seq_len=options.max_seq_len, dtype=dtype
        )
        parts = model.parts(config, source, slots=1, max_seq_len=1, dtype=dtype)
        layout = Layout(
            Weight(name, tensor.dtype, tuple(tensor.shape))
            for part_name, part in parts
            for name, tensor in weights_of(part_name, part)
        )
    return model.to_empty(device="cpu"), layout


def _metadata(config: ModelConfig, options: ResolvedOptions) -> dict[str, int]:
    """What the .pte says of itself, for the runner to compare with the manifest."""
    return {
        "format_version": contract.FORMAT_VERSION,
        "vocab_size": config.vocab_size,
        "max_seq_len": options.max_seq_len,
        "chunk": options.chunk,
        "slots": options.slots,
        "batch": options.batch,
    }


def _write_files(folder: Path, program: ExecutorchProgramManager, texts: dict[str, bytes]) -> dict[str, Any]:
    """Writes the .pte and `texts` by name; their entries in the manifest."""
    files = {}
    with HashingFile(folder / contract.PROGRAM_FILE) as file:
        program.write_to_file(file)
    files[contract.PROGRAM_FILE] = file.entry()
    for name, text in texts.items():
        with HashingFile(folder / name) as file:
            file.write(text)
        files[name] = file.entry()
    return files


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
