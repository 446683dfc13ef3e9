"""Draws what was measured: python benchmarks/plot.py FILE [FILE ...] [--output FOLDER].

FILEs are what cuda_kernels.py, decode_timeline.py, prefill_timeline.py, moe_sweep.py and cuda_model.py wrote
with --json, of one machine:

- Of the kernels a chart a phase, <phase>_kernels.svg: the time that each takes of a decode step or of a
  prefill chunk, all its calls together, and beside it what it reaches, of the card's own peak in whichever is
  nearer to it: bandwidth or arithmetic.
- Of the kernels and the timeline of decode decode_layer.svg, when the kernels of one layer run, a layer of
  each type. Without a timeline they are drawn one after the other.
- Of the timeline of prefill prefill_layer.svg, the same of a prompt, with the speed that each kernel reaches.
- Of the sweep moe_sweep.svg, the time of the routed experts against the tokens, a line a method.
- Of the model decode_growth.svg, tokens a second against the context and against the answers at once.

What no file tells of stays as it is. Needs matplotlib: pip install '.[bench]'.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from chart_decode_layer import draw_decode_layers
from chart_growth import draw_growth
from chart_kernels import draw_kernels
from chart_moe_sweep import draw_moe_sweep
from chart_prefill_layer import draw_prefill_layers

FIGURES = Path(__file__).resolve().parent / "figures"

# A key that only such a file has.
KEYS = {"rows": "kernels", "token": "decode", "prefills": "prefill", "sweep": "sweep", "contexts": "model"}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", type=Path, nargs="+", help="written with --json; of two alike the last counts"
    )
    parser.add_argument("--copy", type=float, help="TB/s of a copy on this card, if not what the file says")
    parser.add_argument("--output", type=Path, default=FIGURES, help="folder of the charts")
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for file in arguments.file:
        measured = json.loads(file.read_text(encoding="utf-8"))
        kinds = [kind for key, kind in KEYS.items() if key in measured]
        if not kinds:
            parser.error(f"{file} is of none of the five")
        if arguments.copy and "copy" in measured:
            measured["copy"] = arguments.copy * 1e12
        found[kinds[0]] = measured
    if "kernels" in found:
        draw_kernels(found["kernels"], arguments.output)
        draw_decode_layers(found["kernels"], found.get("decode"), arguments.output / "decode_layer.svg")
    elif "decode" in found:
        print("no layer of decode is drawn: its timeline needs the file of cuda_kernels.py, for the bytes")
    if "prefill" in found:
        draw_prefill_layers(found["prefill"], arguments.output / "prefill_layer.svg")
    if "sweep" in found:
        draw_moe_sweep(found["sweep"], arguments.output / "moe_sweep.svg")
    if "model" in found:
        draw_growth(found["model"], arguments.output / "decode_growth.svg")


if __name__ == "__main__":
    main()
