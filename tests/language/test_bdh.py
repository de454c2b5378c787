"""BDH: sizes of the original that no recorded vector holds, and its format."""

import pytest
import torch

import zoo
from zoo_language.bdh import BDH


def test_neurons_are_rounded_down_as_in_the_original():
    model = BDH(20, levels=2, d_model=16, heads=3, multiplier=8)
    assert model.neurons == 42  # 128 // 3
    assert model(torch.arange(5)[None]).shape == (1, 5, 20)
    with pytest.raises(ValueError, match="21 neurons a head; rotation turns pairs"):
        BDH(20, d_model=8, heads=3, multiplier=8)


def test_the_original_format_has_its_buffer_and_every_level_is_reported():
    adapter, model = zoo.reference("bdh"), BDH(20, levels=2, d_model=16, heads=2, multiplier=2)
    state = adapter.to_reference(model.state_dict(), model=model)
    freqs = state["attn.freqs"].flatten()
    want = [1 / 2 ** (16 * (j // 2 * 2) / 16) / (2 * torch.pi) for j in range(16)]
    assert freqs.tolist() == pytest.approx(want, rel=1e-6)
    config = {"n_layer": 2, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 2, "vocab_size": 20}
    found = adapter.run(adapter.build(config, state), {"input_ids": torch.arange(4)[None]})
    assert found["mid/layer1_x_sparse"].shape == (1, 2, 4, 16)
    assert torch.equal(found["mid/layer1_attn_raw"], found["mid/last_attn_raw"])
