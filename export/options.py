"""The options of an export, declared once: the command line and `export_program`'s keywords follow."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .config import ModelConfig
from .contract import MAX_BATCH
from .cuda_model import check_cuda_shapes
from .errors import ExportError
from .quantize import GROUP_SIZES, QuantizationConfig, check_quantizable

NO_SOURCE = "give the folder of a checkpoint or of a program, or else --random NAME"

# By target: what they are unless said otherwise.
_CHUNKS = {"cpu": 256, "cuda": 8192}
_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


def _option(default: Any, help: str, choices: tuple[str | int, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint becomes a program. None is a default that depends on other options or on the model.

    Raises:
        ExportError: a value that is not among the choices, or out of range; it names the option.
    """

    target: str = _option("cpu", "device that the program runs on", ("cpu", "cuda"))
    quantize: Literal["none", "int4"] = _option("int4", "weights of the matrices", ("none", "int4"))
    group_size: int = _option(32, "consecutive weights that share a scale (int4)", GROUP_SIZES)
    quantize_method: Literal["hqq", "rtn"] = _option("hqq", "how scales are chosen (int4)", ("hqq", "rtn"))
    head: Literal["int4", "int8"] | None = _option(
        None,
        "weights of the output head (int4); default int4, or int8 if tied to the embedding",
        ("int4", "int8"),
    )
    dtype: str | None = _option(
        None,
        "type of activations, and of weights that are not quantized; default float32, or bfloat16 for cuda",
        ("float32", "bfloat16"),
    )
    max_seq_len: int | None = _option(
        None, "positions a session holds; default 4096, or the model's own limit"
    )
    chunk: int | None = _option(
        None, "most tokens of one prefill call; default 256, for cuda 8192, or max_seq_len"
    )
    slots: int = _option(4, "sessions that a program holds at a time")
    batch: int | None = _option(
        None,
        "most sessions that a decode step advances together (cuda); default 8, or slots",
        tuple(range(1, MAX_BATCH + 1)),
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value, choices = getattr(self, option.name), option.metadata["choices"]
            if value is None and option.default is None:
                continue
            if choices is not None and value not in choices:
                raise ExportError(f"{flag(option.name)} {value}: supported: {', '.join(map(str, choices))}")
            if choices is None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ExportError(f"{flag(option.name)} {value}: it must be a positive integer")
        if self.target == "cuda":
            for name, value, only in (("quantize", self.quantize, "int4"), ("dtype", self.dtype, "bfloat16")):
                if value not in (None, only):
                    raise ExportError(f"{flag(name)} {value}: --target cuda supports {only}")

    def resolved(self, config: ModelConfig) -> ResolvedOptions:
        """These options with every default filled in for `config`.

        Raises:
            ExportError: a value that does not fit the model.
        """
        limit = config.max_position_embeddings
        max_seq_len = self.max_seq_len if self.max_seq_len is not None else min(4096, limit)
        chunk = self.chunk if self.chunk is not None else min(_CHUNKS[self.target], max_seq_len)
        if max_seq_len > limit:
            raise ExportError(f"--max-seq-len {max_seq_len}: the model has max_position_embeddings {limit}")
        if max_seq_len < 2:
            raise ExportError(f"--max-seq-len {max_seq_len}: it must be at least 2")
        if chunk < 2:
            raise ExportError(f"--chunk {chunk}: it must be at least 2")
        if chunk > max_seq_len:
            raise ExportError(f"--chunk {chunk}: it must be at most --max-seq-len, {max_seq_len}")
        most = {"cpu": 1, "cuda": min(MAX_BATCH, self.slots)}[self.target]
        if self.batch is not None and self.batch > most:
            limit_of = "--slots" if self.target == "cuda" else "--target cpu"
            raise ExportError(f"--batch {self.batch}: {limit_of} allows at most {most}")
        tied = config.tie_word_embeddings
        if tied and self.quantize == "int4" and self.head == "int4":
            raise ExportError(
                "--head int4: the head is tied to the embedding, which is int8; use --head int8"
            )
        quantization = QuantizationConfig(
            scheme=self.quantize,
            group_size=self.group_size,
            method=self.quantize_method,
            head=self.head or ("int8" if tied else "int4"),
        )
        check_quantizable(config, quantization)
        if self.target == "cuda":
            check_cuda_shapes(config)
        return ResolvedOptions(
            target=self.target,
            quantization=quantization,
            dtype=self.dtype or _DTYPES[self.target],
            max_seq_len=max_seq_len,
            chunk=chunk,
            slots=self.slots,
            batch=self.batch if self.batch is not None else most,
        )


@dataclass(frozen=True)
class ResolvedOptions:
    """`ExportOptions` for one model: nothing is left open, and everything fits."""

    target: str
    quantization: QuantizationConfig
    dtype: str
    max_seq_len: int
    chunk: int
    slots: int
    batch: int


def refuse_idle(given: dict[str, Any], random: bool) -> None:
    """Raises ExportError where one of the options that are given would have no effect.

    `random`: weights are drawn as codes, none are chosen for others.
    """
    idle: dict[str, str] = {}
    if random:
        idle["quantize_method"] = "random weights are drawn as codes"
    if given.get("quantize") == "none":
        idle |= dict.fromkeys(("group_size", "quantize_method", "head"), "--quantize none quantizes nothing")
    for name, reason in idle.items():
        if given.get(name) is not None:
            raise ExportError(f"{flag(name)} {given[name]}: it has no effect, {reason}; leave it out")


def flag(name: str) -> str:
    """How the command line spells the option `name`."""
    return "--" + name.replace("_", "-")
