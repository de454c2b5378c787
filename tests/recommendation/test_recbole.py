"""Against RecBole itself: its answers recorded in recbole_1_2_1.json, and its code where it is installed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo_recommendation import baselines
from zoo_recommendation.baselines import GRU4Rec, SASRec
from zoo_recommendation.protocol import Ranking, prepare, split
from zoo_recommendation.recbole_models import RecBoleModel, installed
from zoo_recommendation.training import evaluate, train_epoch

from . import recbole_data

RECORDED = json.loads((Path(__file__).parent / "recbole_1_2_1.json").read_text())


@pytest.mark.parametrize("which", ["valid", "test"])
def test_metrics_on_the_same_scores(which):
    """Filter, split, order and ranking end to end: RecBole's Trainer.evaluate on these interactions and scores."""
    table = prepare(*recbole_data.interactions(), core=5)
    parts = split(table, 10)
    assert (table.n_users, table.n_items) == (RECORDED["users"], RECORDED["items"])
    assert [len(part) for part in parts] == RECORDED["samples"]
    samples = parts[1] if which == "valid" else parts[2]
    ranking = Ranking((5, 10, 20))
    scores = torch.from_numpy(recbole_data.scores(table.n_users, table.n_items))
    for batch in samples.batches(37):
        ranking.add(scores[batch["user"]], batch["target"])
    found = ranking.result()
    assert found.keys() == RECORDED[which].keys()
    for metric, value in RECORDED[which].items():
        assert found[metric] == pytest.approx(value, abs=1e-9), metric


def test_order_of_the_test_samples():
    table = prepare(*recbole_data.interactions(), core=5)
    test = split(table, 10)[2]
    assert [table.user_tokens[u] for u in test.user[:20]] == RECORDED["test_user_names"]
    assert [table.item_tokens[i] for i in test.target[:20]] == RECORDED["test_item_names"]


def test_three_epochs_of_training():
    """RecBole's Trainer from recorded weights, without dropout and shuffling: our losses and scores are its own."""
    recorded = RECORDED["training"]
    parts = split(prepare(*recbole_data.interactions(), core=5), 10)
    model = SASRec(RECORDED["items"], hidden_size=4, num_layers=1, max_length=10, inner_size=8, dropout=0.0)
    model.load_state_dict(weights("training"))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = [train_epoch(model, optimizer, parts[0], 256, None) for _ in range(3)]
    assert losses == pytest.approx(recorded["losses"], rel=1e-5)
    for part, metrics in ((parts[1], recorded["valid"]), (parts[2], recorded["test"])):
        assert evaluate(model, part, (5, 10, 20)) == pytest.approx(metrics, abs=1e-9)


def weights(name):
    """RecBole's recorded weights under the names of torch's layers."""
    state = {k: torch.tensor(v, dtype=torch.float32) for k, v in RECORDED[name]["state"].items()}
    if name == "gru4rec":
        return {k.replace("gru_layers.", "gru."): v for k, v in state.items()}
    found = {}
    block = "trm_encoder.layer.0."
    for kind in ("weight", "bias"):
        parts = [state[f"{block}multi_head_attention.{part}.{kind}"] for part in ("query", "key", "value")]
        found[f"encoder.layers.0.self_attn.in_proj_{kind}"] = torch.cat(parts)
    names = {
        "item_embedding.": "item_embedding.",
        "position_embedding.": "position_embedding.",
        "LayerNorm.": "layer_norm.",
        f"{block}multi_head_attention.dense.": "encoder.layers.0.self_attn.out_proj.",
        f"{block}multi_head_attention.LayerNorm.": "encoder.layers.0.norm1.",
        f"{block}feed_forward.dense_1.": "encoder.layers.0.linear1.",
        f"{block}feed_forward.dense_2.": "encoder.layers.0.linear2.",
        f"{block}feed_forward.LayerNorm.": "encoder.layers.0.norm2.",
    }
    for key, value in state.items():
        for theirs, ours in names.items():
            if key.startswith(theirs):
                found[ours + key.removeprefix(theirs)] = value
    return found


@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_our_baselines_are_recboles_with_its_weights(name):
    if name == "sasrec":
        model = SASRec(12, hidden_size=4, num_layers=1, max_length=6, heads=2, inner_size=8)
    else:
        model = GRU4Rec(12, hidden_size=4, num_layers=1, max_length=6, inner_size=6)
    model.load_state_dict(weights(name))
    model.eval()
    recorded = RECORDED[name]
    user = model(torch.tensor(recorded["items"]), torch.tensor(recorded["lengths"]))
    np.testing.assert_allclose(user.detach().numpy(), recorded["user"], rtol=1e-4, atol=1e-5)
    loss = model.loss(user, torch.tensor(recorded["target"])).detach()
    assert float(loss) == pytest.approx(recorded["loss"], rel=1e-4)


@pytest.mark.skipif(installed(), reason="RecBole is installed here")
def test_without_recbole():
    with pytest.raises(ModuleNotFoundError, match=r"RecBole is not installed: pip install .*\[recbole\]"):
        RecBoleModel("sasrec", 12, hidden_size=4)
    with pytest.raises(ModuleNotFoundError, match="RecBole is not installed"):
        baselines.build("gru4rec", n_items=12, implementation="recbole")
    assert isinstance(baselines.build("sasrec", n_items=12), SASRec)


@pytest.mark.skipif(not installed(), reason="RecBole is not installed here")
@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_recboles_own(name):
    small = {
        "n_items": 12,
        "hidden_size": 4,
        "num_layers": 1,
        "max_length": 6,
        "inner_size": 8 if name == "sasrec" else 6,
    }
    model = baselines.build(name, **small)
    assert isinstance(model, RecBoleModel)
    assert not torch.is_anomaly_enabled()  # RecBole turns it on for the process, and training is then much slower
    recorded = RECORDED[name]
    state = {f"model.{k}": torch.tensor(v, dtype=torch.float32) for k, v in recorded["state"].items()}
    model.load_state_dict(state)
    model.eval()
    user = model(torch.tensor(recorded["items"]), torch.tensor(recorded["lengths"]))
    np.testing.assert_allclose(user.detach().numpy(), recorded["user"], rtol=1e-4, atol=1e-5)
    loss = model.loss(user, torch.tensor(recorded["target"])).detach()
    assert float(loss) == pytest.approx(recorded["loss"], rel=1e-4)
    assert (
        model.train()
        .loss(model(torch.tensor(recorded["items"]), torch.tensor(recorded["lengths"])), torch.tensor([1, 2]))
        .requires_grad
    )


def test_bad_arguments():
    with pytest.raises(ValueError, match="expected one of sasrec, gru4rec"):
        baselines.build("bert4rec", n_items=12)
    with pytest.raises(ValueError, match="sasrec has no argument d_state"):
        baselines.build("sasrec", n_items=12, d_state=4)
    with pytest.raises(ValueError, match="implementation is 'tf'"):
        baselines.build("sasrec", n_items=12, implementation="tf")
