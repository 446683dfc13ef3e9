"""The command line: `python -m qwen_runner.export CHECKPOINT --output DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from . import ExportError, ExportOptions, export_program
from .options import NO_SOURCE

FAILURE, USAGE = 1, 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(USAGE, f"error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    """Flags are the fields of `ExportOptions`; hyphens and underscores are both accepted.

    A flag that is not given gives no attribute: another program's options may take its place.
    """
    parser = _Parser(
        prog="python -m qwen_runner.export",
        description="Exports a Hugging Face Qwen3.5-MoE checkpoint into a program for qwen_runner.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        help="folder with config.json, safetensors and tokenizer.json; or a program's, to compile it anew",
    )
    parser.add_argument(
        "--random", metavar="NAME", help="random weights in the shape of a known model: qwen3.5-35b-a3b"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder of tokenizer.json (--random); default: a token a byte",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the program")
    for option in fields(ExportOptions):
        hyphened = option.name.replace("_", "-")
        names = dict.fromkeys([f"--{hyphened}", f"--{option.name}"])
        choices = option.metadata["choices"]
        default = "" if option.default is None else f" (default {option.default})"
        parser.add_argument(
            *names,
            dest=option.name,
            type=str if choices and isinstance(choices[0], str) else int,
            default=argparse.SUPPRESS,
            metavar="|".join(map(str, choices)) if choices else "N",
            help=option.metadata["help"] + default,
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs an export; the exit status: 0, 1 (failure) or 2 (usage), with one line on stderr."""
    options = vars(make_parser().parse_args(arguments))
    source = {name: options.pop(name) for name in ("checkpoint", "output", "random", "tokenizer")}
    output = source["output"]
    try:
        if (source["checkpoint"] is None) == (source["random"] is None):
            raise ExportError(NO_SOURCE)
        ExportOptions(**options)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    try:
        export_program(**source, progress=True, **options)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        name = error.filename or output
        print(f"error: {name}: {error.strerror or error}; nothing was changed", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was changed", file=sys.stderr)
    else:
        return 0
    return FAILURE


if __name__ == "__main__":
    sys.exit(main())
