"""Measures the block sizes of the CUDA kernels on this machine's GPU, on Qwen3.5-35B-A3B's shapes with int4
groups of 32 and 128, and writes the tables kernels/<operator>/tuned.inc that are compiled into the runner."""

import argparse
import json
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import torch

from ..cuda_native import Gpu
from .sweep import Measured, measure, warm_up
from .tables import section, table_path, updated
from .workloads import OPERATORS, Config, workloads

GROUPS = (32, 128)


def _config(config: Config) -> str:
    return f"{{{', '.join(map(str, config))}}}"


def _shape(row: Measured) -> str:
    return f"{row.phase:7} {row.kernel:12} {f'{row.n} x {row.k}':>13} {row.group:5} {row.rows or '':>5}"


def sweep(gpu: Gpu, operators: tuple[str, ...]) -> list[Measured]:
    rows: list[Measured] = []
    warm_up()
    for group in GROUPS:
        for work in workloads(gpu, operators, group):
            row = measure(gpu, work)
            rows.append(row)
            times = "  ".join(
                f"{{{config}}} {'refused' if us is None else f'{us:.2f}'}" for config, us in row.times.items()
            )
            print(f"{_shape(row)}  {times}", flush=True)
            for wrong in row.wrong:
                print(f"{_shape(row)}  {_config(wrong)} WRONG: not timed", flush=True)
        torch.cuda.empty_cache()
    return rows


def report(rows: Iterable[Measured]) -> str:
    header = (
        f"{'phase':7} {'kernel':12} {'N x K':>13} {'group':>5} {'rows':>5}  {'best':>8} {'us':>8}  default"
    )
    lines = [header]
    for row in rows:
        best = f"{_config(row.best):>8} {row.best_us:8.2f}"
        lines.append(f"{_shape(row)}  {best}  {_config(row.default):>8} {row.default_us:8.2f}")
    return "\n".join(lines)


def write(rows: list[Measured], architecture: int, measured_on: str, *, dry_run: bool) -> None:
    for operator in OPERATORS:
        lines = [row for row in rows if row.operator == operator]
        if not lines:
            continue
        path = table_path(operator)
        text = updated(path.read_text(), architecture, section(architecture, measured_on, lines))
        if dry_run:
            print(f"\n{path} would be:\n{text}", end="")
        else:
            path.write_text(text)
            print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qwen_runner.kernels.tune", description=__doc__)
    parser.add_argument("operator", choices=(*OPERATORS, "all"), help="whose kernels")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpu", action="store_true", help="measure on this machine's GPU")
    where.add_argument("--from-json", type=Path, metavar="FILE", help="write what --json kept elsewhere")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also keep all times in this file")
    parser.add_argument("--dry-run", action="store_true", help="print the tables, write none")
    options = parser.parse_args()
    operators = OPERATORS if options.operator == "all" else (options.operator,)
    missing = [str(table_path(operator)) for operator in operators if not table_path(operator).exists()]
    if missing:
        sys.exit(f"no {missing[0]}: run this in a source checkout (pip install -e .), which holds the tables")
    if options.from_json:
        kept = json.loads(options.from_json.read_text())
        rows = [Measured.from_json(row) for row in kept["rows"]]
        rows = [row for row in rows if row.operator in operators]
        architecture, measured_on = kept["architecture"], kept["measured_on"]
    else:
        try:
            gpu = Gpu(emulated=False)
        except (ModuleNotFoundError, RuntimeError) as error:
            sys.exit(f"--gpu needs an NVIDIA GPU and the kernels built for it (QWEN_BUILD_TESTS): {error}")
        architecture = gpu.module.gpu_architecture()
        measured_on = f"{torch.cuda.get_device_name()}, {date.today()}"
        rows = sweep(gpu, operators)
        if options.json:
            kept = {"architecture": architecture, "measured_on": measured_on}
            options.json.write_text(json.dumps({**kept, "rows": [row.to_json() for row in rows]}, indent=1))
    write(rows, architecture, measured_on, dry_run=options.dry_run)
    print(f"\nsm_{architecture}, {measured_on}\n{report(rows)}")
    if any(row.wrong for row in rows):
        sys.exit("wrong results: see WRONG above")
    if options.gpu and not options.dry_run:
        print("build again to use the tables")


if __name__ == "__main__":
    main()
