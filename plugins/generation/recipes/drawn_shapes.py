"""Small images of shapes, drawn by code: what the DiMSUM demo is trained on, and a classifier to judge its samples."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = ("disc", "ring", "square", "frame", "triangle", "cross", "crescent", "bars")
SIZE = 16


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` images (count, 1, 16, 16) in [-1, 1] and their classes (count,): place, size, angle and tone vary."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES), count)
    r = rng.uniform(3.6, 6.2, count)
    centre = rng.uniform(-1, 1, (2, count)) * (SIZE / 2 - 0.7 - r)
    angle = rng.uniform(-0.35, 0.35, count)
    bright = rng.uniform(0.6, 1.0, count)
    grid = np.arange(SIZE) - (SIZE - 1) / 2
    y, x = (g[None] - c[:, None, None] for g, c in zip(np.meshgrid(grid, grid, indexing="ij"), centre, strict=True))
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u, v = cos * x + sin * y, cos * y - sin * x
    r = r[:, None, None]
    radius = np.hypot(u, v)
    box = np.maximum(np.abs(u), np.abs(v)) - 0.85 * r
    arm = 0.3 * r
    plus = np.minimum(np.maximum(np.abs(u) - arm, np.abs(v) - r), np.maximum(np.abs(v) - arm, np.abs(u) - r))
    roof = np.maximum(0.87 * np.abs(u) + 0.5 * v - 0.5 * r, -v - 0.5 * r)
    stripe = np.abs((v / r + 3) % 0.8 - 0.4) * r - 0.2 * r
    #: signed distances to the edges, negative inside
    edges = np.stack(
        [radius - r, np.abs(radius - 0.75 * r) - 0.22 * r, box, np.abs(box + 0.2 * r) - 0.2 * r, roof,
         plus, np.maximum(radius - r, 0.8 * r - np.hypot(u - 0.5 * r, v)), np.maximum(box, stripe)]
    )  # fmt: skip
    inside = np.clip(0.5 - edges[labels, np.arange(count)], 0, 1)
    images = 2 * bright[:, None, None] * inside - 1
    return torch.from_numpy(images[:, None].astype(np.float32)), torch.from_numpy(labels)


class Judge(nn.Module):
    """A small convolutional classifier of the shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * (SIZE // 4) ** 2, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def train_judge(images: Tensor, labels: Tensor, *, epochs: int = 4, seed: int = 0) -> Judge:
    """A judge trained on drawn images with some noise, so that it does not hang on single pixels."""
    torch.manual_seed(seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(128):
            seen = images[rows] + 0.1 * torch.randn_like(images[rows])
            optimizer.zero_grad()
            F.cross_entropy(judge(seen), labels[rows]).backward()
            optimizer.step()
    return judge.eval()


@torch.no_grad()
def accuracy(judge: Judge, images: Tensor, labels: Tensor) -> float:
    return float((judge(images).argmax(1) == labels).double().mean())


@torch.no_grad()
def frechet(judge: Judge, first: Tensor, second: Tensor) -> float:
    """The Frechet distance of two sets of images in the judge's 64 features (as FID is in Inception's)."""
    means, covs = [], []
    for images in (first, second):
        features = judge.body(images).double()
        means.append(features.mean(0))
        covs.append(torch.cov(features.T))
    values = torch.linalg.eigvals(covs[0] @ covs[1]).real.clamp(min=0).sqrt()
    return float((means[0] - means[1]).square().sum() + covs[0].trace() + covs[1].trace() - 2 * values.sum())
