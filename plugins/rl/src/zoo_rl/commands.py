"""``zoo act`` and ``zoo play``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli import output

TARGET = "What an episode should bring, in the environment's units (Decision Mamba)."


@click.command()
@click.argument("model")
@click.argument("trajectories", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the actions to an npz file.")
@click.option("--target-return", type=float, help=TARGET + " Default: the file's own returns-to-go.")
@click.option("--scale", type=float, help="What returns were divided by in training.")
@output.loading_options
@output.as_json
def act(
    model: str,
    trajectories: Path,
    out: Path | None,
    target_return: float | None,
    scale: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """What MODEL would do at every step of TRAJECTORIES: an npz, HDF5 (D4RL) or parquet file.

    \b
        zoo act s5_micro repeat_previous.npz
        zoo act decision_mamba_micro glide.npz --target-return 24 --out actions.npz
    """
    import zoo
    from zoo.files import check_ending, check_place

    if out is not None:
        check_place(out)
        if out.suffix:
            check_ending(out, (".npz",))
    pipe = zoo.pipeline(model, "policy", target_return=target_return, scale=scale, **output.loading(options))
    answer: Any = pipe(trajectories)
    if out is not None:
        out = answer.save(out)
    if as_json:
        output.emit(answer.to_dict() | ({} if out is None else {"file": str(out)}))
        return
    click.echo(str(answer) + (f"  -> {out}" if out is not None else ""))
    if out is None:
        shown = [row.tolist() if row.ndim else row.item() for row in answer.actions[:8]]
        text = ", ".join(str([round(v, 3) for v in a]) if isinstance(a, list) else str(a) for a in shown)
        click.echo(f"  {text}{' ...' if len(answer.actions) > 8 else ''}")


@click.command()
@click.argument("model")
@click.argument("environment")
@click.option("--episodes", default=100, show_default=True, type=click.IntRange(min=1))
@click.option("--envs", "count", default=20, show_default=True, type=click.IntRange(min=1), help="Played side by side.")
@click.option("--seed", default=0, show_default=True)
@click.option("--draw", is_flag=True, help="Draw actions instead of taking the most likely ones.")
@click.option("--target-return", type=float, help=TARGET)
@output.loading_options
@output.as_json
def play(
    model: str,
    environment: str,
    episodes: int,
    count: int,
    seed: int,
    draw: bool,
    target_return: float | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Let MODEL play ENVIRONMENT and compare its return with that of random actions.

    ENVIRONMENT: repeat-previous, stateless-cartpole, meta-cartpole, glide, or gym:CartPole-v1 (any of gymnasium's).
    """
    import time

    import zoo

    from . import agents, envs
    from .s5_rl import S5ActorCritic

    count = min(count, episodes)
    env = envs.make(environment, count, seed=seed)
    loaded = zoo.load(model, **output.loading(loading))
    options: dict[str, Any] = {} if target_return is None else {"target_return": target_return}
    if isinstance(loaded, S5ActorCritic):
        if target_return is not None:
            raise click.UsageError(f"--target-return is for Decision Mamba; {model} is asked for no return")
        options = {"greedy": not draw, "seed": seed}
    elif draw:
        raise click.UsageError(f"--draw is for policies that are chances of actions; {model} gives one action")
    agent = agents.agent(loaded, count, **options)
    if env.obs_dim not in agent.obs_dims or env.action_dim != agent.action_dim:
        raise click.UsageError(
            f"{environment} has observations of {env.obs_dim} numbers and {env.action_dim} actions; {model} takes "
            f"{' or '.join(map(str, agent.obs_dims))} and has {agent.action_dim}"
        )
    if env.continuous != getattr(loaded, "continuous", True):
        kinds = ("one of several", "numbers")
        raise click.UsageError(
            f"actions of {environment} are {kinds[env.continuous]}; those of {model} are {kinds[not env.continuous]}"
        )
    began = time.perf_counter()
    found = agents.run(agent, env, episodes)
    seconds = time.perf_counter() - began
    chance = agents.random_returns(envs.make(environment, count, seed=seed), episodes)
    result = {
        "model": model, "environment": environment, "episodes": episodes, "return": float(found.mean()),
        "deviation": float(found.std(correction=0)), "random": float(chance.mean()), "seconds": seconds,
    }  # fmt: skip
    if as_json:
        output.emit(result)
        return
    click.echo(
        f"{environment}: return {result['return']:.4g} ± {result['deviation']:.2g} over {episodes} episodes "
        f"(random actions {result['random']:.4g}), {seconds:.1f} s"
    )
