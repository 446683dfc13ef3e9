"""What the charts of timelines show."""

import json
import sys
from pathlib import Path
from typing import Any

import plot
import pytest
from chart_decode_layer import layer_panel
from chart_layers import median_layer, timed_layer
from chart_prefill_layer import bar, draw_prefill_layers, panel
from small_prefill import KINDS, PREFILL


def kernels(kinds: list[str], length: float = 10) -> list[dict[str, Any]]:
    """One after the other, each starting a little before its predecessor's end."""
    return [
        {"kind": kind, "start": max(0, i * length - 2), "end": (i + 1) * length}
        for i, kind in enumerate(kinds)
    ]


def prefill(tokens: int) -> dict[str, Any]:
    kinds = [
        {"kind": kind, "calls": KINDS.count(kind), "operations": KINDS.count(kind) * 1e9, "bytes": 0.0}
        for kind in dict.fromkeys(KINDS)
    ]
    return {"tokens": tokens, "kinds": kinds, "kernels": kernels(list(KINDS))}


def test_a_layer_begins_where_what_ran_before_ended() -> None:
    layer = timed_layer(kernels(["a", "b", "c", "d"]), 1, 3)
    assert layer == [
        {"kind": "b", "start": -2, "end": 10, "added": 10},
        {"kind": "c", "start": 8, "end": 20, "added": 10},
    ]


def test_the_median_layer_is_one_that_ran() -> None:
    layers = [[{"added": added}] for added in (3.0, 1.0, 9.0, 2.0)]
    assert median_layer(layers) == [{"added": 2.0}]


def test_a_bar_says_the_speed_that_is_nearer_to_the_card() -> None:
    kernel = {"kind": "k", "start": 0, "end": 10, "added": 10}
    kind = {"kind": "k", "calls": 2, "operations": 8e9, "bytes": 2e7}
    by_arithmetic = bar(kernel, kind, copy=4e12, bf16=8e14)
    assert by_arithmetic.label == "10.0 µs, 400 TFLOP/s"
    assert by_arithmetic.share == pytest.approx(0.5)
    by_memory = bar(kernel, kind, copy=1e12, bf16=8e14)
    assert by_memory.label == "10.0 µs, 400 TFLOP/s, 1.00 TB/s"
    assert by_memory.share == pytest.approx(1)
    nothing = bar(kernel, kind | {"operations": 0, "bytes": 0}, copy=1e12, bf16=8e14)
    assert (nothing.label, nothing.share) == ("10.0 µs", None)


def test_a_panel_has_a_whole_layer() -> None:
    found = panel(prefill(1642), "attention", copy=4e12, bf16=8e14)
    assert found is not None
    assert [bar.kernel for bar in found.bars][:3] == ["rms_norm", "attention_qkv", "attention_heads"]
    assert len(found.bars) == 15
    assert found.title == "An attention layer, 1642 tokens: 150 µs, 100 TFLOP/s"
    assert panel(prefill(1642) | {"kernels": kernels(["embedding"])}, "delta", 4e12, 8e14) is None


def test_a_layer_of_decode_without_a_timeline_is_drawn_one_by_one() -> None:
    measured = {"a": (4.0, 2e6), "b": (6.0, 4e6)}
    found = layer_panel("A layer", ("a", "b"), measured, [], copy=1e12)
    assert [(bar.start, bar.end) for bar in found.bars] == [(0, 4), (4, 10)]
    assert found.title == "A layer: 10.0 µs, 6.0 MB, 60% of what a copy moves"
    token = kernels(["embedding", "a", "b", "b", "a", "b"])
    drawn = layer_panel("A layer", ("a", "b"), measured, token, copy=1e12)
    assert [(bar.start, bar.end) for bar in drawn.bars] == [(-2, 10), (8, 20)]


def test_the_same_prefill_gives_the_same_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert len(PREFILL) == len(KINDS)
    timeline = {"copy": 4e12, "bf16": 8e14, "prefills": [prefill(1642), prefill(8192), prefill(32)]}
    file = tmp_path / "prefill.json"
    file.write_text(json.dumps(timeline), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(file), "--output", str(tmp_path)])
    plot.main()
    draw_prefill_layers(timeline, tmp_path / "again.svg")
    picture = (tmp_path / "prefill_layer.svg").read_text(encoding="utf-8")
    assert picture == (tmp_path / "again.svg").read_text(encoding="utf-8")
    assert "A DeltaNet layer, 8192 tokens" in picture
    assert "32 tokens" not in picture
