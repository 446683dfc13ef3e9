"""Runs Qwen3.5-MoE programs: `generate()` for one answer, `Runner` for many. `qwen_runner.export` makes
programs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generation import GenerateOptions, Generation, Timings
    from .runner import Runner, Stream, generate

__all__ = ["GenerateOptions", "Generation", "Runner", "Stream", "Timings", "generate"]


def __getattr__(name: str) -> Any:
    # The compiled runner is loaded by who uses it: exporting does not.
    if name in ("Runner", "Stream", "generate"):
        from . import runner

        return getattr(runner, name)
    if name in ("GenerateOptions", "Generation", "Timings"):
        from . import generation

        return getattr(generation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
