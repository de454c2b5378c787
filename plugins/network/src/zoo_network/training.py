"""NetMamba's two loops: masked pre-training on any flows, fine-tuning on labelled ones.

Settings as published (arXiv 2405.11449; wangtz19/NetMamba ``src/pre-train.py``, ``src/fine-tune.py``): AdamW with decay
0.05, rates of 1e-3 and 2e-3 for batches of 256 in proportion to the batch, linear warm-up and a cosine, 90 % of the
strides hidden; fine-tuning with rates that fall by 0.75 a layer towards the input and label smoothing 0.1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.runs import Run

from .data import FlowSet
from .flows import to_tensor
from .netmamba import NetMamba, NetMambaPretrain

LOSSES = ("cross-entropy", "class-balanced", "ldam")


def scheduled(step: int, steps: int, warmup: int, rate: float, lowest: float) -> float:
    """Linear from 0 over ``warmup`` steps, then half a cosine to ``lowest``."""
    if step < warmup:
        return rate * (step + 1) / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    return lowest + (rate - lowest) * 0.5 * (1 + math.cos(math.pi * share))


def groups(model: NetMamba | NetMambaPretrain, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Parameter groups for AdamW: vectors, positions and tokens undecayed; with ``layer_decay`` the entry ``scale``
    falls by it for every layer further from the head (embedding 0, block i is i + 1, the rest on top)."""
    found: dict[tuple[int, bool], dict] = {}
    top = model.depth + 1
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = top
        decays = parameter.dim() > 1 and name not in model.no_weight_decay()
        group = {"params": [], "weight_decay": weight_decay if decays else 0.0, "scale": layer_decay ** (top - layer)}
        found.setdefault((layer, decays), group)["params"].append(parameter)
    return list(found.values())


