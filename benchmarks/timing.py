"""What several benchmarks share: sides measured in turn, so that a noisy machine is as unkind to each."""

from __future__ import annotations

import time
from collections.abc import Callable


def shortest(functions: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """The shortest time of each in seconds, measured in turn ``repeat`` times."""
    times = {name: float("inf") for name in functions}
    for _ in range(repeat):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name] = min(times[name], time.perf_counter() - began)
    return times
