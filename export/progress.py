"""How far an export is: a bar on a terminal, a line a finished stage elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Announces stages one after the other, each with the seconds it took. Use as a context manager."""

    def __init__(self, stages: Sequence[str], stream: TextIO) -> None:
        """`stages` are all the names that `begin` will be called with, in order."""
        self._stages = list(stages)
        self._stream = stream
        self._done = 0
        self._began = self._stage_began = time.monotonic()
        self._current: str | None = None
        self._bar: tqdm[None] | None = None
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        if stream.isatty():
            self._bar = tqdm(
                total=len(self._stages),
                file=stream,
                bar_format="{bar:20} {n_fmt}/{total_fmt} {desc} [{elapsed}]",
                leave=False,
            )
            self._ticker.start()

    def begin(self, stage: str) -> None:
        """Ends the current stage, if any, and begins `stage`."""
        self._end_stage()
        self._current = stage
        self._stage_began = time.monotonic()
        if self._bar is not None:
            self._bar.set_description_str(stage)

    def note(self, detail: str) -> None:
        """Shows how far the current stage is, where there is a bar."""
        if self._bar is not None:
            self._bar.set_description_str(f"{self._current}: {detail}")

    def finish(self, message: str) -> None:
        """Ends the last stage and says `message`."""
        self._end_stage()
        self._close()
        print(f"{message} ({time.monotonic() - self._began:.1f} s)", file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _end_stage(self) -> None:
        if self._current is None:
            return
        self._done += 1
        seconds = time.monotonic() - self._stage_began
        line = f"[{self._done}/{len(self._stages)}] {self._current} {seconds:.1f} s"
        self._current = None
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)
            self._bar.update()

    def _tick(self) -> None:
        while not self._stop.wait(0.5):
            if self._bar is not None:
                self._bar.refresh()

    def _close(self) -> None:
        self._stop.set()
        if self._bar is not None:
            self._ticker.join()  # or it would redraw a closed bar
            self._bar.close()
            self._bar = None
