"""Pre-training of a backbone by denoising, fine-tuning of what reads it, averaged weights, and the measures.

Source: arXiv 2508.14086, section IV; jhpuah/EEGDM ``model/diffusion_model_pl.py``, ``model/classifier_pl.py`` and
``conf``; averaging as ema_pytorch does it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.runs import Run

from .backbone import DiffusionBackbone
from .data import WindowSet
from .diffusion import diffusion_loss
from .fusion import EEGClassifier


class Averaged:
    """A moving average of parameters: a copy for ``after`` steps, then every ``every`` steps ``d a + (1 - d) p`` with d
    = 1 - (1 + n)^(-2/3), at most ``beta``, n steps after that beginning."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], beta: float = 0.999, after: int = 100, every: int = 10
    ) -> None:
        self.parameters = list(parameters)
        self.values = [p.detach().clone() for p in self.parameters]
        self.beta, self.after, self.every, self.step = beta, after, every, 0

    @torch.no_grad()
    def update(self) -> None:
        step = self.step
        self.step += 1
        if step % self.every:
            return
        n = self.step - self.after - 1
        decay = min(1 - (1 + n) ** (-2 / 3), self.beta) if n > 0 else 0.0
        for value, p in zip(self.values, self.parameters, strict=True):
            value.lerp_(p.detach(), 1 - decay)

    def state_dict(self) -> dict:
        return {"values": self.values, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        for value, stored in zip(self.values, state["values"], strict=True):
            value.copy_(stored)
        self.step = state["step"]

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and parameters; a second time restores them."""
        for value, p in zip(self.values, self.parameters, strict=True):
            held = p.detach().clone()
            p.copy_(value)
            value.copy_(held)


def groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters that train, in two groups: biases, vectors, learned tokens and S4 kernels do not decay."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            free = p.ndim <= 1 or name.endswith((".bias", "cls_token")) or hasattr(p, "_optim")
            (kept if free else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def pretrain(
    model: DiffusionBackbone,
    windows: np.ndarray,
    ids: list[int] | None = None,
    *,
    steps: int,
    batch_size: int = 108,
    rate: float = 1e-4,
    clip: float = 1.0,
    averaging: dict | None = None,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
    run: Run | None = None,
) -> list[float]:
    """Teach a backbone to denoise single channels of windows (n, channels, samples), class ids ``ids`` (0, 1, ...).

    Leaves the averaged weights in the model (``averaging``: arguments of :class:`Averaged`) and returns the losses.
    ``run``: keeps it, and goes on with what it holds.
    Raises ValueError for windows without samples or channels that the model does not know.
    """
    if windows.ndim != 3 or not len(windows):
        raise ValueError(f"windows have shape {windows.shape}; expected (n, channels, samples) with n above 0")
    ids = list(range(windows.shape[1])) if ids is None else ids
    if len(ids) != windows.shape[1] or max(ids) >= model.channels:
        raise ValueError(f"{windows.shape[1]} channels have the ids {ids}; the model knows 0 to {model.channels - 1}")
    device = model.label_embed.weight.device
    r = np.random.default_rng(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(groups(model, 0.0), lr=rate)
    average = Averaged(model.parameters(), **(averaging or {}))
    known = np.array(ids)
    run = run or Run()
    losses: list[float] = run.start(model=model, optimizer=optimizer, average=average, random=r).get("losses", [])
    model.train()
    for step in range(len(losses), steps):
        rows, channels = r.integers(len(windows), size=batch_size), r.integers(len(ids), size=batch_size)
        x = torch.from_numpy(windows[rows, channels][:, None]).to(device)
        cond = torch.from_numpy(known[channels][:, None]).to(device)
        losses.append(_stepped(diffusion_loss(model, model.schedule, x, cond), optimizer, clip, step))
        average.update()
        if report is not None:
            report(step, losses[-1])
        run.keep(step + 1, losses=losses)
    average.swap()
    model.eval()
    return losses


class EventLoss(nn.Module):
    """Cross-entropy with label smoothing; for one logit, binary cross-entropy with ``pos_weight``. ``gamma``: the focal
    factor (1 - p)^gamma, p the probability of the true class (of a yes, for one logit, as in the original)."""

    def __init__(self, smoothing: float = 0.1, gamma: float = 0.0, pos_weight: float | None = None) -> None:
        super().__init__()
        self.smoothing, self.gamma, self.pos_weight = smoothing, gamma, pos_weight

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(batch, classes) and (batch,) to a mean."""
        if logits.shape[1] == 1:
            logits = logits[:, 0]
            soft = labels.to(logits.dtype) * (1 - self.smoothing) + self.smoothing / 2
            weight = None if self.pos_weight is None else logits.new_tensor(self.pos_weight)
            loss = F.binary_cross_entropy_with_logits(logits, soft, pos_weight=weight, reduction="none")
            sure = logits.sigmoid()
        else:
            loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
            sure = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
        return loss.mean() if self.gamma == 0 else ((1 - sure) ** self.gamma * loss).mean()


@dataclass
class Epoch:
    """One epoch's figures."""

    number: int
    loss: float
    measures: dict[str, float]  #: of the averaged weights on the validation windows


def finetune(
    model: EEGClassifier,
    train: WindowSet,
    valid: WindowSet,
    *,
    epochs: int = 50,
    batch_size: int = 32,
    top_rate: float = 5e-4,
    rising: float = 0.1,
    weight_decay: float = 0.05,
    smoothing: float = 0.1,
    gamma: float = 0.0,
    pos_weight: float | None = None,
    clip: float = 3.0,
    patience: int = 3,
    warmup: int = 20,
    averaging: dict | None = None,
    seed: int = 0,
    report: Callable[[Epoch], None] | None = None,
    run: Run | None = None,
) -> list[Epoch]:
    """Train what reads the frozen backbone, in place; the averaged weights of the best epoch stay.

    The rate rises for the share ``rising`` of all steps to ``top_rate`` and falls (one cycle). Best: by Cohen's kappa,
    or balanced accuracy for one logit; training ends ``patience`` epochs after the best, not before ``warmup``.
    Tokens of the backbone are computed once, unless the model trains with noise. ``run``: keeps it epoch by epoch, and
    goes on with what it holds. Raises ValueError where windows or
    classes do not fit.
    """
    yes_or_no = model.num_classes == 1 and len(train.classes) == 2
    if not yes_or_no and len(train.classes) != model.num_classes:
        raise ValueError(f"there are {len(train.classes)} classes and {model.num_classes} outputs; build it to fit")
    if len(train) < 2 or not len(valid):
        raise ValueError(f"there are {len(train)} training and {len(valid)} validation windows; two and one are needed")
    device = model.extractor.cond.device
    torch.manual_seed(seed)
    r = np.random.default_rng(seed)
    noisy = bool(model.fwd_with_noise)
    kept = None if noisy else tokens_of(model, train.x)
    held = tokens_of(model, valid.x)
    criterion = EventLoss(smoothing, gamma, pos_weight)
    optimizer = torch.optim.AdamW(groups(model, weight_decay), lr=top_rate, betas=(0.9, 0.98))
    a_pass = math.ceil(len(train) / batch_size)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, top_rate, total_steps=epochs * a_pass, pct_start=rising)
    average = Averaged([p for p in model.parameters() if p.requires_grad], **(averaging or {}))
    better = "balanced accuracy" if model.num_classes == 1 else "kappa"
    run = run or Run()
    began = run.start(model=model, optimizer=optimizer, cycle=cycle, average=average, random=r)
    best, state = began.get("best", -math.inf), began.get("state") or copy.deepcopy(average.values)
    found, since = [Epoch(**row) for row in began.get("epochs", [])], began.get("since", 0)
    labels = torch.from_numpy(train.labels)
    for number in range(len(found), epochs):
        model.train()
        total, order = 0.0, r.permutation(len(train))
        for i in range(a_pass):
            rows = order[i * batch_size : (i + 1) * batch_size]
            if kept is None:
                logits = model(torch.from_numpy(train.x[rows]).to(device))
            else:
                logits = model.forward_tokens(kept[torch.from_numpy(rows)].to(device))
            value = criterion(logits, labels[torch.from_numpy(rows)].to(device))
            total += _stepped(value, optimizer, clip, number * a_pass + i)
            cycle.step()
            average.update()
        average.swap()
        found.append(Epoch(number, total / a_pass, measures(_answers(model, held), valid.labels)))
        average.swap()
        if report is not None:
            report(found[-1])
        score = found[-1].measures[better]
        if score > best:
            best, state, since = score, copy.deepcopy(average.values), 0
        else:
            since += 1
            if since > patience and number >= warmup:
                break
        run.keep(number + 1, best=best, state=state, since=since, epochs=[asdict(epoch) for epoch in found])
    average.values = state
    average.swap()
    model.eval()
    return found


