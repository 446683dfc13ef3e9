"""The Python front end of the C++ runner."""

from __future__ import annotations

import asyncio
import atexit
import json
import queue
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack, cast

from . import _core
from .chat_jinja import ChatTemplate
from .generation import FinishReason, GenerateOptions, Generation, Timings, token_ids

Prompt = str | bytes | Sequence[int]
ExpertActivations = Literal["bfloat16", "int8", "float8"]


def generate(
    program: str | PathLike[str] | Runner,
    prompt: Prompt,
    *,
    cuda_graph: bool | None = None,
    expert_activations: ExpertActivations | None = None,
    **options: Unpack[GenerateOptions],
) -> Generation:
    """Answers one prompt. `program` is an exported program's folder, loaded for this call, or a `Runner`.

    Options and errors are those of `Runner.generate`; `cuda_graph` and `expert_activations` are `Runner`'s,
    not for one that is loaded.
    """
    if isinstance(program, Runner):
        for name, value in (("cuda_graph", cuda_graph), ("expert_activations", expert_activations)):
            if value is not None:
                raise TypeError(f"{name} is an option of loading a program: give it to Runner()")
        return program.generate(prompt, **options)
    with Runner(program, cuda_graph=cuda_graph, expert_activations=expert_activations) as runner:
        return runner.generate(prompt, **options)


