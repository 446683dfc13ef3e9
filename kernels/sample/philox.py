"""Philox4x32-10, the counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011).
"""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF

Words = tuple[torch.Tensor, ...]


def philox(counter: Words, key: Words) -> Words:
    """Four 32-bit counter words and two 32-bit key words -> four random 32-bit words.

    Every word is an i64 tensor of values in [0, 2^32); shapes broadcast. The 64-bit products wrap in i64;
    masking after the shift makes the high word right whatever the sign.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + _KEY_STEPS[0] & _LOW, k1 + _KEY_STEPS[1] & _LOW
    return c0, c1, c2, c3


def uniforms(ids: torch.Tensor, position: int, seed: int) -> torch.Tensor:
    """One number in (0, 1) for each token id (i64 [N]) at a position under a seed -> f64 [N].

    float64, because in float32 the largest words would round to 1 and make their tokens certain.
    """
    zero = torch.zeros_like(ids)
    counter = (ids, zero + (position & _LOW), zero + (position >> 32 & _LOW), zero)
    word = philox(counter, (zero + (seed & _LOW), zero + (seed >> 32 & _LOW)))[0]
    return (word.double() + 0.5) * 2.0**-32
