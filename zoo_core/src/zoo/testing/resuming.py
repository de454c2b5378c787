"""Whether a training loop that takes a :class:`zoo.runs.Run` goes on as if it had not been interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.runs import Run

Train = Callable[[Run, Callable[..., None]], nn.Module]


def check_resume(train: Train, folder: Path, *, after: int = 2) -> None:
    """Interrupt a training and let it go on; what comes of it must equal what an uninterrupted one gives, bit by bit.

    ``train(run, report)`` seeds, builds a model and trains it on the CPU with this run, calling ``report`` after every
    step or epoch, before it is kept; it returns the model. ``folder``: an empty one. ``after``: steps before the
    interruption.
    """
    whole = train(Run(), lambda *_: None).state_dict()
    calls = 0

    def interrupting(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt

    path = folder / "training.run"
    try:
        train(Run(path, every=0), interrupting)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError(f"the training reported {calls} times only; expected more than {after}")
    torch.rand(7)  # whatever the random numbers are now
    run = Run(path, every=0)
    found = train(run, lambda *_: None).state_dict()
    assert run.begun == after, f"the run went on after {run.begun} steps; {after} were done"
    differing = [key for key, value in whole.items() if not torch.equal(value, found[key])]
    assert not differing, f"the resumed training differs in {', '.join(differing[:5])}"