@torch.no_grad()
def tokens_of(model: EEGClassifier, x: np.ndarray, batch_size: int = 16) -> Tensor:
    """What the frozen backbone says of windows, on the CPU: (n, layers, T, P, Q, C, H)."""
    model.eval()
    device = model.extractor.cond.device
    dtype = model.classifier.linear.weight.dtype
    parts = [
        model.tokens(torch.from_numpy(x[i : i + batch_size]).to(device, dtype)).cpu()
        for i in range(0, len(x), batch_size)
    ]
    return torch.cat(parts)


@torch.no_grad()
def _answers(model: EEGClassifier, tokens: Tensor, batch_size: int = 64) -> np.ndarray:
    model.eval()
    device = model.extractor.cond.device
    logits = torch.cat([model.forward_tokens(part.to(device)) for part in tokens.split(batch_size)]).float()
    return (logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(-1)).cpu().numpy()


def predict(model: EEGClassifier, x: np.ndarray, batch_size: int = 16) -> np.ndarray:
    """Shares of the classes, (n, classes), or of a yes, (n, 1), for windows (n, channels, samples)."""
    if not len(x):
        return np.zeros((0, model.num_classes), np.float32)
    parts = [x[i : i + batch_size] for i in range(0, len(x), batch_size)]
    return np.concatenate([_answers(model, tokens_of(model, part, batch_size)) for part in parts])


