"""Quality, training speed and serving speed of the recommenders.

    uv run python benchmarks/recommendation.py quality --data path/to/ml-100k.inter --save
    uv run python benchmarks/recommendation.py training --lengths 50 200
    uv run python benchmarks/recommendation.py serving

``quality`` trains under RecBole's protocol on an interaction file that you give (MovieLens' licence keeps it out of
this repository). ``training`` compares one epoch's step with the same model on the reference operators and with
SASRec. ``serving`` compares an update of a user's state with recomputing the history and with SASRec. Each prints
ratios of one run and writes JSON to benchmarks/results/ with ``--save``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import zoo
import zoo_kernels
from zoo_recommendation.baselines import SASRec
from zoo_recommendation.protocol import prepare, read_table, split
from zoo_recommendation.serving import Recommender
from zoo_recommendation.training import Settings, evaluate, fit

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str | int]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [x.split(":", 1)[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = models[0] if models else name
    return {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def save(path: Path, result: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    print(f"written to {path}", flush=True)


def build(name: str, n_items: int, max_length: int):
    if name == "sasrec":
        return SASRec(n_items, max_length=max_length)
    base = "tim4rec_ml1m_64" if name in ("tim4rec", "ssd4rec") else "mamba4rec_ml1m"
    more = {"time": False} if name == "ssd4rec" else {}
    return zoo.create(base, n_items=n_items, max_length=max_length, **more)


# -- quality
# ------------------------------------------------------------------------------------------------------------


def quality(arguments: argparse.Namespace) -> dict:
    scaled = Path(arguments.data).stem == "ml-100k"  # RecBole's own default for this data set's name
    table = prepare(*read_table(arguments.data), core=5, scale_time=scaled)
    parts = split(table, 50)
    print(f"{table.n_users - 1} users, {table.n_items - 1} items, {len(parts[0])} training samples")
    setting = {
        "data": Path(arguments.data).name,
        "protocol": "RecBole: 5-core, leave-one-out, full ranking; length 50, batch 512, Adam 1e-3",
        "epochs": arguments.epochs,
    }
    path = RESULTS / "recommendation_quality.json"
    found: dict[str, dict] = {}
    for name in arguments.models:
        for seed in arguments.seeds:
            torch.manual_seed(seed)
            model = build(name, table.n_items, 50)
            with tempfile.TemporaryDirectory() as folder:
                settings = Settings(epochs=arguments.epochs, batch_size=512, patience=arguments.epochs, seed=seed)
                history = fit(model, parts[0], parts[1], folder, settings, on_epoch=lambda row: print(row, flush=True))
            run = {"best_epoch": history.best_epoch, "test": evaluate(model, parts[2]), "epochs": history.epochs}
            if arguments.save and path.exists():  # a run takes long: what other commands have found stays
                stored = json.loads(path.read_text())
                if all(stored.get(k) == v for k, v in setting.items()):
                    found = stored["runs"]
            found.setdefault(name, {})[str(seed)] = run
            if arguments.save:
                save(path, {**setting, "summary": {k: summary(v) for k, v in found.items()}, "runs": found})
        for metric, value in summary(found[name])["test"].items():
            print(f"{name:10} {metric:8} {value['mean']:.4f} +- {value['std']:.4f} over {len(found[name])} seeds")
    return {**setting, "summary": {k: summary(v) for k, v in found.items()}, "runs": found}


def summary(runs: dict[str, dict]) -> dict:
    """Mean and standard deviation over the seeds of one model."""
    test = {}
    for metric in next(iter(runs.values()))["test"]:
        values = [run["test"][metric] for run in runs.values()]
        test[metric] = {
            "mean": round(statistics.mean(values), 5),
            "std": round(statistics.stdev(values), 5) if len(values) > 1 else None,
        }
    return {"seeds": sorted(runs), "test": test}


# -- speed
# ---------------------------------------------------------------------------------------------------------------


def median_seconds(run, repeat: int) -> float:
    run()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def training(arguments: argparse.Namespace) -> dict:
    found = {}
    for length in arguments.lengths:
        items = torch.randint(1, 1350, (arguments.batch, length))
        lengths = torch.full((arguments.batch,), length)
        times = torch.rand(arguments.batch, length).sort(dim=1).values
        target = torch.randint(1, 1350, (arguments.batch,))

        def stepper(name: str, length: int = length, batch=(items, lengths, times), target: torch.Tensor = target):
            torch.manual_seed(0)
            model = build(name, 1350, length).train()
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)

            def step() -> None:
                optimizer.zero_grad(set_to_none=True)
                model.loss(model(*batch), target).backward()
                optimizer.step()

            return step

        row = {}
        for name in ("mamba4rec", "ssd4rec", "tim4rec", "sasrec"):
            row[name] = median_seconds(stepper(name), arguments.repeat)
        with zoo_kernels.backend("reference"):
            for name in ("mamba4rec", "tim4rec"):
                row[f"{name}, reference operators"] = median_seconds(stepper(name), 1)
        found[str(length)] = row
        print(f"length {length}, batch {arguments.batch}: seconds a training step")
        for name, seconds in row.items():
            print(f"  {name:32} {seconds:8.3f}   SASRec / this: {row['sasrec'] / seconds:6.2f}")
        for name in ("mamba4rec", "tim4rec"):
            print(f"  {name}: {row[f'{name}, reference operators'] / row[name]:.1f} times the reference operators")
    return {"batch": arguments.batch, "seconds_a_step": found}


def serving(arguments: argparse.Namespace) -> dict:
    tokens = ["[PAD]", *map(str, range(1, 3417))]
    found = {}
    for length in arguments.lengths:
        history = np.random.default_rng(0).integers(1, 3417, length)
        recurrent = Recommender(zoo.create("mamba4rec_ml1m").eval(), tokens)
        attention = Recommender(build("sasrec", 3417, length).eval(), tokens)
        for user in (recurrent, attention):
            for item in history:
                user.update("u", str(item))
        ids, count = torch.from_numpy(history)[None], torch.tensor([length])

        def update(recommender: Recommender = recurrent) -> None:
            recommender.update("u", "17")
            recommender.recommend("u", 10)

        def recompute(recommender: Recommender = recurrent, ids=ids, count=count) -> None:
            with torch.no_grad():
                recommender.model.scores(recommender.model(ids, count))

        row = {
            "update and answer": median_seconds(update, arguments.repeat),
            "recompute the history": median_seconds(recompute, arguments.repeat),
            "SASRec, update and answer": median_seconds(lambda: update(attention), arguments.repeat),  # noqa: B023
        }
        found[str(length)] = row
        print(f"history of {length} items: events a second")
        for name, seconds in row.items():
            print(f"  {name:28} {1 / seconds:10.0f}")
        print(f"  an update is {row['recompute the history'] / row['update and answer']:.1f} times a recomputation")
    return {"seconds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--save", action="store_true", help="write benchmarks/results/recommendation_<what>.json")
    commands = parser.add_subparsers(dest="what", required=True)
    one = commands.add_parser("quality", parents=[shared])
    one.add_argument("--data", required=True)
    one.add_argument("--models", nargs="+", default=["tim4rec", "sasrec", "mamba4rec"])
    one.add_argument("--seeds", nargs="+", type=int, default=[2020, 2021, 2022])
    one.add_argument("--epochs", type=int, default=3)
    two = commands.add_parser("training", parents=[shared])
    two.add_argument("--lengths", nargs="+", type=int, default=[50, 200])
    two.add_argument("--batch", type=int, default=256)
    two.add_argument("--repeat", type=int, default=5)
    three = commands.add_parser("serving", parents=[shared])
    three.add_argument("--lengths", nargs="+", type=int, default=[50, 200, 1000])
    three.add_argument("--repeat", type=int, default=50)
    arguments = parser.parse_args()
    print(machine())
    result = {"quality": quality, "training": training, "serving": serving}[arguments.what](arguments)
    if arguments.save:
        save(RESULTS / f"recommendation_{arguments.what}.json", result)


if __name__ == "__main__":
    main()
