"""EEGDM's training: what is learned, what stays, what is measured."""

import numpy as np
import pytest
import torch

import zoo.testing
from zoo_neuro.eegdm.backbone import DiffusionBackbone
from zoo_neuro.eegdm.data import WindowSet
from zoo_neuro.eegdm.fusion import EEGClassifier
from zoo_neuro.eegdm.training import Averaged, EventLoss, finetune, groups, measures, predict, pretrain

SMALL = {"d_model": 8, "d_state": 8, "n_layer": 2, "d_cond": 12, "d_cond_embed": 8, "n_class": 2}
SMALL |= {"kernel_init": "diag-lin"}
HEAD = {"query": ["gate"], "reduce": ["std"], "L": 40, "window_size": 20, "window_step": 20, "n_clst": 2}
HEAD |= {"num_heads": 2, "ff": 2, "classifier_stack_struct": "sf", "clst_dim": "TP"}


def rhythms(n: int, seed: int) -> WindowSet:
    """Two kinds of windows: slow and fast sines under noise."""
    r = np.random.default_rng(seed)
    labels = r.integers(2, size=n)
    hz = np.where(labels == 0, 1.5, 9.0)[:, None, None]
    phase = r.uniform(0, 6, (n, 2, 1))
    x = np.sin(2 * np.pi * hz * np.arange(40) / 40 + phase) + 0.3 * r.normal(size=(n, 2, 40))
    return WindowSet(x.astype(np.float32), labels, ["slow", "fast"], np.array([f"S{i % 5}" for i in range(n)]))


def test_pretraining_lowers_the_loss_and_keeps_the_average():
    torch.manual_seed(0)
    model = DiffusionBackbone(**SMALL)
    x = np.full((4, 2, 24), 0.7, np.float32)
    losses = pretrain(model, x, steps=40, batch_size=16, rate=2e-2, averaging={"beta": 0.9, "after": 5})
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5]), losses
    assert not model.training
    with pytest.raises(ValueError, match="knows 0 to 1"):
        pretrain(model, np.zeros((2, 3, 40), np.float32), steps=1)


@pytest.mark.parametrize("n_class", [2, 1])
def test_finetuning_learns_what_two_rhythms_are(n_class):
    torch.manual_seed(0)
    model = EEGClassifier({**SMALL, "zero_init": False}, **HEAD, n_class=n_class)
    before = {k: v.clone() for k, v in model.extractor.state_dict().items()}
    epochs = finetune(
        model, rhythms(96, 1), rhythms(32, 2), epochs=12, batch_size=16, top_rate=1e-2, smoothing=0.0,
        averaging={"after": 5, "every": 1},
    )  # fmt: skip
    test = rhythms(64, 3)
    found = measures(predict(model, test.x), test.labels)
    assert found["accuracy"] > 0.9, [e.measures["accuracy"] for e in epochs]
    assert all(torch.equal(v, before[k]) for k, v in model.extractor.state_dict().items()), "the backbone is frozen"
    assert ("auroc" in found) is (n_class == 1)


def test_training_stops_and_leaves_the_best_epoch():
    torch.manual_seed(0)
    model = EEGClassifier({**SMALL, "zero_init": False}, **HEAD, n_class=2)
    seen = []
    epochs = finetune(
        model, rhythms(32, 1), rhythms(32, 2), epochs=30, batch_size=16, top_rate=1e-9, patience=1, warmup=3,
        report=lambda e: seen.append(e.number),
    )  # fmt: skip
    assert seen == [0, 1, 2, 3]
    assert len(epochs) == 4
    with pytest.raises(ValueError, match="3 classes and 2 outputs"):
        finetune(
            model, WindowSet(rhythms(4, 0).x, np.zeros(4, int), list("abc"), np.array(list("abcd"))), rhythms(4, 1)
        )


def test_training_goes_on_after_an_interruption(tmp_path):
    def pretrained(run, report):
        torch.manual_seed(0)
        model = DiffusionBackbone(**SMALL)
        averaging = {"beta": 0.9, "after": 1, "every": 1}
        pretrain(model, rhythms(8, 0).x, steps=5, batch_size=4, averaging=averaging, run=run, report=report)
        return model

    def tuned(run, report):
        torch.manual_seed(0)
        model = EEGClassifier({**SMALL, "zero_init": False}, **HEAD, n_class=2)
        settings = {"epochs": 4, "batch_size": 8, "averaging": {"after": 1, "every": 1}}
        finetune(model, rhythms(16, 1), rhythms(8, 2), run=run, report=report, **settings)
        return model

    zoo.testing.check_resume(pretrained, tmp_path / "a", after=3)
    zoo.testing.check_resume(tuned, tmp_path / "b")


def test_averages_are_ema_pytorchs():
    """Every 2nd step; copies for 4 steps, then decay 1 - (1 + n)^(-2/3), n counted from step 4, at most beta."""
    p = torch.nn.Parameter(torch.zeros(1))
    average, expected = Averaged([p], beta=0.7, after=4, every=2), 0.0
    for step in range(14):
        p.data.fill_(float(step))
        average.update()
        if step % 2 == 0:
            decay = 0.0 if step <= 4 else min(0.7, 1 - (1 + step - 4) ** (-2 / 3))
            expected = decay * expected + (1 - decay) * step
        assert average.values[0].item() == pytest.approx(expected, rel=1e-5)
    average.swap()
    assert p.item() == pytest.approx(expected, rel=1e-5)
    assert average.values[0].item() == 13.0


def test_loss_is_the_originals():
    logits, labels = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3]]), torch.tensor([0, 2])
    log = logits.log_softmax(-1)
    smooth = -(0.9 * log.gather(1, labels[:, None])[:, 0] + 0.1 * log.mean(1))
    torch.testing.assert_close(EventLoss(0.1)(logits, labels), smooth.mean())
    sure = log.exp().gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(EventLoss(0.1, gamma=2)(logits, labels), ((1 - sure) ** 2 * smooth).mean())
    one, yes = torch.tensor([[0.3], [-2.0]]), torch.tensor([1, 0])
    expected = -(150.51 * torch.tensor(0.3).sigmoid().log() + (1 - torch.tensor(-2.0).sigmoid()).log()) / 2
    torch.testing.assert_close(EventLoss(0.0, pos_weight=150.51)(one, yes), expected)


def test_what_decays():
    torch.manual_seed(0)
    model = EEGClassifier(SMALL, **HEAD)
    decayed, kept = (set(map(id, g["params"])) for g in groups(model, 0.05))
    named = dict(model.named_parameters())
    assert id(named["decoder.cls_token"]) in kept
    assert id(named["classifier.linear.bias"]) in kept
    assert id(named["classifier.linear.weight"]) in decayed
    assert not any(id(p) in decayed | kept for n, p in named.items() if n.startswith("extractor"))


def test_measures_are_sklearns():
    metrics = pytest.importorskip("sklearn.metrics")
    r = np.random.default_rng(0)
    shares, labels = r.dirichlet(np.ones(4), 60), r.integers(4, size=60)
    said, found = shares.argmax(1), measures(shares, labels)
    assert found["balanced accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, said))
    assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score(labels, said))
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, said, average="weighted"))
    score, truth = np.round(r.random(60), 1), r.integers(2, size=60)
    found = measures(score[:, None], truth)
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(truth, score))
    assert found["auprc"] == pytest.approx(metrics.average_precision_score(truth, score))