def measures(shares: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """accuracy, balanced accuracy, kappa and weighted f1; for one output also auroc and auprc."""
    binary = shares.shape[1] == 1
    said = (shares[:, 0] > 0.5).astype(np.int64) if binary else shares.argmax(1)
    count = 2 if binary else shares.shape[1]
    table = np.zeros((count, count))
    np.add.at(table, (labels, said), 1)
    total, true, guessed, hit = table.sum(), table.sum(1), table.sum(0), np.diag(table)
    there = true > 0
    by_chance = float((true * guessed).sum() / total**2)
    accuracy = float(hit.sum() / total)
    f1 = 2 * hit / np.maximum(true + guessed, 1)
    found = {
        "accuracy": accuracy,
        "balanced accuracy": float((hit[there] / true[there]).mean()),
        "kappa": (accuracy - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0,
        "f1": float((f1 * true).sum() / total),
    }
    if binary and there.all():
        found |= _ranked(shares[:, 0], labels)
    return found


def _ranked(score: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Areas under the curves of a binary score; equal scores are one point."""
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(labels[order] == 1)
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    tp, fp = hits[ends], ends + 1 - hits[ends]
    tpr, fpr = np.append(0, tp / tp[-1]), np.append(0, fp / fp[-1])
    precision = tp / (tp + fp)
    return {
        "auroc": float((np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2).sum()),
        "auprc": float((np.diff(tpr) * precision).sum()),
    }


def _stepped(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value} at step {step}; a lower rate may help")
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and not torch.isfinite(p.grad).all():
                raise ValueError(f"a gradient is not finite at step {step}; a lower rate may help")
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    return value
