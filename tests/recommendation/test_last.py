"""The last row alone gives what the full encoding gives; the cheap dropout is dropout."""

import pytest
import torch
from torch import nn

import zoo_kernels
from zoo_kernels import ssd
from zoo_recommendation._base import SequentialRecommender
from zoo_recommendation.last import Dropout, rows_at, ssd_at
from zoo_recommendation.mamba4rec import Mamba4Rec
from zoo_recommendation.tim4rec import TiM4Rec

SMALL = {"n_items": 20, "hidden_size": 16, "max_length": 9, "d_state": 4}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("skip", [(4,), (4, 3)], ids=["D per head", "D per channel"])
def test_one_row_of_ssd(groups, skip):
    torch.manual_seed(0)
    x, dt = torch.randn(3, 9, 4, 3), torch.randn(3, 9, 4)
    A, bias, D = -torch.rand(4) * 8, torch.randn(4), torch.randn(skip)
    B, C = torch.randn(3, 9, groups, 5), torch.randn(3, 9, groups, 5)
    index = torch.tensor([8, 4, 0])
    whole, _ = ssd(x, dt, A, B, C, D, dt_bias=bias, dt_softplus=True)
    row = ssd_at(x, dt, A, B, rows_at(C, index), D, bias, index)
    torch.testing.assert_close(row, rows_at(whole, index), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "build",
    [
        lambda n: Mamba4Rec(**SMALL, num_layers=n),
        lambda n: TiM4Rec(**SMALL, num_layers=n, head_dim=8),
        lambda n: TiM4Rec(**SMALL, num_layers=n, head_dim=4, point_to_point=True, feed_forward=False),
        lambda n: TiM4Rec(**SMALL, num_layers=n, head_dim=8, time=False),
    ],
    ids=["mamba4rec", "tim4rec", "tim4rec, SiLU and no feed-forward", "ssd4rec"],
)
def test_values_and_gradients_of_the_full_encoding(build, layers):
    torch.manual_seed(0)
    model = build(layers)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():  # fresh weights make the mixers small; this is about their values
        for parameter in model.parameters():
            parameter.mul_(3)
    items, index = torch.randint(1, 20, (3, 9)), torch.tensor([8, 3, 0])
    times = torch.rand(3, 9).cumsum(1)
    found = []
    for call in (SequentialRecommender.encode_at, type(model).encode_at):
        model.zero_grad()
        user = call(model, items, index, times)
        (user * torch.arange(16)).sum().backward()
        found.append((user.detach(), {k: p.grad for k, p in model.named_parameters()}))
    (full, full_gradients), (row, row_gradients) = found
    assert type(model).encode_at is not SequentialRecommender.encode_at
    torch.testing.assert_close(row, full, rtol=1e-4, atol=1e-4)
    for name, gradient in row_gradients.items():
        if full_gradients[name] is None:
            assert gradient is None, name
        else:
            scale = float(full_gradients[name].abs().max())
            torch.testing.assert_close(gradient, full_gradients[name], rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_dropout_drops_and_scales():
    torch.manual_seed(0)
    dropout, x = Dropout(0.2), torch.ones(101, 999, requires_grad=True)
    y = dropout(x)
    assert float((y == 0).float().mean()) == pytest.approx(0.2, abs=0.005)
    assert float(y.detach().mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.unique(y.detach()).numel() == 2
    neighbours = (y.detach()[:, 1:] == 0) & (y.detach()[:, :-1] == 0)
    assert float(neighbours.float().mean()) == pytest.approx(0.04, abs=0.005)  # one draw's four parts are independent
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())


def test_dropout_follows_the_seed_and_the_mode():
    dropout, x = Dropout(0.5), torch.randn(7, 5)
    torch.manual_seed(3)
    one = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), one)
    assert not torch.equal(dropout(x), one)
    with zoo_kernels.backend("reference"):
        torch.manual_seed(3)
        torchs = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(torchs, nn.functional.dropout(x, 0.5))
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros_like(x))
