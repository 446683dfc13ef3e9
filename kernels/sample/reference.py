"""The next token in plain PyTorch: penalties, temperature, top-k, top-p, min-p, then a seeded draw.

B sessions, T tokens of the call, S slots, V vocabulary. A draw depends on (logits, seed, position) alone: the
token with the largest sum of log-probability and Gumbel noise, where the noise of a token is a hash of (seed,
position, id).
"""

import torch

from ..rows import check_slots, row_positions
from .philox import uniforms

PROMPT_BIT = 1
GENERATED_BIT = 2


def sample(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    seen: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    presence_penalty: torch.Tensor,
    repetition_penalty: torch.Tensor,
    seed: torch.Tensor,
    generated_from: torch.Tensor,
) -> torch.Tensor:
    """Marks the call's input tokens in `seen`, then draws one token for each session.

    Args:
        logits: f32 [B, V]. A NaN counts as minus infinity.
        tokens: i64 [T], the model's input tokens of this call; T == B unless B is 1.
        position, slot: i64 [B], see `rows`; `position` is that of the first token of each session.
        seen: u8 [S, V], per slot: bit 0 the token is in the prompt, bit 1 it was generated; mutated.
        temperature: f32 [B]; 0 takes the largest logit after penalties, the lowest id of equals.
        top_k: i64 [B], keeps the k largest logits and those equal to the k-th; 0 is off.
        top_p: f32 [B], keeps the most likely tokens until their probabilities reach it; 1 is off.
        min_p: f32 [B], drops tokens less likely than this times the most likely one; 0 is off.
        presence_penalty: f32 [B], subtracted from the logits of generated tokens; 0 is off.
        repetition_penalty: f32 [B] > 0, divides positive and multiplies negative logits of seen tokens; 1 is
            off.
        seed: i64 [B].
        generated_from: i64 [B], the position from which input tokens count as generated, not as prompt.

    Returns:
        i64 [B], the token for the position after the session's last input token.

    Raises:
        IndexError: a slot, position or token is out of range.
    """
    num_sessions, vocabulary = logits.shape
    num_rows = tokens.shape[0]
    slots = check_slots(slot, num_rows, seen.shape[0])
    if len(slots) != num_sessions:
        raise IndexError(f"{len(slots)} slot ids for {num_sessions} rows of logits")
    positions = row_positions(position, slots, num_rows)
    rows_per_session = num_rows // num_sessions
    for row, (token, p) in enumerate(zip(tokens.tolist(), positions, strict=True)):
        if not 0 <= token < vocabulary:
            raise IndexError(f"token {token} is not in [0, {vocabulary})")
        session = row // rows_per_session
        seen[slots[session], token] |= GENERATED_BIT if p >= int(generated_from[session]) else PROMPT_BIT
    chosen = []
    for i, s in enumerate(slots):
        penalized = _penalize(logits[i], seen[s], float(presence_penalty[i]), float(repetition_penalty[i]))
        best = int(penalized.argmax())
        if float(temperature[i]) <= 0 or not penalized[best].isfinite():
            chosen.append(best)
            continue
        # Relative to the largest, so that no temperature above zero overflows.
        scaled = (penalized - penalized[best]) / temperature[i]
        kept = filter_logits(scaled, int(top_k[i]), float(top_p[i]), float(min_p[i]))
        last_position = positions[i * rows_per_session + rows_per_session - 1]
        chosen.append(_draw(kept, last_position, int(seed[i])))
    return torch.tensor(chosen, dtype=torch.int64, device=logits.device)


def _penalize(logits: torch.Tensor, seen: torch.Tensor, presence: float, repetition: float) -> torch.Tensor:
    """logits f32 [V], seen u8 [V] -> f32 [V] without NaN."""
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(seen != 0, repeated, logits)
    logits = torch.where(seen & GENERATED_BIT != 0, logits - presence, logits)
    return torch.where(logits.isnan(), -torch.inf, logits)


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """f32 [V] -> the same with -inf for every token that top-k, top-p (of what top-k left) or min-p drops."""
    if 0 < top_k < logits.shape[0]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        probabilities = ordered.double().softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        dropped = before >= top_p
        dropped[0] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(0, order, dropped), -torch.inf)
    if min_p > 0:
        logits = logits.masked_fill((logits - logits.max()).exp() < min(min_p, 1.0), -torch.inf)
    return logits


def _draw(logits: torch.Tensor, position: int, seed: int) -> int:
    ids = torch.where(logits > -torch.inf)[0]
    noise = -(-uniforms(ids, position, seed).log()).log()
    return int(ids[(logits[ids].double() + noise).argmax()])
