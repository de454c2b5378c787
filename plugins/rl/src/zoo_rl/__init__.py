"""zoo_rl: reinforcement learning models of the zoo of state-space models: Decision Mamba and S5 with resets."""

__version__ = "0.1.0"
