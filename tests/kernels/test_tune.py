"""The sweep of block sizes and its tables."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.tune import tables
from qwen_runner.kernels.tune.sweep import Measured, default_config, measure
from qwen_runner.kernels.tune.workloads import CONFIGS, OPERATORS, Model, Work, workloads

SMALL = Model(
    hidden=128,
    key_heads=2,
    value_heads=4,
    delta_dim=32,
    query_heads=2,
    cache_heads=1,
    head_dim=32,
    experts=4,
    top_k=2,
    intermediate=128,
    vocabulary=100,
)


@pytest.fixture
def emulated() -> Gpu:
    pytest.importorskip("qwen_runner._emulated_kernels", reason="not built (QWEN_BUILD_TESTS, CUDA)")
    return Gpu(emulated=True)


def small_works(gpu: Gpu, group: int) -> list[Work]:
    return list(workloads(gpu, OPERATORS, group, SMALL, tokens=(40,), expert_rows=(6,), cold_bytes=1))


@pytest.mark.parametrize("group", [32, 128])
def test_every_configuration_computes_the_same(emulated: Gpu, group: int) -> None:
    works = small_works(emulated, group)
    assert {(work.phase, work.kernel) for work in works} == set(tables.KERNELS)
    for work in works:
        row = measure(emulated, work, lambda *_: 1.0)
        assert not row.wrong, row
        assert set(row.times) >= {",".join(map(str, config)) for config in work.configs}
        assert row.best == row.default == default_config(emulated, work)


def test_the_best_configuration_must_be_worth_it(emulated: Gpu) -> None:
    work = next(work for work in small_works(emulated, 32) if work.kernel == "HEAD")
    assert default_config(emulated, work) == (1,)
    for times, best in (((10.0, 9.9), (1,)), ((10.0, 9.0), (2,))):
        left = iter(times)
        row = measure(emulated, work, lambda *_, left=left: next(left))
        assert row.best == best
        assert (row.default_us, row.best_us) == (10.0, min(times) if best == (2,) else 10.0)


def test_a_wrong_configuration_is_not_timed(emulated: Gpu) -> None:
    work = next(work for work in small_works(emulated, 32) if work.kernel == "HEAD")
    honest, calls = work.call, []

    def call(i: int) -> None:
        honest(i)
        calls.append(i)
        if len(calls) == 3:
            work.outputs[0].mul_(1.5)

    object.__setattr__(work, "call", call)
    row = measure(emulated, work, lambda *_: 1.0)
    assert row.wrong == ((2,),)
    assert set(row.times) == {"1"}


def test_a_line_holds_from_its_rows_on(emulated: Gpu) -> None:
    m = emulated.module
    lines = [
        [90, 64, 128, 32, 512, 3],
        [90, 64, 128, 32, 64, 2],
        [100, 64, 128, 32, 64, 4],
        [90, 64, 128, 128, 64, 5],
    ]
    for architecture, group, rows, found in (
        (90, 32, 63, None),
        (90, 32, 64, (2,)),
        (90, 32, 511, (2,)),
        (90, 32, 9999, (3,)),
        (100, 32, 9999, (4,)),
        (90, 128, 64, (5,)),
        (90, 64, 64, None),
        (80, 32, 64, None),
    ):
        assert m.find_tuned(lines, architecture, 64, 128, group, rows) == found
        assert m.find_tuned(lines, architecture, 65, 128, group, rows) is None


def test_what_was_not_measured_gets_the_default_and_a_warning(emulated: Gpu) -> None:
    m = emulated.module
    kernel, shape = m.DecodeKernel.DELTA_INPUT, (12288, 2048, 128)
    assert m.decode_config(kernel, *shape, 0) == m.decode_config(kernel, *shape, 75) == (1,)
    assert m.prefill_config(m.PrefillKernel.LINEAR, *shape, 2048, 75) == (128, 16)
    assert m.tuned_as(75) == 0
    assert "sm_75" in m.untuned_warning(75)
    assert "defaults" in m.untuned_warning(75)
    for architecture in (80, 89, 90, 100):
        assert m.tuned_as(architecture) in (architecture, 90, 0)
        assert (m.untuned_warning(architecture) == "") == (m.tuned_as(architecture) == architecture)
        assert m.decode_config(kernel, *shape, architecture) == m.decode_config(
            kernel, *shape, m.tuned_as(architecture)
        )


def test_the_compiled_tables_are_the_files(emulated: Gpu) -> None:
    m = emulated.module
    names = {(phase, cpp): kernel for (phase, kernel), cpp in tables.KERNELS.items()}
    for operator in OPERATORS:
        for kind, fields in re.findall(
            r"^TUNED_(\w+)\((.*)\)", tables.table_path(operator).read_text(), re.MULTILINE
        ):
            phase, (architecture, cpp, *numbers) = kind.lower(), fields.split(", ")
            values = tuple(map(int, numbers))
            sizes = len(CONFIGS[phase, names[phase, cpp]][0])
            kernel = getattr(getattr(m, f"{phase.title()}Kernel"), names[phase, cpp])
            config = getattr(m, f"{phase}_config")(kernel, *values[:-sizes], int(architecture))
            assert config == values[-sizes:], fields


def row(**changes: object) -> Measured:
    fields = {
        "operator": "linear",
        "phase": "prefill",
        "kernel": "LINEAR",
        "n": 12288,
        "k": 2048,
        "group": 32,
        "rows": 64,
        "default": (32, 1),
        "default_us": 9.0,
        "best": (16, 1),
        "best_us": 8.125,
        "times": {},
    }
    return Measured(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_section_is_written_and_replaced() -> None:
    rows = [
        row(rows=512, best=(128, 1)),
        row(rows=64),
        row(rows=128),
        row(phase="decode", kernel="HEAD", n=248320, rows=0, default=(1,), best=(2,), best_us=8.0),
    ]
    prefill = "TUNED_PREFILL(90, kLinearPrefill, 12288, 2048, 32,"
    lines = tables.section(90, "H200", rows)
    assert lines == [
        "// sm_90: H200",
        "TUNED_DECODE(90, kHead, 248320, 2048, 32, 2)  // 8.00 us; default {1}: 9.00 us",
        f"{prefill} 64, 16, 1)  // 8.12 us; default {{32, 1}}: 9.00 us",
        f"{prefill} 512, 128, 1)  // 8.12 us; default {{32, 1}}: 9.00 us",
    ]
    empty = "// Written.\n// clang-format off\n"
    first = tables.updated(empty, 90, lines)
    assert first == empty + "\n" + "\n".join(lines) + "\n"
    assert tables.updated(first, 90, lines) == first
    both = tables.updated(first, 80, ["// sm_80: A100", "TUNED_DECODE(80, kHead, 1, 2, 32, 2)"])
    assert both.index("sm_80") < both.index("sm_90")
    assert tables.updated(both, 90, ["// sm_90: again"]).endswith("32, 2)\n\n// sm_90: again\n")


def test_results_survive_json() -> None:
    before = row(times={"32,1": 9.0, "16,1": None}, wrong=((128, 1),))
    assert Measured.from_json(json.loads(json.dumps(before.to_json()))) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    for arguments, message in (
        (["--gpu"], "--gpu needs an NVIDIA GPU"),
        ([], "--gpu --from-json is required"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "qwen_runner.kernels.tune", "all", *arguments],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
        assert done.returncode != 0
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
