"""Train the Decision Mamba demo on trajectories of mixed skill: push a puck on ice to a goal without seeing its speed.

    uv run python plugins/rl/recipes/train_glide.py

generates the trajectories (a controller that sees the speed, its actions mixed with noise by a random share), trains
three policies on them (the causal form, the original's tiled form, and the causal form with a window of one step, which
remembers nothing), and measures all in episodes that nobody saw, beside random actions, the trajectories themselves and
the controller. It writes the causal checkpoint and a sample file into the plugin, and prints the figures for the card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import zoo
from zoo_rl import agents, envs, offline
from zoo_rl.trajectories import Trajectories, from_arrays

DEMO = Path(__file__).parents[1] / "src" / "zoo_rl" / "demo"
UNSEEN = 1_000_000
TARGET = 24.0  # what a good trajectory brings


def generate(episodes: int, seed: int) -> Trajectories:
    env = envs.Glide(episodes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    skill = torch.rand(episodes, 1, generator=generator)
    rows: dict[str, list[torch.Tensor]] = {k: [] for k in ("observations", "actions", "rewards", "terminals")}
    seen = env.reset()
    for _ in range(env.max_steps):
        noise = torch.rand(episodes, 2, generator=generator) * 2 - 1
        action = skill * env.expert() + (1 - skill) * noise
        before = seen
        seen, reward, done = env.step(action)
        for name, value in zip(rows, (before, action, reward, done), strict=True):
            rows[name].append(value)
    return from_arrays({name: torch.stack(values, 1).numpy() for name, values in rows.items()}, source="glide")


def expert(episodes: int) -> torch.Tensor:
    env = envs.Glide(episodes, seed=UNSEEN)
    env.reset()
    total = torch.zeros(episodes)
    for _ in range(env.max_steps):
        total += env.step(env.expert())[1]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--steps", type=int, default=120, help="gradient steps of each iteration")
    parser.add_argument("--episodes", type=int, default=500, help="unseen episodes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="train this form alone")
    parser.add_argument("--dry-run", action="store_true", help="train and print, write nothing")
    arguments = parser.parse_args()
    data = generate(arguments.trajectories, arguments.seed)
    settings = offline.Settings(
        iterations=arguments.iterations, steps=arguments.steps, learning_rate=2e-3, warmup=100, scale=10.0
    )
    returns = data.returns()
    results = {"trajectories": {"return": returns.mean(), "best tenth": float(np.quantile(returns, 0.9))}}
    results["random"] = {
        "return": agents.random_returns(envs.Glide(100, seed=UNSEEN), arguments.episodes).mean().item()
    }
    results["controller"] = {"return": expert(arguments.episodes).mean().item()}
    forms = {"causal": {}, "tiled": {"fine": "tiled"}, "window of one step": {"max_length": 1}}
    for name, form in forms.items():
        if arguments.only not in (None, name):
            continue
        torch.manual_seed(arguments.seed)
        model = zoo.create("decision_mamba_micro", **form)
        windows = offline.train(
            model, data, settings, seed=arguments.seed, on_iteration=lambda row: print(row, flush=True)
        )
        if name == "causal":
            model.to(torch.float16).to(torch.float32)  # measure what is shipped
        found = {}
        for target in (TARGET, 10.0, 0.0):
            if name == "window of one step":
                found[f"target {target:g}"] = one_step(model, windows, target, arguments.episodes)
                continue
            agent = agents.DecisionAgent(
                model, 100, target_return=target, scale=10.0, state_mean=windows.mean, state_std=windows.std
            )
            found[f"target {target:g}"] = (
                agents.run(agent, envs.Glide(100, seed=UNSEEN), arguments.episodes).mean().item()
            )
        results[name] = found
        print({name: found}, flush=True)
        if name == "causal" and not arguments.dry_run:
            write(model, windows)
    print(json.dumps(results, indent=1))


def one_step(model: torch.nn.Module, windows: offline.Windows, target: float, episodes: int) -> float:
    """The policy of a window of one step, which is told the time and the return to go and remembers nothing."""
    env = envs.Glide(episodes, seed=UNSEEN)
    seen, left = env.reset(), torch.full((episodes, 1), target / 10)
    total = torch.zeros(episodes)
    for t in range(env.max_steps):
        state = (seen - torch.from_numpy(windows.mean)) / torch.from_numpy(windows.std)
        nothing = torch.zeros(episodes, 1, 2)
        with torch.no_grad():
            action = model.get_action(state[:, None], nothing, left[:, None], torch.full((episodes, 1), t))
        seen, reward, _ = env.step(action)
        left = left - reward[:, None] / 10
        total += reward
    return total.mean().item()


def write(model: torch.nn.Module, windows: offline.Windows) -> None:
    DEMO.mkdir(exist_ok=True)
    state = {k: v.to(torch.float16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, DEMO / "decision_mamba_micro.glide.safetensors")
    sample = generate(200, UNSEEN + 1)
    keep = np.argsort(sample.returns())[[20, 100, 190]]  # a poor, a middling and a good one
    rows = np.concatenate([np.arange(len(sample))[sample.episodes[i]] for i in keep])
    np.savez_compressed(
        DEMO / "glide.npz", observations=sample.observations[rows], actions=sample.actions[rows],
        rewards=sample.rewards[rows].astype(np.float32), terminals=sample.ends[rows],
    )  # fmt: skip
    print({"state_mean": windows.mean.round(5).tolist(), "state_std": windows.std.round(5).tolist()})


if __name__ == "__main__":
    main()
