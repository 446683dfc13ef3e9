"""Settings for tests and benchmarks of sampling."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SampleCase:
    """One set of sampling options, as `reference.sample` takes them, over a vocabulary."""

    vocabulary: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0


CORRECTNESS = [
    SampleCase(50, temperature=0.0),
    SampleCase(50, temperature=0.0, presence_penalty=1.5, repetition_penalty=1.3),
    SampleCase(50),
    SampleCase(1000, temperature=0.6, top_k=20, top_p=0.95),
    SampleCase(1000, temperature=1.5, top_k=1),
    SampleCase(1000, temperature=1.2, top_p=0.7),
    SampleCase(1000, temperature=0.8, min_p=0.05),
    SampleCase(1000, temperature=0.9, top_k=5000, top_p=0.0),
    SampleCase(300, 0.7, 40, 0.8, 0.1, 1.5, 1.1),
    SampleCase(1, temperature=1.0, top_k=1),
]
BENCHMARK = [
    SampleCase(248320, temperature=0.0),
    SampleCase(248320, temperature=0.7, top_k=20, top_p=0.8),
    SampleCase(248320, temperature=1.0, top_p=0.95),
    SampleCase(248320, temperature=1.0),
    SampleCase(4096, temperature=0.7, top_k=20, top_p=0.8),
]


def arguments(
    case: SampleCase,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    seen: torch.Tensor,
    seed: torch.Tensor,
    generated_from: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The operator's arguments with the case's options for each row of logits [B, V]."""
    sessions = logits.shape[0]
    options = (
        torch.full((sessions,), case.temperature),
        torch.full((sessions,), case.top_k, dtype=torch.int64),
        torch.full((sessions,), case.top_p),
        torch.full((sessions,), case.min_p),
        torch.full((sessions,), case.presence_penalty),
        torch.full((sessions,), case.repetition_penalty),
    )
    return (logits, tokens, position, slot, seen, *options, seed, generated_from)
