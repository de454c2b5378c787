"""zoo_rl: reinforcement learning models of the zoo of state-space models: Decision Mamba and S5 with resets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agents import agent

__version__ = "0.1.0"
__all__ = ["agent"]


def __getattr__(name: str) -> Any:
    if name == "agent":  # importing the package must not import torch
        from .agents import agent

        return agent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
