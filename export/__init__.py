"""Checkpoint in, program out: turns a Hugging Face Qwen3.5-MoE checkpoint into what the runner loads."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from .errors import ExportError
from .options import ExportOptions

__all__ = ["ExportError", "ExportOptions", "export_program"]


def export_program(
    checkpoint: str | Path | None,
    output: str | Path,
    *,
    random: str | None = None,
    tokenizer: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> Path:
    """Exports the checkpoint folder `checkpoint` into the program folder `output`, and returns `output`.

    Args:
        checkpoint: a Hugging Face folder: config.json, safetensors, tokenizer.json. Or a program's folder:
            its packed weights are taken as they are, and its options hold where no others are given.
        output: replaced at once when all is written, if it is a program or an empty folder.
        random: with no checkpoint (None), a known model ("qwen3.5-35b-a3b") that gets random weights.
        tokenizer: with random, the folder of tokenizer.json; by default a token is a byte.
        progress: report stages on stderr.
        options: the fields of `ExportOptions`.

    Raises:
        ExportError: a source, an option or an output folder that will not do, or too small a machine, be it
            that its memory or its GPU's runs out, in one line.
        OSError: `output` cannot be written; what was there before still is.
    """
    known = [option.name for option in fields(ExportOptions)]
    for name in options:
        if name not in known:
            raise ExportError(f"{name}: no such option; there are {', '.join(known)}")
    ExportOptions(**options)
    with _quiet(), _out_of_memory_in_a_line():
        # Imported late: torch's exporter and ExecuTorch take seconds, and a wrong option should not.
        from .program import stages, write_program
        from .progress import Progress
        from .sources import open_source

        folders = [None if path is None else Path(path) for path in (checkpoint, tokenizer)]
        with open_source(folders[0], random, folders[1], options) as source:
            if not progress:
                write_program(source, Path(output), lambda stage: None)
            else:
                with Progress(stages(source.options), sys.stderr) as reporter:
                    write_program(source, Path(output), reporter.begin, reporter.note)
                    size = sum(path.stat().st_size for path in Path(output).iterdir())
                    reporter.finish(f"{output}: {size / 1e6:.1f} MB")
    return Path(output)


@contextmanager
def _out_of_memory_in_a_line() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch's own are RuntimeErrors: OutOfMemoryError of a GPU, and others that only their text tells.
        text = str(error)
        on_gpu = type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in text
        if not (on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in text):
            raise
        where, remedy = (
            ("the GPU has", "end other programs on it, or hide it (CUDA_VISIBLE_DEVICES=)")
            if on_gpu
            else ("this machine has", "end other programs")
        )
        raise ExportError(f"{where} no memory left for the export; {remedy}, and try again") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporters' warnings, which a user cannot act on, off stderr."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
