"""What eigenvalues and mixing matrices say: shares of moduli, phases, memory, ranks, distances."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def modulus_shares(eigenvalues: Tensor, thresholds: Sequence[float]) -> list[float]:
    """Percentages of eigenvalues with modulus in [0, t1], [t1, t2], ..., (t_last, inf).

    Bounds count on both sides, as in the original, so a value on a threshold is counted twice.
    """
    if list(thresholds) != sorted(thresholds) or not thresholds:
        raise ValueError(f"thresholds are {list(thresholds)}; expected some numbers in increasing order")
    modulus = eigenvalues.abs().flatten()
    edges = [0.0, *thresholds]
    inside = [((modulus >= a) & (modulus <= b)) for a, b in itertools.pairwise(edges)]
    return [100 * float(part.double().mean()) for part in [*inside, modulus > edges[-1]]]


def phase(eigenvalues: Tensor) -> Tensor:
    """In degrees, -180 to 180; a negative real eigenvalue has 180."""
    return torch.rad2deg(torch.angle(eigenvalues))


def horizon(decay: Tensor, share: float = 1 / math.e) -> Tensor:
    """Steps until the product of moduli falls below ``share``, counted from the first step on; (...) of (length, ...).

    ``length`` where it does not fall so far.
    """
    remaining = decay.abs().double().clamp(min=1e-300).log().cumsum(0)
    below = remaining < math.log(share)
    first = below.to(torch.int8).argmax(0) + 1
    return torch.where(below.any(0), first, len(decay))


def slice_ranks(phi: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Numerical rank of each (length x length) slice of Phi (length, length, d_out, d_in): (d_out, d_in).

    Singular values up to ``tolerance`` times the largest are nothing.
    """
    values = torch.linalg.svdvals(phi.permute(2, 3, 0, 1).double())
    return (values > tolerance * values[..., :1]).sum(-1)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius distance of two mixing matrices, |a - b| / |a|."""
    if a.shape != b.shape:
        raise ValueError(f"the mixing matrices are {tuple(a.shape)} and {tuple(b.shape)}; expected equal shapes")
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a))
