"""Measures of how evenly experts are loaded, and the values that chance alone would give (the floors).

Where experts have target shares (`balance.shares`), evenly means in proportion to them: the target of expert i is
t_i = s_i * sum(c) instead of the mean load, and the floors are those of assignments drawn with the probabilities s.

Shapes: L MoE layers, E routed experts of a layer, M batches. Every measure reduces the last dim, the experts.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_moe.policies.shares import Shares


def max_vio(load_LE: Tensor, shares: Shares = None) -> Tensor:
    """Maximal violation of balance, (max load - mean load) / mean load; with target shares max (c_i - t_i) / t_i.

    Args:
        load_LE: [L, E] or [E] int64, assignments that each expert received.
        shares: The target shares.

    Returns:
        [L] or [] float64, dimensionless; 0 for a layer that received no assignment.

    Raises:
        TypeError: The load is not int64.
        ValueError: The load has another number of dims, no expert, or a negative count.

    Source: Wang et al. 2024, arXiv 2408.15664, equation 4.
    """
    counts_LE = _checked(load_LE).double()
    if shares is not None:
        return _relative(counts_LE, shares).amax(dim=-1)
    mean_L = counts_LE.mean(dim=-1)
    return _where_loaded(mean_L, (counts_LE.amax(dim=-1) - mean_L) / mean_L, empty=0.0)


def load_cov(load_LE: Tensor, shares: Shares = None) -> Tensor:
    """Coefficient of variation of the load, population standard deviation / mean.

    With target shares the root mean square of (c_i - t_i) / t_i, which is the same for equal ones.

    Args:
        load_LE: [L, E] or [E] int64, assignments that each expert received.
        shares: The target shares.

    Returns:
        [L] or [] float64, dimensionless; 0 for a layer that received no assignment.

    Raises:
        TypeError, ValueError: As `max_vio`.
    """
    counts_LE = _checked(load_LE).double()
    if shares is not None:
        return _relative(counts_LE, shares).square().mean(dim=-1).sqrt()
    mean_L = counts_LE.mean(dim=-1)
    variance_L = (counts_LE - mean_L.unsqueeze(-1)).square().mean(dim=-1)
    return _where_loaded(mean_L, variance_L.sqrt() / mean_L, empty=0.0)


def load_deviation_percent(load_LE: Tensor, shares: Shares = None) -> Tensor:
    """Standard deviation over the experts of their shares of the assignments, in percent: 100 * CoV / E.

    With target shares, the root mean square difference from them.

    Args:
        load_LE: [L, E] or [E] int64, assignments that each expert received.
        shares: The target shares.

    Returns:
        [L] or [] float64, percent of the layer's assignments; 0 for a layer that received none.

    Raises:
        TypeError, ValueError: As `max_vio`.
    """
    if shares is None:
        return 100.0 * load_cov(load_LE) / load_LE.shape[-1]
    counts_LE = _checked(load_LE).double()
    difference_LE = _relative(counts_LE, shares) * counts_LE.new_tensor(shares)
    return 100.0 * difference_LE.square().mean(dim=-1).sqrt()


def load_entropy(load_LE: Tensor, shares: Shares = None) -> Tensor:
    """Shannon entropy of the shares of the load, divided by log E.

    With target shares 1 - KL(load, shares) / log E, which is the same for equal ones.

    Args:
        load_LE: [L, E] or [E] int64, assignments that each expert received.
        shares: The target shares.

    Returns:
        [L] or [] float64 in 0..1: 1 when every expert receives the same, 0 when one receives all (with target shares:
        its target, and below 0 when one with a small target receives all).
        1 for a layer of one expert and for a layer that received no assignment.

    Raises:
        TypeError, ValueError: As `max_vio`.
    """
    counts_LE = _checked(load_LE).double()
    total_L = counts_LE.sum(dim=-1)
    experts = counts_LE.shape[-1]
    if experts == 1:
        return torch.ones_like(total_L)
    share_LE = counts_LE / total_L.unsqueeze(-1)
    entropy_L = torch.special.entr(share_LE).sum(dim=-1)
    if shares is not None:
        entropy_L = entropy_L + (share_LE * share_LE.new_tensor(shares).log()).sum(dim=-1) + math.log(experts)
    return _where_loaded(total_L, entropy_L / math.log(experts), empty=1.0)


def dead_experts(load_LE: Tensor) -> Tensor:
    """Number of experts that received nothing.

    Args:
        load_LE: [L, E] or [E] int64, assignments that each expert received.

    Returns:
        [L] or [] int64.

    Raises:
        TypeError, ValueError: As `max_vio`.
    """
    return (_checked(load_LE) == 0).sum(dim=-1)


def mean_max_vio(load_ME: Tensor, shares: Shares = None) -> tuple[float, float]:
    """Compute the MaxVio of each of a layer's batches, averaged over the batches, and its floor.

    This is not the MaxVio of the summed load, in which the imbalances of batches cancel.

    Args:
        load_ME: [M, E] int64, assignments that each expert received in each batch; M at least 1.
        shares: The target shares.

    Returns:
        The mean MaxVio, and the mean of the floors with each batch's own assignments.

    Raises:
        TypeError, ValueError: As `max_vio`.
    """
    values_M = max_vio(load_ME, shares)
    floors = [max_vio_floor(load_ME.shape[-1], total, shares) for total in load_ME.sum(dim=-1).tolist()]
    return float(values_M.mean()), math.fsum(floors) / len(floors)


def rank_load(load_LE: Tensor, ranks: int) -> Tensor:
    """Largest / mean number of rows that the expert-parallel ranks receive for their blocks of experts.

    Args:
        load_LE: [L, E] or [E] int64, assignments that each expert received.
        ranks: The expert-parallel degree; rank r holds experts r * E / ranks to (r + 1) * E / ranks - 1.

    Returns:
        [L] or [] float64, 1 and above; 1 for one rank and for a layer that received no assignment. Chance alone
        gives 1 + max_vio_floor(ranks, assignments).

    Raises:
        TypeError, ValueError: As `max_vio`; ValueError where `ranks` does not divide the experts.
    """
    experts = _checked(load_LE).shape[-1]
    if ranks < 1 or experts % ranks:
        raise ValueError(f"ranks={ranks} does not divide {experts} experts; pass the expert-parallel degree")
    return 1.0 + max_vio(load_LE.unflatten(-1, (ranks, experts // ranks)).sum(dim=-1))


def max_vio_floor(experts: int, assignments: int, shares: Shares = None) -> float:
    """Expected MaxVio of a router that sends each assignment to a uniformly drawn expert.

    With target shares, to one drawn with these probabilities.

    The counts are multinomial, nearly jointly normal with mean A/E. Their correlation is that of E independent
    normals of variance A/E after subtracting their average, which does not change the expected maximum; so the
    expected excess is sqrt(A/E) * E[max of E standard normals], and the floor is that over A/E. It is 2 to 3 percent
    too low at A/E = 200, since counts are skewed, and a factor sqrt((E-1)/(E-K)) too high where each token takes K
    different experts. With target shares, the expected maximum is that of independent normals of variance 1/(A s_i).

    Args:
        experts: E, at least 1.
        assignments: A, tokens times experts per token; 0 gives a floor of 0.
        shares: The target shares.

    Raises:
        ValueError: experts below 1 or assignments below 0.
    """
    _check_sizes(experts, assignments)
    if assignments == 0:
        return 0.0
    if shares is not None:
        return _expected_maximum(tuple(share**-0.5 for share in shares)) / math.sqrt(assignments)
    return _expected_maximum_of_normals(experts) * math.sqrt(experts / assignments)


def cov_floor(experts: int, assignments: int, shares: Shares = None) -> float:
    """Root mean square coefficient of variation of uniformly drawn assignments, sqrt((E-1)/A).

    With target shares the root of the mean of (1 - s_i) / (A s_i).

    Exact for the multinomial; a factor sqrt((E-1)/(E-K)) too high where each token takes K different experts.

    Args:
        experts: E, at least 1.
        assignments: A, tokens times experts per token; 0 gives a floor of 0.
        shares: The target shares.

    Raises:
        ValueError: experts below 1 or assignments below 0.
    """
    _check_sizes(experts, assignments)
    if shares is not None and assignments:
        return math.sqrt(math.fsum((1 - share) / share for share in shares) / (experts * assignments))
    return math.sqrt((experts - 1) / assignments) if assignments else 0.0


def load_deviation_percent_floor(experts: int, assignments: int, shares: Shares = None) -> float:
    """`cov_floor` as a standard deviation of shares, 100 * cov_floor / E percent. Arguments and errors as there.

    With target shares 100 times the root of the mean of s_i (1 - s_i) / A.
    """
    if shares is not None and assignments:
        _check_sizes(experts, assignments)
        return 100.0 * math.sqrt(math.fsum(share * (1 - share) for share in shares) / (experts * assignments))
    return 100.0 * cov_floor(experts, assignments) / experts


def load_entropy_floor(experts: int, assignments: int) -> float:
    """Expected `load_entropy` of uniformly drawn assignments, to first order 1 - (E-1) / (2 A ln E), at least 0.

    Chance lowers the entropy of counts by (E-1) / (2A) (Miller 1955), so a balanced router shows this value and not 1.
    The exact decrease is 2 to 3 percent larger at A/E = 10, and 4 to 9 percent at A/E = 5.

    Args:
        experts: E, at least 1; 1 gives 1.
        assignments: A, tokens times experts per token; 0 gives 1, as the measure does.

    Raises:
        ValueError: experts below 1 or assignments below 0.
    """
    _check_sizes(experts, assignments)
    if experts == 1 or assignments == 0:
        return 1.0
    return max(0.0, 1.0 - (experts - 1) / (2 * assignments * math.log(experts)))


def dead_experts_floor(experts: int, assignments: int, shares: Shares = None) -> float:
    """Expected number of experts without one of A uniformly drawn assignments, E * (1 - 1/E)**A.

    With target shares the sum of (1 - s_i)**A.

    Exact for the multinomial; too high where each token takes K different experts.

    Args:
        experts: E, at least 1.
        assignments: A, tokens times experts per token.
        shares: The target shares.

    Raises:
        ValueError: experts below 1 or assignments below 0.
    """
    _check_sizes(experts, assignments)
    if shares is not None:
        return math.fsum((1.0 - share) ** assignments for share in shares)
    return float(experts * (1.0 - 1.0 / experts) ** assignments)


@functools.cache
def _expected_maximum_of_normals(count: int) -> float:
    # E[M] = integral over x > 0 of P(M > x) - P(M < -x), with P(M < x) = Phi(x)**count; negligible beyond 12.
    x = torch.linspace(0.0, 12.0, 4801, dtype=torch.float64)
    above = -torch.expm1(count * torch.special.log_ndtr(x))
    below = torch.exp(count * torch.special.log_ndtr(-x))
    return float(torch.trapezoid(above - below, x))


@functools.cache
def _expected_maximum(deviations: tuple[float, ...]) -> float:
    # The same for independent normals of these standard deviations, where P(M < x) is the product of Phi(x / sigma).
    x = torch.linspace(0.0, 12.0 * max(deviations), 4801, dtype=torch.float64)
    places = x.unsqueeze(-1) / x.new_tensor(deviations)
    above = -torch.expm1(torch.special.log_ndtr(places).sum(dim=-1))
    below = torch.exp(torch.special.log_ndtr(-places).sum(dim=-1))
    return float(torch.trapezoid(above - below, x))


def _relative(counts_LE: Tensor, shares: Sequence[float]) -> Tensor:
    """(c_i - t_i) / t_i of each expert; 0 for a layer without an assignment."""
    if len(shares) != counts_LE.shape[-1]:
        raise ValueError(f"{len(shares)} shares for {counts_LE.shape[-1]} experts; pass one for each")
    total_L1 = counts_LE.sum(dim=-1, keepdim=True)
    target_LE = total_L1 * counts_LE.new_tensor(shares)
    return torch.where(total_L1 > 0, (counts_LE - target_LE) / target_LE, 0.0)


def _where_loaded(total_L: Tensor, measure_L: Tensor, empty: float) -> Tensor:
    return torch.where(total_L > 0, measure_L, torch.full_like(measure_L, empty))


def _checked(load_LE: Tensor) -> Tensor:
    if load_LE.dtype != torch.int64:
        raise TypeError(
            f"load has dtype {load_LE.dtype}; counts are torch.int64, since floats lose single assignments; "
            "count with torch.bincount and sum in int64"
        )
    if load_LE.dim() not in (1, 2) or load_LE.shape[-1] == 0:
        raise ValueError(
            f"load has shape {tuple(load_LE.shape)}; it is [E] or [L, E] with at least one expert; "
            "pass layers of different sizes one at a time"
        )
    if load_LE.numel() and int(load_LE.min()) < 0:
        raise ValueError(
            f"load holds {int(load_LE.min())}; a count is never negative; look for a difference taken twice"
        )
    return load_LE


def _check_sizes(experts: int, assignments: int) -> None:
    if experts < 1:
        raise ValueError(f"experts={experts}; a layer has at least 1; pass the number of routed experts")
    if assignments < 0:
        raise ValueError(f"assignments={assignments}; it is at least 0; pass the sum of the layer's load")
