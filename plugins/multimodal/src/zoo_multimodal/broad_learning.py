"""The broad learning system: a wide layer of feature nodes and enhancement nodes, trained or solved in closed form.

Source: Chen and Liu, "Broad Learning System: An Effective and Efficient Incremental Learning System Without the Need
for Deep Architecture", IEEE TNNLS 29(1), 2018, section III.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.layers import Linear, Recomputed


class BroadLearning(Recomputed):
    """``[Z, H] W_out + b``: feature nodes ``Z_i = phi(x W_i + b_i)``, enhancement nodes ``H_j = tanh(Z V_j + c_j)``.

    Arguments: ``dim_in``, ``dim_out``; ``features`` groups of ``feature_width`` nodes; ``enhancements`` groups of
    ``enhancement_width``; ``phi``: "linear" or "tanh". All groups of a kind are one product. Trained by
    back-propagation, or classically: random nodes and :meth:`solve`.
    """

    def __init__(
        self, dim_in: int, dim_out: int, features: int = 4, feature_width: int = 32, enhancements: int = 4,
        enhancement_width: int = 32, phi: str = "tanh",
    ) -> None:  # fmt: skip
        super().__init__()
        if phi not in ("linear", "tanh"):
            raise ValueError(f"phi is {phi!r}; expected 'linear' or 'tanh'")
        if min(features, feature_width, enhancements, enhancement_width) < 1:
            raise ValueError(
                f"features {features} of {feature_width}, enhancements {enhancements} of {enhancement_width}; expected "
                "1 or more of each"
            )
        self.phi = phi
        wide, wider = features * feature_width, enhancements * enhancement_width
        self.feature, self.enhancement = Linear(dim_in, wide), Linear(wide, wider)
        self.out = Linear(wide + wider, dim_out)

    def nodes(self, x: Tensor) -> Tensor:
        """(..., dim_in) to the nodes A = [Z, H], (..., nodes)."""
        z = self.feature(x)
        z = torch.tanh(z) if self.phi == "tanh" else z
        return torch.cat([z, torch.tanh(self.enhancement(z))], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) to (..., dim_out)."""
        return self.out(self.nodes(x))

    @torch.no_grad()
    def solve(self, x: Tensor, y: Tensor, penalty: float, intercept: bool = True) -> None:
        """Set W_out by ridge regression of y (rows, dim_out) on the nodes of x (rows, dim_in); W_i and V_j stay.

        intercept: b is free of the penalty; without it b = 0 and W_out = (A^T A + penalty I)^-1 A^T y, as in the paper.
        """
        weight, bias = ridge(self.nodes(x), y, penalty, intercept)
        self.out.weight.copy_(weight.t())
        self.out.bias.copy_(bias)


def ridge(A: Tensor, y: Tensor, penalty: float, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """Weights (nodes, outputs) and b (outputs,) that minimise ``|A W + b - y|^2 + penalty |W|^2``, in float64.

    A: (rows, nodes); y: (rows, outputs). Without ``intercept`` b is 0. Raises ValueError for a penalty below 0, and for
    0 where that has no single answer.
    """
    if penalty < 0:
        raise ValueError(f"penalty is {penalty}; expected 0 or more")
    A, y = A.double(), y.double()
    middle, level = A.new_zeros(A.shape[1]), y.new_zeros(y.shape[1])
    if intercept:
        middle, level = A.mean(0), y.mean(0)
    A, y = A - middle, y - level
    square = A.t() @ A + penalty * torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    factor, failed = torch.linalg.cholesky_ex(square)
    if int(failed):
        raise ValueError(
            f"{A.shape[0]} rows do not determine the weights of {A.shape[1]} nodes with penalty {penalty}; give a "
            "larger penalty"
        )
    weight = torch.cholesky_solve(A.t() @ y, factor)
    return weight, level - middle @ weight
