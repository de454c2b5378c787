"""Losses of training without labels: SimCLR, SimSiam and an autoencoder, under the original's parameter names.

Source: neuroagents-lab/2025-tactile-whisking ``loss_functions``; SimCLR: Chen et al., arXiv 2002.05709; SimSiam: Chen
and He, arXiv 2011.10566.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SimCLRLoss(nn.Module):
    """Two views of a sample find each other among all others of the batch.

    ``neck``: linear, BatchNorm, ReLU, linear, BatchNorm (linears without bias), ``model_output_dim`` to ``hidden_dim``
    to ``embedding_dim``. forward: (2 n, model_output_dim), the two views of a sample in neighbouring rows, to the
    cross entropy of cosines over ``temperature``. Raises ValueError for an odd number of rows.
    """

    def __init__(
        self, model_output_dim: int, hidden_dim: int = 2048, embedding_dim: int = 128, temperature: float = 0.1
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.neck = nn.ModuleDict(
            {
                "fc0": nn.Linear(model_output_dim, hidden_dim, bias=False),
                "bn0": nn.BatchNorm1d(hidden_dim),
                "fc1": nn.Linear(hidden_dim, embedding_dim, bias=False),
                "bn1": nn.BatchNorm1d(embedding_dim),
            }
        )
        for name in ("fc0", "fc1"):
            nn.init.normal_(self.neck[name].weight, std=0.01)  # type: ignore[arg-type]

    def embed(self, x: Tensor) -> Tensor:
        neck = self.neck
        return neck["bn1"](neck["fc1"](F.relu(neck["bn0"](neck["fc0"](x)))))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[0] % 2:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (2 n, features), two views of each sample in a row"
            )
        z = self.embed(x)
        z = z / (z.norm(dim=1, keepdim=True) + 1e-10)
        logits = (z @ z.T / self.temperature).fill_diagonal_(float("-inf"))
        other = torch.arange(x.shape[0], device=x.device) ^ 1
        return F.cross_entropy(logits, other)


def _layer(width_in: int, width: int, *, act: bool = True) -> nn.Sequential:
    layer = nn.Sequential(nn.Linear(width_in, width), nn.BatchNorm1d(width))
    return layer.append(nn.ReLU()) if act else layer


class SimSiamLoss(nn.Module):
    """Each view's prediction is near the other's projection, through which no gradient flows.

    forward: features of the two views, (batch, model_output_dim) each, to the mean negative cosine of both directions.
    """

    def __init__(
        self,
        model_output_dim: int,
        projection_mlp_hidden_dim: int = 2048,
        projection_mlp_output_dim: int = 2048,
        prediction_mlp_hidden_dim: int = 512,
        prediction_mlp_output_dim: int = 2048,
    ) -> None:
        super().__init__()
        hidden, out = projection_mlp_hidden_dim, projection_mlp_output_dim
        self.projection_mlp = nn.Sequential()
        self.projection_mlp.add_module("layer1", _layer(model_output_dim, hidden))
        self.projection_mlp.add_module("layer2", _layer(hidden, hidden))
        self.projection_mlp.add_module("layer3", _layer(hidden, out, act=False))
        self.prediction_mlp = nn.Sequential()
        self.prediction_mlp.add_module("layer1", _layer(out, prediction_mlp_hidden_dim))
        self.prediction_mlp.add_module("layer2", nn.Linear(prediction_mlp_hidden_dim, prediction_mlp_output_dim))

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z1, z2 = self.projection_mlp(x1), self.projection_mlp(x2)
        p1, p2 = self.prediction_mlp(z1), self.prediction_mlp(z2)
        return -0.5 * (_cosine(p1, z2.detach()) + _cosine(p2, z1.detach()))


def _cosine(p: Tensor, z: Tensor) -> Tensor:
    return ((p / p.norm(dim=1, keepdim=True)) * (z / z.norm(dim=1, keepdim=True))).sum(1).mean()


class AutoEncoderLoss(nn.Module):
    """Every frame is rebuilt from its features: a linear layer to a small map, transposed convolutions to C channels.

    forward: features (batch, time, model_output_dim) and frames (batch, time, C, H, W) to half the squared error plus
    ``l1_weighting`` times the mean absolute feature.
    """

    def __init__(
        self,
        model_output_dim: int,
        C: int,
        H: int,
        W: int,
        num_deconv: int = 3,
        reduction: str = "mean",
        l1_weighting: float = 1e-4,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'sum'")
        self.reduction, self.l1_weighting, self.size = reduction, l1_weighting, (H, W)
        first = min(C, model_output_dim // (H * W) + 1)
        layers: list[nn.Module] = []
        for i in range(num_deconv):
            layers += [nn.ConvTranspose2d(C if i else first, C, 3, 1, 1), nn.ReLU()]
        self.decoder = nn.ModuleDict(
            {"fc": nn.Linear(model_output_dim, first * H * W), "deconv": nn.Sequential(*layers[:-1])}
        )

    def rebuild(self, features: Tensor) -> Tensor:
        """(batch, time, model_output_dim) to frames (batch, time, C, H, W)."""
        maps = self.decoder["fc"](features.flatten(0, 1)).unflatten(1, (-1, *self.size))
        return self.decoder["deconv"](maps).unflatten(0, features.shape[:2])  # type: ignore[no-any-return]

    def forward(self, hidden_vec: Tensor, inp: Tensor) -> Tensor:
        error = F.mse_loss(self.rebuild(hidden_vec), inp, reduction=self.reduction)
        return 0.5 * error + self.l1_weighting * hidden_vec.abs().mean()


LOSSES: dict[str, type[nn.Module]] = {
    "SimCLRLoss": SimCLRLoss,
    "SimSiamLoss": SimSiamLoss,
    "AutoEncoderLoss": AutoEncoderLoss,
}
