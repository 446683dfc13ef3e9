"""The tables `<operator>/tuned.inc` that a sweep writes: sections of lines of C++, one a GPU architecture."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from .sweep import Measured

KERNELS = {
    ("decode", "LINEAR"): "kLinearDecode",
    ("decode", "HEAD"): "kHead",
    ("decode", "DELTA_INPUT"): "kDeltaInput",
    ("decode", "DELTA_OUTPUT"): "kDeltaOutput",
    ("decode", "MOE_GATE_UP"): "kMoeGateUp",
    ("prefill", "LINEAR"): "kLinearPrefill",
    ("prefill", "SWIGLU"): "kSwigluPrefill",
    ("prefill", "MOE_GATE_UP"): "kMoeGateUpPrefill",
    ("prefill", "MOE_DOWN"): "kMoeDownPrefill",
}


def table_path(operator: str) -> Path:
    return Path(__file__).resolve().parents[1] / operator / "tuned.inc"


def _line(architecture: int, row: Measured) -> str:
    fields: list[object] = [architecture, KERNELS[row.phase, row.kernel], row.n, row.k, row.group]
    if row.phase == "prefill":
        fields.append(row.rows)
    code = f"TUNED_{row.phase.upper()}({', '.join(map(str, [*fields, *row.best]))})"
    if row.best == row.default:
        return f"{code}  // {row.best_us:.2f} us, the default"
    default = ", ".join(map(str, row.default))
    return f"{code}  // {row.best_us:.2f} us; default {{{default}}}: {row.default_us:.2f} us"


def _key(row: Measured) -> tuple[str, str, int, int, int, int]:
    return row.phase, KERNELS[row.phase, row.kernel], -row.n, row.k, row.group, row.rows


def section(architecture: int, measured_on: str, rows: Iterable[Measured]) -> list[str]:
    """The lines for an architecture. One that only repeats the one before, from more rows on, is left out."""
    lines = [f"// sm_{architecture}: {measured_on}"]
    before: object = None
    for row in sorted(rows, key=_key):
        now = (*_key(row)[:-1], row.best)
        if now != before:
            lines.append(_line(architecture, row))
        before = now
    return lines


def _sections(text: str) -> Iterator[tuple[int, list[str]]]:
    """(architecture, its lines); 0 for those before the first section."""
    architecture = 0
    lines: list[str] = []
    for line in text.splitlines():
        if found := re.match(r"// sm_(\d+):", line):
            yield architecture, lines
            architecture, lines = int(found[1]), []
        if line:
            lines.append(line)
    yield architecture, lines


def updated(text: str, architecture: int, lines: list[str]) -> str:
    """The table with these lines in place of its section for the architecture."""
    sections = {**dict(_sections(text)), architecture: lines}
    return "\n\n".join("\n".join(sections[a]) for a in sorted(sections)) + "\n"
