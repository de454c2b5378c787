"""Mamba4Rec beside its original, batch by batch, in RecBole's own loop of batches.

    python benchmarks/recommendation_replay.py --data path/to/folder --original path/to/Mamba4Rec/mamba4rec.py \\
        --mamba path/to/mamba/mamba_ssm/modules/mamba_simple.py --save

Whether a difference in quality is the model's or the seed's: both networks start from the same weights and take Adam
steps over the same batches of RecBole's training loader with the same random state, so that every dropout mask is the
same; then both score RecBole's test users. Here our model computes every layer at every position and draws dropout as
torch does (what ``zoo train`` does instead is tested against this form in ``tests/recommendation/test_last.py``).

``--train 2020 2021 2022`` trains the original instead, by RecBole's Trainer, which says how much its own figures vary.

``--data``: the folder that holds ``ml-100k/ml-100k.inter``. The two files are the originals', of
chengkai-liu/Mamba4Rec @ 44a0c84 and state-spaces/mamba; their CUDA scan is replaced by this project's on the CPU. Needs
RecBole 1.2.1 with numpy below 2, einops, and this project on the path. Without ``mamba_ssm`` installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from zoo_kernels import selective_scan
from zoo_recommendation._base import SequentialRecommender
from zoo_recommendation.last import Dropout
from zoo_recommendation.mamba4rec import Mamba4RecAdapter
from zoo_recommendation.protocol import Ranking

RESULTS = Path(__file__).parent / "results" / "recommendation_replay.json"


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """The original's ``selective_scan_fn``, channels before length."""
    u, delta, B, C, z = (t.transpose(1, 2).contiguous() for t in (u, delta, B, C, z))
    y, _ = selective_scan(u, delta, A, B, C, D, z, delta_bias, dt_softplus=delta_softplus)
    return y.transpose(1, 2)


def module(name: str, path: Path | None = None, **contents: object) -> types.ModuleType:
    """A module from a file, or one made of ``contents``, under ``name``."""
    if path is None:
        made = types.ModuleType(name)
        made.__dict__.update(contents)
        sys.modules[name] = made
        return made
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def losses(model: torch.nn.Module, batches: list, loss_of: Callable) -> list[float]:
    """The loss of each batch, with an Adam step after it."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    torch.manual_seed(7)
    found = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def trained(theirs: type, settings: dict, seeds: list[int], epochs: int) -> dict[str, dict[str, float]]:
    """The original's test figures after ``epochs`` of RecBole's Trainer, for each seed."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    found: dict[str, dict[str, float]] = {}
    for seed in seeds:
        extra = {"epochs": epochs, "learning_rate": 1e-3, "topk": [10, 20], "metric_decimal_place": 6, "seed": seed}
        config = Config(model=theirs, dataset="ml-100k", config_dict={**settings, **extra, "show_progress": False})
        init_seed(seed, True)
        train, valid, test = data_preparation(config, create_dataset(config))
        init_seed(seed, True)
        trainer = Trainer(config, theirs(config, train.dataset))
        trainer.fit(train, valid, saved=False, verbose=False)
        found[str(seed)] = {k: float(v) for k, v in trainer.evaluate(test, load_best_model=False).items()}
        print(seed, found[str(seed)], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--mamba", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--seed", type=int, default=2020)
    parser.add_argument("--train", nargs="+", type=int, metavar="SEED", help="train the original with these seeds")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/recommendation_replay.json")
    arguments = parser.parse_args()
    original, mamba, data = (path.resolve() for path in (arguments.original, arguments.mamba, arguments.data))
    sys.argv = sys.argv[:1]  # RecBole reads it too

    module("mamba_ssm.ops")
    module("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=scan, mamba_inner_fn=None)
    package = module("mamba_ssm")
    package.Mamba = module("mamba_simple", mamba).Mamba  # type: ignore[attr-defined]
    theirs = module("mamba4rec", original).Mamba4Rec

    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import init_seed

    configuration = {
        "hidden_size": 64, "num_layers": 1, "dropout_prob": 0.2, "loss_type": "CE", "d_state": 32, "d_conv": 4,
        "expand": 2, "MAX_ITEM_LIST_LENGTH": 50,
    }  # fmt: skip
    protocol = {
        "data_path": str(data), "use_gpu": False, "train_batch_size": 512, "eval_batch_size": 4096,
        "user_inter_num_interval": "[5,inf)", "item_inter_num_interval": "[5,inf)",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "train_neg_sample_args": None,
        "metrics": ["Hit", "NDCG", "MRR"], "valid_metric": "NDCG@10", "seed": arguments.seed,
    }  # fmt: skip
    began = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:  # RecBole writes where it stands
        os.chdir(folder)
        if arguments.train:
            runs = trained(theirs, {**configuration, **protocol}, arguments.train, arguments.epochs)
            if arguments.save:
                kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
                kept[f"original after {arguments.epochs} epochs of RecBole's Trainer, by seed"] = runs
                RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
            return
        config = Config(model=theirs, dataset="ml-100k", config_dict={**configuration, **protocol})
        init_seed(config["seed"], True)
        train, _, test = data_preparation(config, create_dataset(config))
        init_seed(config["seed"], True)
        original_model = theirs(config, train.dataset)
        os.chdir(began)
    batches = list(islice(train, arguments.batches))
    state = {name: tensor.clone() for name, tensor in original_model.state_dict().items()}
    ours = Mamba4RecAdapter().build({"n_items": original_model.n_items, **configuration}, state)
    for part in ours.modules():
        if isinstance(part, Dropout):
            part.__class__ = torch.nn.Dropout

    def our_loss(model: SequentialRecommender, batch) -> torch.Tensor:
        user = SequentialRecommender.encode_at(model, batch["item_id_list"], batch["item_length"] - 1)
        return model.loss(user, batch["item_id"])

    want = losses(original_model, batches, lambda model, batch: model.calculate_loss(batch))
    found = losses(ours, batches, our_loss)
    rankings = Ranking((10, 20)), Ranking((10, 20))
    difference = largest = 0.0
    original_model.eval()
    ours.eval()
    with torch.no_grad():
        for batch, *_ in test:
            scores = original_model.full_sort_predict(batch)
            ours_scores = ours.scores(ours(batch["item_id_list"], batch["item_length"]))
            difference = max(difference, float((scores - ours_scores).abs().max()))
            largest = max(largest, float(scores.abs().max()))
            for ranking, values in zip(rankings, (scores, ours_scores), strict=True):
                ranking.add(values, batch["item_id"])
    result = {
        "data": "ml-100k.inter",
        "samples": [len(train.dataset), len(test.dataset)],
        "batches": len(batches),
        "seed": arguments.seed,
        "loss of the first and last batch": {"original": [want[0], want[-1]], "ours": [found[0], found[-1]]},
        "largest relative difference of a loss": max(abs(a - b) / a for a, b in zip(want, found, strict=True)),
        "largest difference of a score": difference,
        "largest score": largest,
        "test after these batches": {"original": rankings[0].result(), "ours": rankings[1].result()},
    }
    print(json.dumps(result, indent=1))
    if arguments.save:
        kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        RESULTS.write_text(json.dumps({**kept, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
