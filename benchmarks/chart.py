"""How every chart looks, and where it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOR, PEER_COLORS = "#4477aa", ("#cc6677", "#997700")
FAINT = "#888888"


def pyplot() -> Any:
    """matplotlib's, set so that the same data gives the same bytes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "qwen_runner", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    """White behind it, so that it reads the same on a dark page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")
    pyplot().close(figure)
    print(path)
