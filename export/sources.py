"""What a program may be made from: a checkpoint, a known model's shape with random weights, a program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import contract
from .checkpoint import Checkpoint
from .config import CONFIG_FILE, ModelConfig
from .cuda_model import CudaModel
from .errors import ExportError
from .linear import WeightSource
from .model import LAYERS, LanguageModel, Model
from .options import NO_SOURCE, ExportOptions, ResolvedOptions, refuse_idle
from .packed import PackedProgram
from .preflight import quantizing_device
from .ptd import Layout, weights_of
from .random_weights import RandomWeights, load_known_config
from .tokenizer_files import TokenizerFiles, byte_tokenizer, read_tokenizer_files
from .weights import CheckpointWeights

MODELS: dict[str, type[LanguageModel]] = {contract.CPU: Model, contract.CUDA: CudaModel}

Note = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Everything that goes into a program but its code.

    name: what the program is called.
    tokenizer: reads the files that go along; raises ExportError.
    weights: gives the weights of a layout in its order, each made as it is asked for, and tells its second
        argument how far it is.
    device: where weights are quantized, if any are.
    check: sees, before the work, that the weights of a layout are there and whole; raises ExportError.
    """

    name: str
    config: ModelConfig
    options: ResolvedOptions
    tokenizer: Callable[[], TokenizerFiles]
    weights: Callable[[Layout, Note], Iterator[tuple[str, Tensor]]]
    device: str | None = None
    check: Callable[[Layout, Note], None] = lambda layout, note: None


@contextmanager
def open_source(
    checkpoint: Path | None, random: str | None, tokenizer: Path | None, given: dict[str, Any]
) -> Iterator[Source]:
    """The source that is given: the folder `checkpoint` (a program's too), or the known model `random`.

    `given` are the options that were: fields of `ExportOptions`. `tokenizer`, a folder, goes with `random`.

    Raises:
        ExportError: none or both are given, or what is given will not do.
    """
    if (checkpoint is None) == (random is None):
        raise ExportError(NO_SOURCE)
    refuse_idle(given, random is not None)
    if random is not None:
        yield _random_source(random, tokenizer, ExportOptions(**given))
        return
    assert checkpoint is not None
    if tokenizer is not None:
        raise ExportError(f"--tokenizer {tokenizer}: {checkpoint} has its own; the option goes with --random")
    if (checkpoint / contract.MANIFEST_FILE).is_file() and not (checkpoint / CONFIG_FILE).exists():
        yield _program_source(checkpoint, given)
        return
    with Checkpoint(checkpoint) as opened:
        yield _checkpoint_source(opened, ExportOptions(**given))


def _checkpoint_source(checkpoint: Checkpoint, options: ExportOptions) -> Source:
    config = checkpoint.config
    resolved = options.resolved(config)
    device = quantizing_device(resolved)
    weights = CheckpointWeights(checkpoint, resolved.quantization, _dtype(resolved), device)
    return Source(
        name=checkpoint.path.resolve().name,
        config=config,
        options=resolved,
        tokenizer=lambda: read_tokenizer_files(checkpoint.path),
        weights=lambda _, note: _model_weights(config, resolved, weights, note),
        device=device,
    )


def _random_source(name: str, tokenizer: Path | None, options: ExportOptions) -> Source:
    config = load_known_config(name)
    resolved = options.resolved(config)

    def weights(_: Layout, note: Note) -> Iterator[tuple[str, Tensor]]:
        source = RandomWeights(config, resolved.quantization, _dtype(resolved))
        return _model_weights(config, resolved, source, note)

    return Source(
        name=f"{name}-random",
        config=config,
        options=resolved,
        tokenizer=byte_tokenizer if tokenizer is None else lambda: read_tokenizer_files(tokenizer),
        weights=weights,
    )


def _program_source(folder: Path, given: dict[str, Any]) -> Source:
    program = PackedProgram(folder)
    options = program.options(given)
    return Source(
        name=program.name,
        config=program.config,
        options=options.resolved(program.config),
        tokenizer=lambda: read_tokenizer_files(folder),
        weights=program.weights,
        check=program.check_weights,
    )


def _model_weights(
    config: ModelConfig, options: ResolvedOptions, source: WeightSource, note: Note
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model made from `source`; a part is forgotten before the next is made."""
    parts = MODELS[options.target].parts(config, source, slots=1, max_seq_len=1, dtype=_dtype(options))
    layers = len(config.layer_types)
    for name, part in parts:
        yield from weights_of(name, part)
        del part
        if name.startswith(LAYERS):
            note(f"layer {int(name.removeprefix(LAYERS)) + 1} of {layers}")


def _dtype(options: ResolvedOptions) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype
