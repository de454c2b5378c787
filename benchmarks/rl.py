"""S5 with resets: a minibatch of trajectories by one scan, and an agent's steps.

    python benchmarks/rl.py --threads 2 --json benchmarks/results/rl.json

*trajectories*: forward and backward of the published actor-critic (4 layers of 256 channels, 128 complex states) over a
minibatch of the published size, 8 environments by 1024 steps, episodes ending at random. Three peers with the same
weights, whose values and gradients must agree (relative error below 1e-3): the network stepped through time, the
parallel scan over (decay, state, reset) triples as popjaxrl writes it, in torch operators, and, of its own weights, a
network that keeps the encoder and heads and has popjaxrl's other memory in the middle, one GRU of 256 units, stepped
with its state zeroed at resets.

*agent*: steps a second of a running agent, alone and for 64 environments, and of the same policy reading its last 1024
observations again at every step.

Runs alternate, and the best of each is compared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import zoo
from zoo_rl import agents
from zoo_rl.s5_rl import S5ActorCritic


def stepped(model: S5ActorCritic, obs: Tensor, resets: Tensor) -> dict[str, Tensor]:
    """The network through time, one step after another, differentiable."""
    x = model._encode(obs)
    for layer in model.s5.layers:
        A, B, C = layer.seq.discrete()

        def mix(u: Tensor, layer=layer, A=A, B=B, C=C) -> Tensor:
            Bu = torch.complex(u @ B.real.T, u @ B.imag.T)
            s, states = torch.zeros_like(Bu[:, 0]), []
            keep = (~resets).to(Bu.dtype)
            for t in range(u.shape[1]):
                s = A * (keep[:, t, None] * s) + Bu[:, t]
                states.append(s)
            return layer.seq._read(torch.stack(states, 1), C) + layer.seq.D * u

        x = layer._around(x, mix)
    return model._heads(x)


def associative(model: S5ActorCritic, obs: Tensor, resets: Tensor) -> dict[str, Tensor]:
    """The network with the original's reset-aware associative scan, in log2(steps) rounds of torch operators."""

    def scan(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        shift = 1
        while shift < a.shape[1]:
            pa, pb, pc = a[:, :-shift], b[:, :-shift], c[:, :-shift]
            ra, rb, rc = a[:, shift:], b[:, shift:], c[:, shift:]
            a = torch.cat([a[:, :shift], ra * pa * (1 - rc) + ra * rc], 1)
            b = torch.cat([b[:, :shift], (ra * pb + rb) * (1 - rc) + rb * rc], 1)
            c = torch.cat([c[:, :shift], pc * (1 - rc) + rc], 1)
            shift *= 2
        return b

    x = model._encode(obs)
    for layer in model.s5.layers:
        A, B, C = layer.seq.discrete()

        def mix(u: Tensor, layer=layer, A=A, B=B, C=C) -> Tensor:
            Bu = torch.complex(u @ B.real.T, u @ B.imag.T)
            marks = resets[..., None].to(u.dtype)
            return layer.seq._read(scan(A.expand_as(Bu), Bu, marks), C) + layer.seq.D * u

        x = layer._around(x, mix)
    return model._heads(x)


class Recurrent(nn.Module):
    """Encoder and heads of the actor-critic around one GRU of the same width."""

    def __init__(self, model: S5ActorCritic) -> None:
        super().__init__()
        self.model, self.gru = model, nn.GRUCell(256, 256)

    def forward(self, obs: Tensor, resets: Tensor) -> dict[str, Tensor]:
        x = self.model._encode(obs)
        h, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = self.gru(x[:, t], torch.where(resets[:, t, None], torch.zeros_like(h), h))
            states.append(h)
        return self.model._heads(torch.stack(states, 1))


def best(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    found = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            found[name] = min(found[name], time.perf_counter() - began)
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def trajectories(rounds: int, envs: int, steps: int) -> dict[str, object]:
    torch.manual_seed(0)
    model = zoo.create("s5_popgym_discrete")
    gru = Recurrent(zoo.create("s5_popgym_discrete"))
    obs, resets = torch.randn(envs, steps, 10), torch.rand(envs, steps) < 0.01
    weight = torch.randn(envs, steps, 4)
    forms: dict[str, Callable[[], dict[str, Tensor]]] = {
        "scan": lambda: model(obs, resets),
        "associative scan in torch": lambda: associative(model, obs, resets),
        "steps": lambda: stepped(model, obs, resets),
        "GRU steps": lambda: gru(obs, resets),
    }

    def learn(name: str) -> tuple[Tensor, Tensor]:
        owner = gru if name == "GRU steps" else model
        owner.zero_grad(set_to_none=True)
        out = forms[name]()
        ((out["logits"] * weight).sum() + out["value"].square().sum()).backward()
        return out["value"].detach(), model.encoder[0].weight.grad

    value, gradient = (x.clone() for x in learn("scan"))
    for name in ("associative scan in torch", "steps"):
        other, slope = learn(name)
        worst = max(error(other, value), error(slope, gradient))
        assert worst < 1e-3, f"{name}: relative error {worst}"
    seconds = best({name: (lambda name=name: learn(name)) for name in forms}, rounds)
    return {
        "environments": envs,
        "steps": steps,
        "milliseconds": {name: round(1000 * s, 1) for name, s in seconds.items()},
        "times the scan": {name: round(s / seconds["scan"], 2) for name, s in seconds.items() if name != "scan"},
    }


def agent(rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    model = zoo.create("s5_popgym_discrete").eval()
    running = {count: agents.S5Agent(model, count, greedy=True) for count in (1, 64)}
    window, seen = torch.randn(1, 1024, 10), {count: torch.randn(count, 10) for count in running}

    def act(count: int) -> None:
        for _ in range(100):
            running[count].act(seen[count])

    def again() -> None:
        with torch.inference_mode():
            model(window)

    seconds = best({"1": lambda: act(1), "64": lambda: act(64), "window": again}, rounds)
    return {
        "steps a second, one environment": round(100 / seconds["1"]),
        "steps a second, 64 environments": round(6400 / seconds["64"]),
        "times a window of 1024 read again": round(seconds["window"] / (seconds["1"] / 100), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {
        "threads": arguments.threads,
        "torch": torch.__version__,
        "trajectories": trajectories(arguments.rounds, arguments.envs, arguments.steps),
        "agent": agent(3 * arguments.rounds),
    }
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