class Runner:
    """A loaded program. Use it as a context manager, or `close()` it.

    Thread-safe: answers asked for at the same time each take a state slot of the program and are computed in
    turns, a token at a time; `generate_batch` computes several in one step.

    On a GPU, decoding is replayed from a CUDA graph unless `cuda_graph` is False, which is slower and gives
    the same tokens. `expert_activations` is what prefill there rounds the routed experts' inputs to:
    "bfloat16", unless it is "int8" or "float8", which are faster and less exact. `cuda_graph=True` and
    another type than bfloat16 warn on a cpu program, where they do nothing.

    Raises FileNotFoundError where the folder or a file is missing, RuntimeError where the program is damaged
    or made for another target, MemoryError, OSError.
    """

    def __init__(
        self,
        program: str | PathLike[str],
        *,
        cuda_graph: bool | None = None,
        expert_activations: ExpertActivations | None = None,
    ) -> None:
        self._path = Path(program).absolute()  # the chat template is read later
        activations = expert_activations or "bfloat16"
        self._engine: _core.Engine | None = _core.Engine(str(self._path), cuda_graph, activations)
        if self._engine.device == "cpu":
            for name, given in (
                ("cuda_graph", cuda_graph),
                ("expert_activations", activations != "bfloat16"),
            ):
                if given:
                    warnings.warn(f"{name} has no effect on a cpu program", RuntimeWarning, stacklevel=2)
        self._lock = threading.Lock()
        self._running: set[_core.Cancel] = set()
        self._template: ChatTemplate | None = None
        self._added_tokens: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what runs and lets go of the program, whose memory is freed when the last answer ends."""
        self._engine = None  # first: an answer either begins before, and is cancelled, or not at all
        self.cancel()

    def generate(
        self,
        prompt: Prompt,
        *,
        on_piece: Callable[[str], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Answers `prompt`: text, in which special tokens are not recognized, or token ids.

        `on_piece` is called with every piece of text as it comes. Raises ValueError for an option, a prompt
        that is empty or a prompt that does not fit, naming the value and what is allowed; TypeError for the
        type of the prompt or of an option.
        """
        return self._generate(self._encode(prompt), on_piece, options)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        each: Sequence[GenerateOptions] | None = None,
        on_piece: Callable[[int, str], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]:
        """Answers several prompts: the answers in their order.

        On a GPU a decode step advances as many answers together as the program was exported for (--batch),
        which costs little more than one; when an answer ends, the next prompt takes its place. On a cpu
        program they are answered one after the other.

        `options` hold for all prompts, and those of `each` (as many as prompts) for one before them. Without
        a seed each answer draws its own. `on_piece` is called with a prompt's index and a piece of its
        answer. Errors are those of `generate`: one prompt that will not do, and nothing is answered.
        """
        tokens = [self._encode(prompt) for prompt in prompts]
        every: list[GenerateOptions] = [
            cast(GenerateOptions, {**options, **one})
            for one in (each if each is not None else [{}] * len(tokens))
        ]
        if len(every) != len(tokens):
            raise ValueError(f"each has options for {len(every)} prompts, there are {len(tokens)}")
        cancel = _core.Cancel()
        engine = self._begin(cancel)
        try:
            answers = engine.generate_batch(tokens, cast(list[dict[str, Any]], every), on_piece, cancel)
        finally:
            self._end(cancel)
        return [_generation(answer, one) for answer, one in zip(answers, every, strict=True)]

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """The answer as an iterator of pieces of text; its `result` is the `Generation` when the last was
        taken.

        Errors are those of `generate`: a closed runner and a prompt that is neither text nor token ids raise
        at once, the rest by the iteration.
        """
        tokens = self._encode(prompt)
        cancel = _core.Cancel()
        engine = self._begin(cancel)  # here, not in the thread: cancel() right after must find it

        def run(on_piece: Callable[[str], None]) -> Generation:
            return self._answer(engine, tokens, on_piece, cancel, options)

        return Stream(run, cancel.set)

    async def astream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncIterator[str]:
        """`stream` for asyncio: waiting for a piece, or for the end of an answer left early, does not block
        the event loop.
        """
        pieces = self.stream(prompt, **options)
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
        finally:
            await asyncio.to_thread(pieces.close)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        on_piece: Callable[[str], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Answers a conversation through the checkpoint's own chat template.

        `messages` are dictionaries with `role` and `content`, `tools` JSON schemas; `thinking=None` leaves it
        to the template. Special tokens are recognized where the template wrote them, not in what a message
        says. Raises ValueError where the program has no template or the template refuses, else as `generate`.
        """
        tokens = self.encode_chat(messages, tools=tools, thinking=thinking)
        return self._generate(tokens, on_piece, options)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The token ids of a conversation as `chat` feeds them; arguments and errors are those of `chat`."""
        if self._template is None:
            template = ChatTemplate.load(self._path)
            if template is None:
                raise ValueError(f"{self._path} has no chat template; use generate() with a whole prompt")
            tokenizer = json.loads((self._path / "tokenizer.json").read_text(encoding="utf-8"))
            self._added_tokens = [token["content"] for token in tokenizer.get("added_tokens", [])]
            self._template = template
        segments = self._template.render_segments(
            messages,
            tools,
            added_tokens=self._added_tokens,
            enable_thinking=thinking,
            add_generation_prompt=add_generation_prompt,
        )
        engine = self._loaded()
        return [token for text, special in segments for token in engine.tokenize(text, special)]

    def tokenize(self, text: str | bytes, *, parse_special: bool = False) -> list[int]:
        """Token ids of `text`; with `parse_special`, special tokens in it are recognized."""
        return self._loaded().tokenize(text, parse_special)

    def detokenize(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids; an id over the vocabulary has none."""
        return self._loaded().detokenize(token_ids(tokens, "tokens must be token ids"), skip_special)

    def cancel(self) -> None:
        """Ends every answer that is being generated, from any thread; they finish with reason "cancelled"."""
        with self._lock:
            for cancel in self._running:
                cancel.set()

    @property
    def memory(self) -> dict[str, int]:
        """Bytes: peak_resident_bytes and resident_bytes of the process, weight_bytes and state_bytes of the
        program.
        """
        return self._loaded().memory

    @property
    def gpu(self) -> dict[str, Any] | None:
        """Of a cuda program: the GPU's `name`; bytes of its memory: allocated_bytes by this runner,
        used_bytes by every process, total_bytes; graph_nodes of the CUDA graph, 0 before there is one.
        None for a cpu program.
        """
        return self._loaded().gpu

    @property
    def max_seq_len(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._loaded().max_seq_len

    def _loaded(self) -> _core.Engine:
        engine = self._engine
        if engine is None:
            raise ValueError("the runner is closed; make a new one")
        return engine

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str | bytes):
            return self._loaded().tokenize(prompt, False)
        return token_ids(prompt, "a prompt must be text or token ids")

    def _begin(self, cancel: _core.Cancel) -> _core.Engine:
        with self._lock:
            engine = self._loaded()
            self._running.add(cancel)
        return engine

    def _end(self, cancel: _core.Cancel) -> None:
        with self._lock:
            self._running.discard(cancel)

    def _generate(
        self, tokens: list[int], on_piece: Callable[[str], None] | None, options: GenerateOptions
    ) -> Generation:
        cancel = _core.Cancel()
        return self._answer(self._begin(cancel), tokens, on_piece, cancel, options)

    def _answer(
        self,
        engine: _core.Engine,
        tokens: list[int],
        on_piece: Callable[[str], None] | None,
        cancel: _core.Cancel,
        options: GenerateOptions,
    ) -> Generation:
        try:
            answer = engine.generate(tokens, cast(dict[str, Any], options), on_piece, cancel)
        finally:
            self._end(cancel)
        return _generation(answer, options)


def _generation(answer: dict[str, Any], options: GenerateOptions) -> Generation:
    return Generation(
        text=answer["text"],
        tokens=answer["tokens"],
        prompt_tokens=answer["prompt_tokens"],
        finish_reason=cast(FinishReason, answer["finish_reason"]),
        seed=answer["seed"],
        timings=Timings(**answer["timings"]),
        logprobs=answer["logprobs"] if options.get("logprobs") else None,
    )


class Stream(Iterator[str]):
    """Pieces of an answer as they come. Leaving the `with` block, `close()` or dropping it cancels the
    answer.
    """

    def __init__(
        self, run: Callable[[Callable[[str], None]], Generation], cancel: Callable[[], None]
    ) -> None:
        self.result: Generation | None = None
        """The whole answer, once the iteration has ended."""
        self._cancel = cancel
        self._pieces: queue.SimpleQueue[str | Generation | BaseException] = queue.SimpleQueue()
        self._done = False
        self._thread = threading.Thread(target=_produce, args=(run, self._pieces), daemon=True)
        _producing[self._thread] = cancel
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        if self._done:
            raise StopIteration
        item = self._pieces.get()
        if isinstance(item, str):
            return item
        self._done = True
        self._thread.join()
        if isinstance(item, BaseException):
            raise item
        self.result = item
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the answer and waits until the runner has let go of it."""
        self._cancel()
        self._thread.join()
        self._done = True

    def __del__(self) -> None:
        self._cancel()


_producing: dict[threading.Thread, Callable[[], None]] = {}
"""The streams' running threads, each with what cancels its answer."""


def _produce(
    run: Callable[[Callable[[str], None]], Generation],
    pieces: queue.SimpleQueue[str | Generation | BaseException],
) -> None:
    try:
        pieces.put(run(pieces.put))
    except BaseException as error:
        pieces.put(error)
    finally:
        del _producing[threading.current_thread()]


@atexit.register
def _end_streams() -> None:
    # A thread inside the model that asks for the GIL when Python has ended would end the process.
    for thread, cancel in list(_producing.items()):
        cancel()
        if thread.is_alive():
            thread.join()
