"""The contract's checks of checkpointing and autocast fail for the faults that they are there for."""

import msgspec
import pytest
import torch
from torch import nn

import zoo.testing
from zoo.layers import GradCheckpointing, Recomputed
from zoo.testing import Case, check_autocast, check_grad_checkpointing


class Block(Recomputed):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.up, self.norm, self.drop = nn.Linear(6, 24), nn.BatchNorm1d(24), nn.Dropout(0.5)
        self.down = nn.Linear(24, 6)
        self.register_buffer("calls", torch.zeros(()))

    def __call__(self, *args, **kwargs):
        if self.fault == "plain" or not (self.grad_checkpointing and torch.is_grad_enabled()):
            return nn.Module.__call__(self, *args, **kwargs)
        if self.fault != "statistics":
            return super().__call__(*args, **kwargs)
        return torch.utils.checkpoint.checkpoint(super(Recomputed, self).__call__, *args, use_reentrant=False)

    def forward(self, x):
        if self.fault == "counts":
            self.calls += 1
        return x + self.down(self.drop(torch.relu(self.norm(self.up(x)))))


class Model(GradCheckpointing, nn.Module):
    """Two blocks with a fault (or none) that the name of it describes."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.blocks = nn.ModuleList(Block(fault) for _ in range(2))
        self.weight = nn.Parameter(torch.full((6, 6), 0.3))
        self.kept = None

    def forward(self, x):
        for block in self.blocks:
            given = x * 1
            x = block(given)
            if self.fault == "in place":
                given.data.mul_(2)
        if self.fault == "rounds" and torch.is_autocast_enabled("cpu"):
            x = x * 2
        if self.fault == "overflows" and torch.is_autocast_enabled("cpu"):
            x = x / 0
        if self.fault == "gradient" and torch.is_autocast_enabled("cpu"):
            x = x + (x.detach() * 0 + self.weight[0, 0] * 0).sqrt()
        if self.fault == "keeps" and not self.training:
            self.kept = self.weight @ self.weight if self.kept is None else self.kept
            return x @ self.kept.to(x.dtype)
        return x @ (self.weight @ self.weight)


class Without(nn.Linear):
    """No blocks, no checkpointing."""

    def __init__(self) -> None:
        super().__init__(6, 6)


@pytest.fixture
def faulty(toys, monkeypatch):
    import zoo_toys.models

    for kind in (Model, Without):
        monkeypatch.setattr(zoo_toys.models, kind.__name__, kind, raising=False)
    card = zoo.testing.case("toy_small").card

    def make(builder: str = "Model", **config: str) -> Case:
        return Case(msgspec.structs.replace(card, builder=f"zoo_toys.models:{builder}"), config, {"shape": [6]})

    return make


def test_a_good_model_passes_and_one_without_is_skipped(faulty):
    assert check_grad_checkpointing(faulty())
    assert check_autocast(faulty())
    assert check_grad_checkpointing(faulty("Without")) is False


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("in place", "the gradient of blocks.* with gradient checkpointing"),
        ("statistics", "the buffer blocks.0.norm.running_mean with gradient checkpointing"),
        ("counts", "the buffer blocks.0.calls with gradient checkpointing"),
        ("plain", "though 2 blocks are to be recomputed"),
    ],
)
def test_faults_of_checkpointing_are_found(faulty, fault, said):
    with pytest.raises(AssertionError, match=said):
        check_grad_checkpointing(faulty(fault=fault))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("rounds", "away from float32"),
        ("overflows", "not finite under autocast"),
        ("keeps", "in float32 after autocast"),
        ("gradient", "weight gets a gradient not finite"),
    ],
)
def test_faults_under_autocast_are_found(faulty, fault, said):
    with pytest.raises(AssertionError, match=said):
        check_autocast(faulty(fault=fault))
