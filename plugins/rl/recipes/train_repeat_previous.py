"""Train the demo policy: say which suit was shown four cards ago (POPGym's RepeatPreviousEasy), by PPO.

    uv run python plugins/rl/recipes/train_repeat_previous.py

trains the same network by the same recipe twice, once with its memory and once told at every step that an episode
begins, measures both on decks that neither saw, beside guessing, writes the checkpoint and a sample trajectory into the
plugin, and prints the figures that belong on the card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import zoo
from zoo_rl import agents, envs
from zoo_rl.ppo import Settings, Trainer

DEMO = Path(__file__).parents[1] / "src" / "zoo_rl" / "demo"
UNSEEN = 1_000_000  # seeds of the test decks begin here


def report(row: dict[str, float]) -> None:
    if round(row["steps"] / 6656) % 20 == 0:
        print({k: round(v, 4) for k, v in row.items()}, flush=True)


def measured(model: torch.nn.Module, episodes: int, memoryless: bool) -> torch.Tensor:
    agent = agents.S5Agent(model, batch=100, greedy=True, memoryless=memoryless)
    return agents.run(agent, envs.RepeatPrevious(100, seed=UNSEEN), episodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_500_000, help="environment steps of each training")
    parser.add_argument("--episodes", type=int, default=1000, help="unseen decks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true", help="train and print, write nothing")
    arguments = parser.parse_args()
    settings = Settings(
        steps=104,
        total_steps=arguments.steps,
        epochs=4,
        minibatches=4,
        learning_rate=1e-3,
        anneal=True,
        gae_lambda=0.95,
    )
    results = {}
    models = {}
    for name, forgets in (("s5", False), ("memoryless", True)):
        torch.manual_seed(arguments.seed)
        model = models[name] = zoo.create("s5_micro")
        env = envs.PreviousAction(envs.RepeatPrevious(64, seed=arguments.seed))
        Trainer(model, env, settings, seed=arguments.seed, memoryless=forgets).train(report)
        if name == "s5":  # the checkpoint holds halves of the numbers' bits; measure what is shipped
            model.to(torch.float16).to(torch.float32)
        found = measured(model, arguments.episodes, forgets)
        results[name] = {"return": round(found.mean().item(), 4), "deviation": round(found.std().item(), 4)}
    found = agents.random_returns(envs.RepeatPrevious(100, seed=UNSEEN), arguments.episodes)
    results["random"] = {"return": round(found.mean().item(), 4), "deviation": round(found.std().item(), 4)}
    print(json.dumps(results, indent=1))
    if arguments.dry_run:
        return
    DEMO.mkdir(exist_ok=True)
    state = {k: v.to(torch.float16).contiguous() for k, v in models["s5"].state_dict().items()}
    save_file(state, DEMO / "s5_micro.repeat_previous.safetensors")
    np.savez_compressed(DEMO / "repeat_previous.npz", **sample(models["s5"]))


def sample(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Three decks that the policy played, as a trajectory file."""
    env = envs.RepeatPrevious(1, seed=UNSEEN + 1)
    agent = agents.S5Agent(model, batch=1, greedy=True)
    observation, reward, done = env.reset(), torch.zeros(1), torch.zeros(1, dtype=torch.bool)
    rows: dict[str, list[torch.Tensor]] = {k: [] for k in ("observations", "actions", "rewards", "terminals")}
    for _ in range(3 * env.cards):
        seen, action = observation, agent.act(observation, reward, done)
        observation, reward, done = env.step(action)
        for name, value in zip(rows, (seen, action, reward, done), strict=True):
            rows[name].append(value[0])
    return {name: torch.stack(values).numpy() for name, values in rows.items()}


if __name__ == "__main__":
    main()
