"""TOKI against its definition gap by gap, masks, batches, and what pre-training hands on."""

import itertools

import pytest
import torch

from zoo_medical.mambamim import Hybird
from zoo_medical.mambamim_pretrain import MambaMIM, _cells, _volume, encoder_state, toki

SMALL = {"img_size": 32, "channels": (4, 6, 8, 8, 12), "depths": (1, 1, 1, 1, 1), "depth": 1}


def one_by_one(x: torch.Tensor, active: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """x (n, C), active (n,): the sums written out for every gap."""
    n = x.shape[0]
    keys = sorted({0, n - 1, *active.nonzero().flatten().tolist()})
    out = torch.zeros_like(x)
    for p, q in itertools.pairwise(keys):
        total, g = torch.zeros(x.shape[1], dtype=x.dtype), q - p
        for j, a in enumerate(torch.linspace(0, 1, g, dtype=x.dtype) if g > 1 else [0.0]):
            total = total + torch.linalg.matrix_power(A, g - 1 - j) @ ((1 - a) * x[p] + a * x[q])
            out[p + j] = total
    out[n - 1] = A @ x[n - 1]
    return out


@pytest.mark.parametrize("ratio", [0.1, 0.6, 0.95])
def test_interpolation_is_the_sum_in_each_gap(ratio):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 3, 3, dtype=torch.float64)
    active = torch.rand(2, 1, 3, 3, 3) > ratio
    A = torch.randn(1, 5, 5, dtype=torch.float64) * 0.4
    found = toki(x, active, A)
    for b in range(2):
        expected = one_by_one(x[b].flatten(1).t(), active[b].flatten(), A[0])
        torch.testing.assert_close(found[b].reshape(27, 5), expected)


def test_masks_show_the_same_number_of_cells():
    active = MambaMIM(**SMALL, decoder_width=16, mask_ratio=0.6).draw_mask(3)
    assert active.shape == (3, 1, 2, 2, 2)
    assert active.flatten(1).sum(1).tolist() == [3, 3, 3]


def test_cells_and_back():
    x = torch.randn(2, 1, 32, 48, 32)
    assert torch.equal(_volume(_cells(x), x.shape), x)
    assert torch.equal(_cells(x)[1, 1].view(16, 16, 16), x[1, 0, :16, :16, 16:32])


def test_hidden_voxels_do_not_change_what_is_seen():
    torch.manual_seed(1)
    model = MambaMIM(**SMALL, decoder_width=64, mask_ratio=0.6).eval()  # wide enough not to be all ReLU zeros
    active = model.draw_mask(1)
    hidden = ~active.repeat_interleave(16, 2).repeat_interleave(16, 3).repeat_interleave(16, 4)
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        first = model.reconstruct(image, active)
        assert torch.equal(first, model.reconstruct(image + 5.0 * hidden, active))
        assert not torch.equal(first, model.reconstruct(image + 5.0 * ~hidden, active))


def test_the_encoder_goes_into_the_segmentation_network():
    torch.manual_seed(2)
    trained = MambaMIM(**SMALL, decoder_width=16)
    network = Hybird(**SMALL, num_classes=2)
    answer = network.load_state_dict(encoder_state(trained), strict=False)
    assert answer.unexpected_keys == []
    assert all(k.startswith("decoder.") for k in answer.missing_keys)
    assert torch.equal(network.embeddings.stem.weight, trained.sparse_encoder.embeddings.stem.weight)


def test_pretraining_learns():
    torch.manual_seed(3)
    model = MambaMIM(**SMALL, decoder_width=16, mask_ratio=0.5)
    image, active = torch.rand(1, 1, 32, 32, 32), model.draw_mask(1)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(image, active)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
