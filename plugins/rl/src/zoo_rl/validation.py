"""Measuring a policy on recorded trajectories: what ``zoo validate`` runs for policies."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from torch import nn

from zoo.validation import Measured

from .pipelines import Actions, Policy


def validate_trajectories(
    model: nn.Module,
    data: str | Path,
    *,
    scale: float | None = None,
    progress: bool = True,
) -> Measured:
    """How well a policy foretells the actions of recorded trajectories (npz, HDF5 or parquet; a file or a folder).

    Discrete: the share of steps whose most likely action was taken, and the mean negative log-probability in nats.
    Continuous: the mean squared and absolute difference (and the negative log-density, where the policy has one). Each
    step is foretold from all steps before it in its episode, and for Decision Mamba from its true return-to-go. What a
    policy brings in an environment is another question: ``zoo play``.
    """
    pipe = Policy(model, scale=scale)
    began = time.perf_counter()
    sources, _ = pipe.expand(data)
    samples, answers = [], []
    for source in sources:
        sample = pipe.read(source)
        answer = pipe(sample)
        assert isinstance(answer, Actions)
        samples.append(sample)
        answers.append(answer)
    weights = np.array([len(s) for s in samples], float)

    def mean(values: list[float | None]) -> float:
        return float(np.average(np.array(values, float), weights=weights))

    metrics: dict[str, float | None] = {}
    if samples[0].discrete:
        metrics["accuracy"] = mean([a.agreement for a in answers])
    else:
        metrics["mse"] = mean([a.error for a in answers])
        metrics["mae"] = mean(
            [float(np.abs(a.actions - s.actions).mean()) for a, s in zip(answers, samples, strict=True)]
        )
    if answers[0].log_prob is not None:
        metrics["nll"] = -mean([a.log_prob for a in answers])
    return Measured(
        model=pipe.name, data=str(data), samples=int(weights.sum()), metrics=metrics,
        seconds=time.perf_counter() - began, notes=answers[0].notes,
    )  # fmt: skip
