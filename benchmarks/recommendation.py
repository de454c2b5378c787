"""Quality, training speed and serving speed of the recommenders.

    uv run python benchmarks/recommendation.py quality --data path/to/ml-100k.inter --save
    uv run python benchmarks/recommendation.py training --threads 2
    uv run python benchmarks/recommendation.py serving

``quality`` trains under RecBole's protocol on an interaction file that you give (MovieLens' licence keeps it out of
this repository); seeds and models of several commands come together in one file. ``training`` compares a step of ``zoo
train`` with two others on the reference operators, which are the definition of each operator in torch and torch's own
modules (matrix products, dropout), the whole batch at once: "this form" is the same network, its last layer at the
scored position only, "original's form" every layer at every position; and with SASRec, RecBole's own where it is
installed, stepped whole as RecBole's Trainer does, and some sequences at a time as ``zoo train`` does. ``serving``
compares an update of a user's state with recomputing the history and with SASRec. Each prints ratios of one run and
writes JSON to benchmarks/results/ with ``--save``.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import zoo
import zoo_kernels
from zoo_recommendation import baselines
from zoo_recommendation._base import SequentialRecommender
from zoo_recommendation.protocol import prepare, split
from zoo_recommendation.recbole_models import installed
from zoo_recommendation.serving import Recommender, SQLiteStore
from zoo_recommendation.tables import read_table
from zoo_recommendation.training import Settings, evaluate, fit, keep_freed_memory, train_step

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
    if name.startswith("sasrec"):
        implementation = "recbole" if "RecBole" in name else "torch"
        return baselines.build("sasrec", n_items=n_items, max_length=max_length, implementation=implementation)
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
    }
    path = RESULTS / "recommendation_quality.json"
    found: dict[str, dict] = {}
    for name in arguments.models:
        for seed in arguments.seeds:
            torch.manual_seed(seed)
            model = build(name, table.n_items, 50)
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(arguments.runs or temporary) / f"{name}_{seed}"
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


def timed(runs: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median seconds of each run; they take turns, so that a disturbance meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeat + 1):  # the first turn warms up
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def timed_steps(runs: dict[str, Callable[[], object]], turns: int, steps: int) -> dict[str, float]:
    """Median seconds of a step in training: in each turn a run steps once unmeasured, since the one before it has left
    other things in caches and in the allocator, and then ``steps`` times."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            run()
            for _ in range(steps):
                began = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def training(arguments: argparse.Namespace) -> dict:
    keep_freed_memory()  # as zoo train does; for all that is compared
    found = {}
    for length in arguments.lengths:
        batch = arguments.tokens // length
        lengths = torch.full((batch,), length)
        items, target = torch.randint(1, 1350, (batch, length)), torch.randint(1, 1350, (batch,))
        times = torch.rand(batch, length).sort(dim=1).values

        batch_of = {"item_seq": items, "item_seq_len": lengths, "times": times, "target": target}

        def stepper(name: str, form: str = "", batch_of=batch_of):
            torch.manual_seed(0)
            model = build(name, 1350, batch_of["item_seq"].shape[1]).train()
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
            if form == "original":  # every layer at every position
                model.encode_at = functools.partial(SequentialRecommender.encode_at, model)

            def whole() -> None:  # RecBole's Trainer's step
                optimizer.zero_grad(set_to_none=True)
                user = model(batch_of["item_seq"], batch_of["item_seq_len"], batch_of["times"])
                model.loss(user, batch_of["target"]).backward()
                optimizer.step()

            def reference() -> None:
                with zoo_kernels.backend("reference"):
                    whole()

            if form in ("original", "same"):
                return reference
            return whole if form == "whole" else functools.partial(train_step, model, optimizer, batch_of)

        zoo_models = ("mamba4rec", "ssd4rec", "tim4rec")
        sasrecs = ("sasrec", "sasrec (RecBole)") if installed() else ("sasrec",)
        runs = {name: stepper(name) for name in zoo_models}
        runs |= {name: stepper(name, "whole") for name in sasrecs}
        if length in arguments.reference_lengths:
            runs |= {f"{name}, some sequences at a time": stepper(name) for name in sasrecs}
        row = timed_steps(runs, arguments.repeat, 3)
        forms = {"original's form": "original", "this form": "same"} if length in arguments.reference_lengths else {}
        slow = {
            f"{name}, {form} on the reference operators": stepper(name, short)
            for form, short in forms.items()
            for name in zoo_models
        }
        row |= timed_steps(slow, 1, arguments.reference_repeat)
        peer = sasrecs[-1]
        print(f"length {length}, batch {batch}: seconds a training step, and as a part of {peer}'s")
        for name, seconds in row.items():
            print(f"  {name:52} {seconds:8.3f} {seconds / row[peer]:6.2f}")
        ratios: dict[str, dict[str, float]] = {}
        for name in zoo_models:
            ratios[name] = {f"time / {peer}": round(row[name] / row[peer], 3)}
            for form in forms:
                slower = f"{form} on the reference operators"
                ratios[name][f"{slower} / time"] = round(row[f"{name}, {slower}"] / row[name], 2)
            print(f"  {name}: " + ", ".join(f"{k} {v}" for k, v in ratios[name].items()))
        found[str(length)] = {"batch": batch, "seconds_a_step": row, "ratios": ratios}
    return {"lengths": found}


