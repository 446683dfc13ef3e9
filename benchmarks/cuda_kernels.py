"""Checks each CUDA kernel against its reference, then times it at Qwen3.5-35B-A3B's shapes.

    python benchmarks/cuda_kernels.py [name ...] [--phase decode] [--group 128]

A time is the median of replays of a CUDA graph that calls the kernel on several sets of arguments, so that
no weights stay in the L2 cache; kernels overlap there as in a token. TB/s counts each weight, state or cache
byte that must move once; TFLOP/s two operations a multiply-add. The card's own peaks are measured first: a
device-to-device copy, and a bfloat16 product of 8192 x 8192 x 8192. A kernel that is wrong is not timed, and
the exit status says so.
"""

import argparse
import json
from pathlib import Path

import torch
from cuda_bench import Bench, microseconds, peaks
from cuda_decode_workloads import decode_workloads
from cuda_prefill_workloads import prefill_workloads

HEADER = (
    f"{'kernel':18} {'error':>8} {'us':>9} {'TB/s':>6} {'of peak':>7} {'TFLOP/s':>7} "
    f"{'calls':>5} {'us in all':>9}"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="kernels to run (all by default)")
    parser.add_argument("--group", type=int, default=128, choices=(32, 64, 128), help="int4 group size")
    parser.add_argument("--context", type=int, default=512, help="positions in the cache of a decode step")
    parser.add_argument("--tokens", type=int, default=1642, help="tokens of a prefill chunk")
    parser.add_argument("--phase", choices=("decode", "prefill"), help="one of them (both by default)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    bandwidth, arithmetic = peaks()
    card = torch.cuda.get_device_name()
    peak = f"copy {bandwidth / 1e12:.2f} TB/s, bf16 {arithmetic / 1e12:.0f} TFLOP/s"
    print(f"{card}, torch {torch.__version__}: {peak}")
    rows, wrong = [], []
    for phase, title, workloads in (
        ("decode", f"decode, context {options.context}", lambda b: decode_workloads(b, options.context)),
        ("prefill", f"prefill, {options.tokens} tokens", lambda b: prefill_workloads(b, options.tokens)),
    ):
        if options.phase not in (None, phase):
            continue
        print(f"{title}, groups of {options.group}")
        print(HEADER)
        bench, total = Bench(options.group), 0.0
        for work in workloads(bench):
            if options.names and work.name.split("@")[0] not in options.names:
                continue
            error = work.check() if work.check else 0.0
            if not error < 1e-2:
                print(f"{work.name:18} {error:8.1e} WRONG: not timed", flush=True)
                wrong.append(work.name)
                continue
            us = microseconds(work)
            torch.cuda.synchronize()
            rate, compute = work.bytes / us * 1e6, work.operations / us * 1e6
            share = max(rate / bandwidth, compute / arithmetic)
            total += us * work.per_token
            checked = f"{error:8.1e}" if work.check else "       -"
            print(
                f"{work.name:18} {checked} {us:9.2f} {rate / 1e12:6.2f} {share:7.0%} {compute / 1e12:7.0f} "
                f"{work.per_token:5} {us * work.per_token:9.1f}",
                flush=True,
            )
            rows.append(
                {
                    "phase": title,
                    "kernel": work.name,
                    "us": us,
                    "bytes": work.bytes,
                    "operations": work.operations,
                    "calls": int(work.per_token),
                    "error": error,
                }
            )
        print(f"{'sum':18} {'':8} {'':9} {'':6} {'':7} {'':7} {'':5} {total:9.1f}", flush=True)
        del bench
        torch.cuda.empty_cache()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"card": card, "copy": bandwidth, "bf16": arithmetic, "rows": rows})
        )
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
