"""Training on graphs of any sizes: AdamW with a warm-up and a cosine, the published settings as defaults.

Source: bowang-lab/Graph-Mamba ``configs/Mamba`` (rate 1e-3, decay 0.01, gradients cut off at norm 1).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.runs import Run, seeded

from .batching import Batch, join
from .files import Graph


@dataclass
class Epoch:
    """One epoch's figures; ``score``: accuracy, or minus the mean absolute error of regression, on the valid graphs."""

    number: int
    loss: float
    score: float


def loss_of(kind: str, output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy, binary cross entropy a label (labels that are NaN are left out), or L1."""
    check_targets(kind, output, target)
    if kind == "classification":
        return F.cross_entropy(output, target.long())
    target = target.to(output.dtype).reshape(output.shape)
    if kind == "multilabel":
        known = ~torch.isnan(target)
        return F.binary_cross_entropy_with_logits(output[known], target[known])
    return F.l1_loss(output, target)


def check_targets(kind: str, output: Tensor, target: Tensor) -> None:
    """Raises ValueError where there are not as many targets as answers."""
    wanted = len(output) if kind == "classification" else output.numel()
    if target.numel() != wanted:
        raise ValueError(
            f"there are {target.numel()} targets, and the model gives {len(output)} answers; expected labels "
            "of nodes for a node model, of graphs for a graph model"
        )


def settings_for(model: nn.Module) -> dict[str, bool]:
    """How :func:`join` must read features for this model: as numbers or as categories."""
    edges = getattr(model, "edge_encoder", None)
    return {
        "integers": bool(len(model.node_encoder.embeddings)),  # type: ignore[union-attr, arg-type]
        "integer_edges": edges is not None and bool(len(edges.embeddings)),
    }


def fit(
    model: nn.Module,
    train: Sequence[Graph],
    valid: Sequence[Graph],
    *,
    epochs: int = 200,
    batch_size: int = 32,
    rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup_epochs: int = 10,
    clip: float = 1.0,
    encoding: str | None = None,
    seed: int = 0,
    report: Callable[[Epoch], None] | None = None,
    run: Run | None = None,
) -> list[Epoch]:
    """Train a node or graph model in place on graphs with ``y``, and leave it at the best epoch on ``valid``.

    batch_size counts graphs. ``run``: keeps it epoch by epoch, and goes on with what it holds. Raises ValueError for
    graphs without targets, for no graphs, and when a loss is not finite.
    """
    if not train or not valid:
        raise ValueError(f"there are {len(train)} graphs to train on and {len(valid)} to choose the epoch by")
    if getattr(model, "level", "") == "link":
        raise ValueError("fit trains node and graph models; zoo_graph.links.fit_links those of links")
    more = {**settings_for(model), "encoding": encoding, "encoding_size": int(getattr(model, "pe_dim", 0))}
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=weight_decay)
    a_pass = -(-len(train) // batch_size)
    steps, rising = epochs * a_pass, max(warmup_epochs * a_pass, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / rising, 0.5 * (1 + math.cos(math.pi * max(i - rising, 0) / max(steps - rising, 1)))),
    )
    r = np.random.default_rng(seed)
    run = run or Run()
    began = run.start(model=model, optimizer=optimizer, schedule=schedule, random=r)
    best, kept = began.get("best", -math.inf), began.get("kept", {})
    found = [Epoch(**row) for row in began.get("epochs", [])]
    for number in range(len(found), epochs):
        model.train()
        order, total = r.permutation(len(train)), 0.0
        for i in range(a_pass):
            batch = join([train[j] for j in order[i * batch_size : (i + 1) * batch_size]], **more)  # type: ignore[arg-type]
            if 1 in (int(batch.sizes.sum()), batch.edge_index.shape[1]):
                if a_pass == 1:
                    raise ValueError("the graphs have one node or one edge in all, which cannot be normalised")
                continue  # one row alone has no deviation: another one is left over in the next epoch
            value = loss_of(str(model.kind), model(**batch.to(device).inputs()), _known(batch).to(device))
            if not math.isfinite(float(value.detach())):
                raise ValueError(f"the loss is {float(value.detach())} in epoch {number}; a lower rate may help")
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            total += float(value.detach())
        found.append(Epoch(number, total / a_pass, score(model, valid, batch_size=batch_size, encoding=encoding)))
        if found[-1].score > best:
            best, kept = found[-1].score, copy.deepcopy(model.state_dict())
        if report is not None:
            report(found[-1])
        run.keep(number + 1, best=best, kept=kept, epochs=[asdict(epoch) for epoch in found])
    if kept:
        model.load_state_dict(kept)
    model.eval()
    return found


def _known(batch: Batch) -> Tensor:
    if batch.y is None:
        raise ValueError("not all graphs have targets; expected a number for each node, or one for each graph")
    return batch.y


@torch.no_grad()
def answers(
    model: nn.Module,
    graphs: Sequence[Graph],
    *,
    batch_size: int = 32,
    encoding: str | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """(outputs, targets) of all graphs in evaluation mode. Orders that are drawn at random follow ``seed``."""
    if not graphs:
        raise ValueError("no graphs were given; expected one or more")
    model.eval()
    more = {**settings_for(model), "encoding": encoding, "encoding_size": int(getattr(model, "pe_dim", 0))}
    device = next(model.parameters()).device
    outputs, targets = [], []
    with seeded(seed, device):
        for i in range(0, len(graphs), batch_size):
            batch = join(graphs[i : i + batch_size], **more)  # type: ignore[arg-type]
            outputs.append(model(**batch.to(device).inputs()).float().cpu())
            targets.append(batch.y)
    known = None if any(t is None for t in targets) else torch.cat(targets)  # type: ignore[arg-type]
    return torch.cat(outputs), known


def score(model: nn.Module, graphs: Sequence[Graph], *, batch_size: int = 32, encoding: str | None = None) -> float:
    """Accuracy of classes or labels, or minus the mean absolute error."""
    output, target = answers(model, graphs, batch_size=batch_size, encoding=encoding)
    if target is None:
        raise ValueError("not all graphs have targets; expected a number for each node, or one for each graph")
    check_targets(str(model.kind), output, target)
    if model.kind == "classification":
        return float((output.argmax(1) == target).float().mean())
    target = target.reshape(output.shape)
    if model.kind == "multilabel":
        known = ~torch.isnan(target)
        return float(((output > 0) == (target > 0.5))[known].float().mean())
    return -float((output - target).abs().mean())