def serving(arguments: argparse.Namespace) -> dict:
    tokens = ["[PAD]", *map(str, range(1, 3417))]
    found = {}
    sasrec = "sasrec (RecBole)" if installed() else "sasrec"
    for length in arguments.lengths:
        history = np.random.default_rng(0).integers(1, 3417, length)
        ids, count = torch.from_numpy(history)[None], torch.tensor([length])
        with tempfile.TemporaryDirectory() as folder:
            model = zoo.create("mamba4rec_ml1m").eval()
            memory = Recommender(model, tokens)
            file = Recommender(model, tokens, SQLiteStore(Path(folder) / "users.sqlite"))
            attention = Recommender(build(sasrec, 3417, length).eval(), tokens)
            for user in (memory, file, attention):
                for item in history:
                    user.update("u", str(item))

            def answer(recommender: Recommender) -> None:
                recommender.update("u", "17")
                recommender.recommend("u", 10)

            def recompute(model=model, ids=ids, count=count) -> None:
                with torch.no_grad():
                    model.scores(model(ids, count))[0].topk(10)

            runs = {
                "update": functools.partial(memory.update, "u", "17"),
                "update and answer": functools.partial(answer, memory),
                "update and answer, SQLite": functools.partial(answer, file),
                "recompute the history and answer": recompute,
                f"{sasrec}, update and answer": functools.partial(answer, attention),
            }
            row = {name: timed({name: run}, arguments.repeat)[name] for name, run in runs.items()}

            crowd = 256
            users = [f"u{i}" for i in range(crowd)]
            events = [(user, "17", 0.0) for user in users]
            for recommender in (memory, file):
                recommender.update_many(events)
            many_ids, many = ids.expand(crowd, -1), count.expand(crowd)

            def vectors(model, ids=many_ids, count=many) -> None:
                with torch.no_grad():
                    model(ids, count)

            runs = {
                f"{crowd} users: update": functools.partial(memory.update_many, events),
                f"{crowd} users: update, SQLite": functools.partial(file.update_many, events),
                f"{crowd} users: recompute": functools.partial(vectors, model),
                f"{crowd} users: {sasrec}": functools.partial(vectors, attention.model),
            }
            row |= {name: timed({name: run}, 3)[name] / crowd for name, run in runs.items()}
            file.store.close()
        ratios = {
            f"{name} / update and answer": round(row[name] / row["update and answer"], 2)
            for name in ("recompute the history and answer", f"{sasrec}, update and answer")
        }
        ratios |= {
            f"{name} / update, {crowd} users": round(row[f"{crowd} users: {name}"] / row[f"{crowd} users: update"], 2)
            for name in ("recompute", sasrec)
        }
        found[str(length)] = {"events_a_second": {k: round(1 / v) for k, v in row.items()}, "ratios": ratios}
        print(f"history of {length} items: events a second")
        for name, seconds in row.items():
            print(f"  {name:36} {1 / seconds:10.0f}")
        print("  " + ", ".join(f"{k} {v}" for k, v in ratios.items()))
    return {"model": "mamba4rec_ml1m", "items": 3416, "histories": found}


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
    one.add_argument("--runs", help="folder that keeps the runs: the same command goes on after an interruption")
    two = commands.add_parser("training", parents=[shared])
    two.add_argument("--lengths", nargs="+", type=int, default=[50, 200, 1000])
    two.add_argument("--tokens", type=int, default=12800, help="items in a batch: batch = tokens / length")
    two.add_argument("--repeat", type=int, default=3, help="turns of three steps")
    two.add_argument("--reference-repeat", type=int, default=3, help="steps on the reference operators")
    two.add_argument(
        "--reference-lengths", nargs="+", type=int, default=[50, 200], help="where the reference operators run too"
    )
    three = commands.add_parser("serving", parents=[shared])
    three.add_argument("--lengths", nargs="+", type=int, default=[50, 200, 1000])
    three.add_argument("--repeat", type=int, default=50)
    for command in (two, three):
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(getattr(arguments, "threads", torch.get_num_threads()))
    print(machine())
    result = {"quality": quality, "training": training, "serving": serving}[arguments.what](arguments)
    if arguments.save:
        save(RESULTS / f"recommendation_{arguments.what}.json", result)


if __name__ == "__main__":
    main()
