"""Which session each row of a call belongs to: the convention that attention, gated_delta and sample share.

T rows, B sessions. One slot id: the rows are T consecutive tokens of that slot, from `position[0]` (prefill,
or decode of one session). T > 1 slot ids: row i is one token of `slot[i]` at `position[i]` (batched decode).
"""

import torch


def check_slots(slot: torch.Tensor, num_rows: int, num_slots: int) -> list[int]:
    """Returns `slot` ([1] or [T], i64) as integers.

    Raises:
        IndexError: a slot is not in [0, num_slots), or their number is neither 1 nor T.
    """
    slots = [int(s) for s in slot.tolist()]
    if len(slots) not in (1, num_rows):
        raise IndexError(f"{len(slots)} slot ids for {num_rows} rows: give one, or one a row")
    for s in slots:
        if not 0 <= s < num_slots:
            raise IndexError(f"slot {s} is not in [0, {num_slots})")
    return slots


def row_positions(
    position: torch.Tensor, slots: list[int], num_rows: int, limit: int | None = None
) -> list[int]:
    """Returns the position of each of the T rows, `position` ([1] or [T], i64) following `slots`.

    Raises:
        IndexError: a position is negative or not below `limit`, or their number is not that of the slots.
    """
    given = [int(p) for p in position.tolist()]
    if len(given) != len(slots):
        raise IndexError(f"{len(given)} positions for {len(slots)} slot ids: give one for each")
    positions = given if len(slots) == num_rows else [given[0] + i for i in range(num_rows)]
    for p in positions:
        if p < 0 or (limit is not None and p >= limit):
            raise IndexError(f"position {p} is not in [0, {limit})")
    return positions
