"""Target shares of the load (`balance.shares`): what each expert of a layer is to receive. Needs no torch."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Shares = Sequence[float] | None
"""The target shares of E experts, above 0 with the sum 1; None for equal shares."""
TargetShares = Callable[[int], Shares]
"""Returns the target shares of the E experts of a layer from E."""

SUM_TOLERANCE = 1e-6
"""The largest difference of the sum of shares from 1."""


def equal_shares(experts: int) -> Shares:
    """Return None: each expert has the same target, the mean load."""
    del experts
    return None


def shares_of_all(shares: Sequence[float] | Mapping[str, float], experts: int) -> tuple[float, ...]:
    """Return the share of each expert where some are given by their ids, and the others have equal parts of the rest.

    Args:
        shares: One for each expert, or those of some experts by their ids.
        experts: E, at least as many as there are shares.
    """
    if not isinstance(shares, Mapping):
        return tuple(shares)
    others = experts - len(shares)
    rest = (1.0 - math.fsum(shares.values())) / others if others else 0.0
    return tuple(shares.get(str(expert), rest) for expert in range(experts))


def shares_in_file(given: Any, experts: int) -> Shares:
    """Return the share of each expert from `balance.shares` in a file that may be damaged; None if they are no shares.

    Args:
        given: Of any type.
        experts: E.
    """
    values = list(given.values()) if isinstance(given, dict) else given
    if not isinstance(values, list) or not all(type(value) in (int, float) and value > 0 for value in values):
        return None
    if len(values) > experts or (len(values) < experts and not isinstance(given, dict)):
        return None
    shares = shares_of_all(given, experts)
    return shares if min(shares) > 0 and abs(math.fsum(shares) - 1) <= SUM_TOLERANCE else None


def target_loads(load: Sequence[int], shares: Shares = None) -> list[float]:
    """Return the target load of each expert of a layer: the mean load, or that of the target shares.

    Args:
        load: [E] assignments.
        shares: The target shares.
    """
    total = sum(load)
    return [total / len(load)] * len(load) if shares is None else [total * share for share in shares]


def extreme_loads(load: Sequence[int], shares: Shares = None) -> list[tuple[int, float]]:
    """Find the least and the most loaded expert of a layer.

    Args:
        load: [E] assignments.
        shares: The target shares.

    Returns:
        [(expert, load / target load)], the least first; NaN for a layer that received no assignment.
    """
    has_load = sum(load) > 0
    targets = target_loads(load, shares)
    ratios = [count / target if has_load else math.nan for count, target in zip(load, targets, strict=True)]
    return [(ratios.index(ratio), ratio) for ratio in (min(ratios), max(ratios))]
