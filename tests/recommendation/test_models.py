"""The recommenders: causality, padding, states, losses."""

import pytest
import torch

from zoo_recommendation.baselines import GRU4Rec, SASRec
from zoo_recommendation.mamba4rec import Mamba4Rec
from zoo_recommendation.tim4rec import TiM4Rec

SMALL = {"n_items": 20, "hidden_size": 16, "num_layers": 2, "max_length": 8}
MODELS = {
    "mamba4rec": lambda: Mamba4Rec(**SMALL, d_state=4),
    "tim4rec": lambda: TiM4Rec(**SMALL, d_state=4, head_dim=8),
    "ssd4rec": lambda: TiM4Rec(**SMALL, d_state=4, head_dim=8, time=False),
    "sasrec": lambda: SASRec(**SMALL),
    "gru4rec": lambda: GRU4Rec(**SMALL),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def history(batch=3, length=8):
    torch.manual_seed(1)
    items = torch.randint(1, 20, (batch, length))
    lengths = torch.tensor([length, 5, 1][:batch])
    items[torch.arange(length) >= lengths[:, None]] = 0
    times = (torch.rand(batch, length).cumsum(1)) * (items > 0)
    return items, lengths, times


def test_scores_every_item(model):
    items, lengths, times = history()
    user = model(items, lengths, times)
    assert user.shape == (3, 16)
    assert model.scores(user).shape == (3, 20)


def test_rows_are_independent(model):
    items, lengths, times = history()
    whole = model(items, lengths, times)
    alone = torch.cat([model(items[i : i + 1], lengths[i : i + 1], times[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


def test_items_after_the_last_do_not_matter(model):
    items, lengths, times = history()
    other = torch.where(items == 0, torch.randint(1, 20, items.shape), items)
    torch.testing.assert_close(model(items, lengths, times), model(other, lengths, times), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba4rec", "ssd4rec", "gru4rec"])
def test_step_by_step_is_the_whole_history(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    assert model.recurrent
    items = torch.randint(1, 20, (2, 30))  # longer than max_length: a state has no window
    with torch.no_grad():
        whole = model(items, torch.tensor([30, 30]))
        state = model.init_user(2)
        for t in range(30):
            user = model.step(items[:, t], state)
    torch.testing.assert_close(user, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tim4rec", "sasrec"])
def test_models_without_a_state_say_so(name):
    with pytest.raises(NotImplementedError, match="no state of fixed size"):
        MODELS[name]().init_user(1)


@pytest.mark.parametrize("loss", ["CE", "BPR"])
def test_losses_fall(loss):
    torch.manual_seed(0)
    model = Mamba4Rec(**SMALL, d_state=4, dropout=0.0, loss_type=loss)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    items, lengths, _ = history()
    target, negative = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        value = model.loss(model(items, lengths), target, negative)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_bad_arguments():
    with pytest.raises(ValueError, match="loss_type is 'MSE'"):
        Mamba4Rec(**SMALL, loss_type="MSE")
    with pytest.raises(ValueError, match="n_items is 1"):
        Mamba4Rec(n_items=1)
    model = MODELS["tim4rec"]()
    items, lengths, times = history()
    with pytest.raises(ValueError, match="reads the time"):
        model(items, lengths)
    with pytest.raises(ValueError, match="its own max_length 8"):
        model(items[:, :4], lengths.clamp(max=4), times[:, :4])
    with pytest.raises(ValueError, match="item_seq_len has shape"):
        model(items, lengths[:2], times)
    with pytest.raises(ValueError, match="needs negative items"):
        Mamba4Rec(**SMALL, loss_type="BPR").loss(torch.zeros(1, 16), torch.tensor([1]))


@pytest.mark.parametrize(
    ("items", "length", "message"),
    [
        ([1, 2, 0], 0, "item_seq_len is 0 in row 0; expected 1 to 3"),
        ([1, 2, 0], 4, "item_seq_len is 4 in row 0; expected 1 to 3"),
        ([1, 20, 0], 2, "item_seq holds the id 20; this model has the items 1 to 19"),
        ([1, -1, 0], 2, "item_seq holds the id -1"),
        ([1.0, 2.0, 0.0], 2, "expected integers"),
    ],
)
def test_bad_histories(items, length, message):
    """A length of 0 used to answer from the last padded position."""
    model = Mamba4Rec(n_items=20, hidden_size=16, d_state=4)
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([items]), torch.tensor([length]))


def test_times_of_another_shape():
    model = TiM4Rec(n_items=20, hidden_size=16, head_dim=8, max_length=3)
    with pytest.raises(ValueError, match=r"times has shape \(2, 3\), item_seq \(1, 3\)"):
        model(torch.tensor([[1, 2, 0]]), torch.tensor([2]), torch.zeros(2, 3))


@pytest.mark.parametrize("sizes", [{"hidden_size": 0}, {"num_layers": 0}, {"max_length": 0}])
def test_sizes_of_nothing(sizes):
    ((name, value),) = sizes.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; expected at least 1"):
        Mamba4Rec(n_items=20, **sizes)
