"""The originals' configurations as RecBole hands them over."""

import pytest
import torch

import zoo
from zoo_recommendation.tim4rec import TiM4Rec

SIZES = {"hidden_size": 8, "num_layers": 1, "d_state": 4, "head_dim": 8, "n_items": 12, "MAX_ITEM_LIST_LENGTH": 6}
OURS = {"hidden_size": 8, "num_layers": 1, "d_state": 4, "head_dim": 8, "n_items": 12, "max_length": 6}


def theirs(**model):
    adapter = zoo.reference("tim4rec")
    return adapter, adapter.to_reference(TiM4Rec(**OURS, **model).state_dict())


def test_switches_that_are_not_set_are_off():
    adapter, state = theirs(feed_forward=False, time=False)
    model = adapter.build({**SIZES, "p2p_residual": None}, state)
    assert model.layers[0].ffn is None
    assert model.time_norm is None


def test_keys_of_data_and_training_are_read_past():
    adapter, state = theirs()
    run = {"train_batch_size": 2048, "metrics": ["Hit"], "load_col": {"inter": ["user_id"]}, "norm_eps": "1e-12"}
    assert adapter.build({**SIZES, **run}, state).in_layer_norm.eps == 1e-12
    with pytest.raises(ValueError, match="no configuration key 'heads'"):
        adapter.build({**SIZES, "heads": 2}, state)


@pytest.mark.parametrize("said", ["CE", "BPR"])
def test_the_loss_of_tim4rec_is_cross_entropy(said):
    adapter, state = theirs(time=False)
    model = adapter.build({**SIZES, "loss_type": said}, state)
    items, lengths = torch.tensor([[1, 2, 3, 0, 0, 0]]), torch.tensor([3])
    target, candidate = torch.tensor([5]), torch.tensor([7])
    inputs = {"item_seq": items, "item_seq_len": lengths, "pos_items": target, "cand_items": candidate}
    out = adapter.run(model, inputs)
    expected = torch.nn.functional.cross_entropy(out["full_sort_scores"], target)
    assert torch.allclose(out["loss"], expected.reshape(1))