def pretrain(
    model: NetMambaPretrain,
    flows: np.ndarray,
    *,
    steps: int = 150_000,
    batch_size: int = 128,
    base_rate: float = 1e-3,
    lowest_rate: float = 0.0,
    warmup: int | None = None,
    weight_decay: float = 0.05,
    mask_ratio: float = 0.9,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
    run: Run | None = None,
) -> list[float]:
    """Train ``model`` in place to rebuild the hidden strides of ``flows`` (n, bytes) uint8; the loss of every step.

    The rate is base_rate * batch_size / 256. ``warmup`` steps (None: a twentieth). The batches follow ``seed``, masks
    and dropped paths torch's own random state. ``run``: keeps it, and goes on with what it holds. Raises ValueError for
    flows of another size or none, and when a loss is not finite.
    """
    _check(flows, model.byte_length)
    device = model.pos_embed.device
    rising = max(steps // 20, 1) if warmup is None else warmup
    optimizer = torch.optim.AdamW(groups(model, weight_decay), lr=0.0, betas=(0.9, 0.95))
    r = np.random.default_rng(seed)
    run = run or Run()
    losses: list[float] = run.start(model=model, optimizer=optimizer, random=r).get("losses", [])
    model.train()
    for step in range(len(losses), steps):
        rate = scheduled(step, steps, rising, base_rate * batch_size / 256, lowest_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = to_tensor(flows[r.integers(0, len(flows), batch_size)]).to(device)
        loss = model(batch, mask_ratio=mask_ratio)["loss"]
        losses.append(_stepped(loss, optimizer, step))
        if report is not None:
            report(step, losses[-1])
        run.keep(step + 1, losses=losses)
    model.eval()
    return losses


def start_from(model: NetMamba, pretrained: NetMambaPretrain) -> list[str]:
    """Give a classifier the weights of a pre-trained encoder; the head starts near zero (deviation 2e-5).

    Positions are interpolated where the two read flows of another length. Returns what was taken, by name. Raises
    ValueError where widths, depths or strides differ.
    """
    for name in ("embed_dim", "depth", "stride_size"):
        own, other = getattr(model, name), getattr(pretrained, name)
        if own != other:
            raise ValueError(f"{name} is {own} in the classifier and {other} in the pre-trained model; build it equal")
    state = {k: v for k, v in pretrained.state_dict().items() if not k.startswith(("decoder_", "mask_token"))}
    state["pos_embed"] = resized_positions(state["pos_embed"], model.num_patches)
    model.load_state_dict(state, strict=False)
    if isinstance(model.head, nn.Linear):
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
    return sorted(state)


def resized_positions(positions: Tensor, strides: int) -> Tensor:
    """Positions (1, N + 1, D), the class token's last, for another number of strides, linearly between neighbours."""
    own, token = positions[:, :-1], positions[:, -1:]
    if own.shape[1] == strides:
        return positions
    own = F.interpolate(own.transpose(1, 2), size=strides, mode="linear", align_corners=False).transpose(1, 2)
    return torch.cat([own, token], dim=1)


class FlowLoss(nn.Module):
    """The fine-tuning losses: ``cross-entropy`` (with label smoothing), ``class-balanced`` (weights
    (1 - b) / (1 - b^n) for classes of n flows, b = 0.9999; Cui et al., arXiv 1901.05555) and ``ldam`` (margins in
    proportion to n^(-1/4), the largest 0.5, logits times 30; Cao et al., arXiv 1906.07413)."""

    weight: Tensor | None
    margins: Tensor

    def __init__(self, kind: str, counts: np.ndarray, smoothing: float = 0.1) -> None:
        super().__init__()
        if kind not in LOSSES:
            raise ValueError(f"loss is {kind!r}; expected one of {', '.join(LOSSES)}")
        self.kind, self.smoothing = kind, smoothing
        n = torch.as_tensor(np.maximum(counts, 1)).double()
        weight = None
        if kind == "class-balanced":
            weight = (1 - 0.9999) / (1 - 0.9999**n)
            weight = (weight / weight.sum() * len(n)).float()
        self.register_buffer("weight", weight)
        margins = n**-0.25
        self.register_buffer("margins", (margins * (0.5 / margins.max())).float())

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.kind == "ldam":
            shifted = logits - F.one_hot(labels, logits.shape[1]) * self.margins[labels, None]
            return F.cross_entropy(30 * shifted, labels)
        return F.cross_entropy(logits, labels, weight=self.weight, label_smoothing=self.smoothing)


@dataclass
class Epoch:
    """One epoch's figures."""

    number: int
    loss: float
    accuracy: float  #: on the validation flows


def finetune(
    model: NetMamba,
    train: FlowSet,
    valid: FlowSet,
    *,
    epochs: int = 120,
    batch_size: int = 64,
    base_rate: float = 2e-3,
    lowest_rate: float = 1e-6,
    warmup_epochs: int = 20,
    weight_decay: float = 0.05,
    layer_decay: float = 0.75,
    loss: str = "cross-entropy",
    smoothing: float = 0.1,
    seed: int = 0,
    report: Callable[[Epoch], None] | None = None,
    run: Run | None = None,
) -> list[Epoch]:
    """Train a classifier in place and leave it at the epoch with the best validation accuracy (the first of equals).

    ``run``: keeps it epoch by epoch, and goes on with what it holds. Raises ValueError where flows or classes do not
    fit the model, and when a loss is not finite.
    """
    for flows in (train, valid):
        _check(flows.flows, model.byte_length)
        if len(flows.classes) != model.num_classes:
            raise ValueError(f"the flows have {len(flows.classes)} classes, the model {model.num_classes}")
    device = model.pos_embed.device
    criterion = FlowLoss(loss, train.counts(), smoothing).to(device)
    optimizer = torch.optim.AdamW(groups(model, weight_decay, layer_decay), lr=0.0)
    r = np.random.default_rng(seed)
    a_pass = max(len(train) // batch_size, 1)
    steps, rising = epochs * a_pass, warmup_epochs * a_pass
    run = run or Run()
    began = run.start(model=model, optimizer=optimizer, random=r)
    best, kept = began.get("best", -1.0), began.get("kept", {})
    found = [Epoch(**row) for row in began.get("epochs", [])]
    for number in range(len(found), epochs):
        model.train()
        order, total = r.permutation(len(train)), 0.0
        for i in range(a_pass):
            rate = scheduled(number * a_pass + i, steps, rising, base_rate * batch_size / 256, lowest_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            rows = order[i * batch_size : (i + 1) * batch_size]
            logits = model(to_tensor(train.flows[rows]).to(device))
            value = criterion(logits, torch.from_numpy(train.labels[rows]).to(device))
            total += _stepped(value, optimizer, number * a_pass + i)
        found.append(Epoch(number, total / a_pass, float((predict(model, valid.flows) == valid.labels).mean())))
        if found[-1].accuracy > best:
            best, kept = found[-1].accuracy, copy.deepcopy(model.state_dict())
        if report is not None:
            report(found[-1])
        run.keep(number + 1, best=best, kept=kept, epochs=[asdict(epoch) for epoch in found])
    if kept:
        model.load_state_dict(kept)
    model.eval()
    return found


@torch.inference_mode()
def predict(model: NetMamba, flows: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """The class of each flow, (n,) int64."""
    model.eval()
    device = model.pos_embed.device
    parts = [flows[i : i + batch_size] for i in range(0, len(flows), batch_size)]
    return np.concatenate([model(to_tensor(p).to(device)).argmax(1).cpu().numpy() for p in parts] or [np.zeros(0, int)])


def scores(predicted: np.ndarray, labels: np.ndarray, classes: list[str]) -> tuple[dict[str, float], dict]:
    """Accuracy and the weighted precision, recall and F1 that the paper prints; and the same of each class."""
    per_class, weighted = {}, {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    for i, name in enumerate(classes):
        hit = float(((predicted == i) & (labels == i)).sum())
        said, true = float((predicted == i).sum()), float((labels == i).sum())
        precision, recall = hit / said if said else 0.0, hit / true if true else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
        per_class[name] = {"flows": true, "precision": precision, "recall": recall, "f1": f1}
        for key, value in (("precision", precision), ("recall", recall), ("f1", f1)):
            weighted[key] += value * true / max(len(labels), 1)
    return {"accuracy": float((predicted == labels).mean()) if len(labels) else 0.0, **weighted}, per_class


def _check(flows: np.ndarray, size: int) -> None:
    if flows.ndim != 2 or flows.dtype != np.uint8 or flows.shape[1] != size or not len(flows):
        raise ValueError(f"flows are {flows.dtype} of shape {flows.shape}; expected uint8 (n, {size}) with n above 0")


def _stepped(loss: Tensor, optimizer: torch.optim.Optimizer, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value} at step {step}; a lower rate may help")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return value
