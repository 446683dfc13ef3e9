"""The prefill kernels of the experts in each of the tiles and orders of tiles that they can have."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from qwen_runner.kernels.cuda_native import Gpu
from qwen_runner.kernels.tune.sweep import Measured, measure
from qwen_runner.kernels.tune.workloads import CONFIGS, QWEN3_5_35B_A3B, Config, Model, Work, workloads

EXPERT_ROWS = (2, 4, 8, 16, 32, 64, 128, 256)  # expected of each: 64 to 8192 tokens
# Token tiles that all meet a block of features before any meets the next (linear/gemm_loader.cuh).
TOGETHER = (1, 2, 4, 8, 16)
# Tiles whose order is measured: the others are for few tokens.
ORDERED = ((32, 8), (64, 16), (64, 32))


@dataclass(frozen=True)
class OrderedWork(Work):
    """Of each tile that has an order all orders: {tokens, rows, together, tile_each} (PrefillConfig)."""

    @property
    def configs(self) -> tuple[Config, ...]:
        plain = CONFIGS[self.phase, self.kernel]
        orders = [(together, each) for each in (False, True) for together in TOGETHER]
        # The first order is what a tile has without one.
        return plain + tuple((*tile, *order) for tile in plain if tile in ORDERED for order in orders[1:])


def measure_grid(
    gpu: Gpu, group: int, model: Model = QWEN3_5_35B_A3B, expert_rows: tuple[int, ...] = EXPERT_ROWS
) -> list[Measured]:
    """Each configuration is checked against the default one before it is timed."""
    works = workloads(gpu, ("moe",), group, model, expert_rows=expert_rows)
    return [
        measure(gpu, OrderedWork(**{field.name: getattr(work, field.name) for field in fields(work)}))
        for work in works
        if work.phase == "prefill"
    ]


def label(config: str) -> str:
    """Of a key of Measured.times."""
    tokens, rows, *order = config.split(",")
    tile = f"{tokens} × {16 * int(rows)}"
    if (int(tokens), int(rows)) not in ORDERED:
        return tile
    together, each = order or ("1", "False")
    return f"{tile}, {'a block a tile' if each == 'True' else 'persistent'}, {together} together"


def grid_tables(grid: Sequence[Measured], model: Model = QWEN3_5_35B_A3B) -> str:
    """A table a kernel: a line a configuration, a column a length, the fastest bold; at last its speed."""
    parts = []
    for kernel in dict.fromkeys(row.kernel for row in grid):
        rows = [row for row in grid if row.kernel == kernel]
        lengths = [row.rows * model.experts // model.top_k for row in rows]
        lines = [
            f"{kernel}, microseconds (a tile is tokens × features):\n",
            f"| tile, order | {' | '.join(f'{tokens} tokens' for tokens in lengths)} |",
            "|" + "---|" * (len(lengths) + 1),
        ]
        fastest = [min(us for us in row.times.values() if us is not None) for row in rows]
        for config in sorted({config for row in rows for config in row.times}, key=_place):
            times = [row.times.get(config) for row in rows]
            cells = [
                "–" if us is None else f"**{us:.1f}**" if us == best else f"{us:.1f}"
                for us, best in zip(times, fastest, strict=True)
            ]
            lines.append(f"| {label(config)} | {' | '.join(cells)} |")
        # Two operations a multiply-add of each of a token's choices.
        speeds = [
            2e-6 * row.rows * model.experts * row.n * row.k / us
            for row, us in zip(rows, fastest, strict=True)
        ]
        lines.append(f"| fastest, TFLOP/s | {' | '.join(f'{speed:.0f}' for speed in speeds)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _place(config: str) -> tuple[int, int, bool, int]:
    tokens, rows, *order = config.split(",")
    together, each = order or ("1", "False")
    return int(tokens), int(rows), each == "True", int(together)
