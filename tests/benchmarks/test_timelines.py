"""From events to tables: decode's and prefill's timelines."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import prefill_timeline
import pytest
from decode_timeline import measure_kinds, measure_sums, median_token, split_tokens, whole
from kernel_timeline import Event, function_name, kernel_events, steps_of, union
from prefill_costs import Cost, Model
from prefill_timeline import Kind, measured_kinds, report, summary
from small_prefill import BEGIN, KINDS, MANIFEST, PREFILL

# b starts beside a, which ends after it; nothing runs from 6 to 8.
TIMED = [("a", Event("a", 0, 5)), ("b", Event("b", 2, 4)), ("a", Event("a", 4.5, 6)), ("c", Event("c", 8, 9))]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        (BEGIN[0], "embed"),
        ("void qwen::cuda::decode<256, (Kind)1>(qwen::cuda::Arguments<8>)", "decode"),
        ("plain", "plain"),
    ],
)
def test_a_function_is_named_without_its_surroundings(name: str, function: str) -> None:
    assert function_name(name) == function


def test_only_kernels_of_a_trace_are_events() -> None:
    events = [
        {"cat": "kernel", "name": "a", "ts": 10, "dur": 2.5},
        {"cat": "gpu_memset", "name": "m", "ts": 1, "dur": 1},
        {"cat": "kernel", "name": "unfinished", "ts": 1},
    ]
    assert kernel_events({"traceEvents": events}) == [Event("a", 10, 12.5)]


def test_what_kernels_add_is_their_span() -> None:
    steps = steps_of(TIMED, 0)
    assert [step[1:] for step in steps] == [(5, 0, 5), (2, -3, 0), (1.5, 0.5, 1), (1, 2, 3)]
    assert sum(step[3] for step in steps) == 9
    assert union(TIMED) == 7


def test_kinds_are_summed_in_the_order_that_they_ran_in() -> None:
    kinds = measured_kinds(TIMED, {"a": Cost(600, 60), "unseen": Cost(1, 1)})
    assert kinds == [Kind("a", 2, 3.25, 6, 600, 60), Kind("b", 1, 2, 0, 0, 0), Kind("c", 1, 1, 3, 0, 0)]
    assert kinds[0].share(600, 2e8) == pytest.approx(0.5)
    assert kinds[1].share(600, 1) == 0


def test_a_prefill_is_told_in_full() -> None:
    events = [Event(name, 100 + 10 * i, 109 + 10 * i) for i, name in enumerate(PREFILL)]
    prefill = summary(events, Model.of(MANIFEST), 32, 16, 1.5)
    assert prefill.span == 10 * len(PREFILL) - 1
    assert prefill.idle == len(PREFILL) - 1
    assert [kernel.kind for kernel in prefill.kernels] == list(KINDS)
    assert prefill.kernels[1].start == 10
    assert sum(kind.added for kind in prefill.kinds) == pytest.approx(prefill.span)
    lines = report(prefill, 4e12, 8e14).splitlines()
    assert lines[0].startswith("32 tokens in chunks of 16: 1.50 ms")
    assert "(21333 tok/s)" in lines[0]
    assert len(lines) == 2 + len(set(KINDS)) + 1
    assert lines[-1].split()[:2] == ["sum", str(len(PREFILL))]


class FakeEngine:
    """Notes the prompts that its sessions run."""

    max_seq_len, chunk, vocab_size = 64, 16, 1000
    gpu: ClassVar[dict[str, str]] = {"name": "a card"}

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def open_session(self) -> Any:
        return SimpleNamespace(reset=lambda: None, run=lambda _, prompt, __: self.prompts.append(prompt))


def test_prompts_of_every_length_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine()
    spans = iter([5.0, 9.0, 7.0] * 2)

    def profiled(work: Callable[[], object]) -> list[Event]:
        work()
        return [Event(BEGIN[0], 0, next(spans))]

    monkeypatch.setattr(prefill_timeline, "open_engine", lambda _, **__: engine)
    monkeypatch.setattr(prefill_timeline, "profiled", profiled)
    monkeypatch.setattr(prefill_timeline, "synchronize", lambda: None)
    monkeypatch.setitem(sys.modules, "cuda_bench", SimpleNamespace(peaks=lambda: (4e12, 8e14)))
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST), encoding="utf-8")
    file = tmp_path / "out" / "prefill.json"
    arguments = ["prefill_timeline.py", str(tmp_path), "--tokens", "32", "8", "100", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", arguments)
    prefill_timeline.main()
    printed = capsys.readouterr().out
    assert "100 tokens are left out" in printed
    written = json.loads(file.read_text(encoding="utf-8"))
    assert [(prefill["tokens"], prefill["span"]) for prefill in written["prefills"]] == [(32, 7), (8, 7)]
    assert {len(prompt) for prompt in engine.prompts} == {32, 8}
    assert len(engine.prompts) == 2 * (1 + prefill_timeline.TIMED + prefill_timeline.PROFILED)


def test_tokens_of_decode_are_split_at_their_embedding() -> None:
    token = ("embed", "int4_linear", "recur", "decode_kernel", "head_rows")
    events = [
        Event(name, 100 * i + 10 * j, 100 * i + 10 * j + 8) for i in range(4) for j, name in enumerate(token)
    ]
    tokens = split_tokens([Event("late", -5, -1), *events])
    measured = whole(tokens)
    assert [kind for kind, _ in tokens[0]] == [
        "embedding",
        "delta_input",
        "delta_step",
        "delta_output",
        "head",
    ]
    assert measured == [0, 1, 2]
    kinds, sums = measure_kinds(tokens, measured), measure_sums(tokens, measured)
    assert [(kind.kind, kind.count, kind.added) for kind in kinds[:2]] == [
        ("embedding", 1, 8),
        ("delta_input", 1, 10),
    ]
    assert (sums.token, sums.busy, sums.idle_inside, sums.idle_between) == (100, 40, 8, 52)
    assert [kernel.start for kernel in median_token(tokens, measured)] == [0, 10, 20, 30, 40]
