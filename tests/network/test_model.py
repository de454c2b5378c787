"""NetMamba: order, masking, losses, the start from a pre-trained encoder, and both training loops."""

import numpy as np
import pytest
import torch

import zoo
import zoo.testing
from zoo_network.data import FlowSet
from zoo_network.flows import to_tensor
from zoo_network.netmamba import NetMamba, NetMambaPretrain, TwoWayMamba
from zoo_network.training import FlowLoss, finetune, groups, predict, pretrain, resized_positions, scores, start_from

SMALL = {"byte_length": 80, "embed_dim": 16, "depth": 2, "drop_path_rate": 0.0}


def flows(n=96, classes=3, seed=0):
    r = np.random.default_rng(seed)
    labels = r.integers(0, classes, n)
    bytes_ = r.integers(120, 136, (n, 80)).astype(np.uint8)
    bytes_[:, 8:12] = (labels * 80 + 20)[:, None]
    return FlowSet(bytes_, labels, [f"c{i}" for i in range(classes)])


def test_pictures_and_rows_of_bytes_are_one():
    torch.manual_seed(0)
    model = NetMamba(**SMALL, num_classes=3).eval()
    x = torch.rand(2, 1, 8, 10) * 2 - 1
    torch.testing.assert_close(model(x), model(x.flatten(1)))


def test_the_last_layer_at_one_position():
    """The class token of the classifier is that of the encoder with every position computed."""
    torch.manual_seed(0)
    model = NetMamba(**SMALL, num_classes=3).eval()
    x = torch.rand(2, 80)
    hidden, residual = model.with_class_token(model.embed(x)), None
    for block in model.blocks:
        hidden, residual = block(hidden, residual)
    torch.testing.assert_close(model.forward_features(x), model.norm_f(hidden + residual)[:, -1])


def test_masking_keeps_the_share_and_hides_from_the_encoder():
    torch.manual_seed(0)
    model = NetMambaPretrain(**SMALL, decoder_embed_dim=8, decoder_depth=1).eval()
    x, noise = torch.rand(2, 80), torch.rand(2, 20)
    found = model(x, mask_ratio=0.75, noise=noise)
    assert found["pred"].shape == (2, 20, 4)
    assert found["mask"].sum(1).tolist() == [15, 15]
    hidden = found["mask"].bool().repeat_interleave(4, 1)
    other = torch.where(hidden, torch.rand(2, 80), x)
    torch.testing.assert_close(model(other, mask_ratio=0.75, noise=noise)["pred"], found["pred"])
    assert not torch.equal(model(torch.where(hidden, x, other + 1), 0.75, noise)["pred"], found["pred"])


def test_normalised_targets():
    model = NetMambaPretrain(**SMALL, decoder_embed_dim=8, decoder_depth=1, norm_pix_loss=True)
    x, mask = torch.rand(2, 80), torch.ones(2, 20)
    strides = x.unflatten(1, (20, 4))
    target = (strides - strides.mean(-1, keepdim=True)) / (strides.var(-1, keepdim=True) + 1e-6).sqrt()
    assert float(model.rebuilding_loss(x, target, mask)) < 1e-10


def test_bad_arguments():
    with pytest.raises(ValueError, match="byte_length 80 does not divide into strides of 3"):
        NetMambaPretrain(byte_length=80, stride_size=3)
    with pytest.raises(ValueError, match="stride_size is 81; expected 1 to byte_length 80"):
        NetMamba(byte_length=80, stride_size=81)
    with pytest.raises(ValueError, match="bimamba_type is 'v3'; expected 'none', 'v1' or 'v2'"):
        NetMamba(**SMALL, bimamba_type="v3")
    with pytest.raises(ValueError, match=r"flows have shape \(2, 81\).*80 bytes a flow"):
        NetMamba(**SMALL)(torch.zeros(2, 81))
    model = NetMambaPretrain(**SMALL)
    with pytest.raises(ValueError, match="mask_ratio is 1"):
        model(torch.zeros(2, 80), mask_ratio=1.0)
    with pytest.raises(ValueError, match=r"noise has shape \(2, 3\)"):
        model(torch.zeros(2, 80), noise=torch.zeros(2, 3))


def test_adapter_refuses_what_the_original_has_not():
    adapter = zoo.reference("netmamba")
    for config, message in (
        ({"in_chans": 3}, "in_chans is 3"),
        ({"heads": 4}, "no argument 'heads'"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.arguments(config)
    assert adapter.arguments({"img_size": 40, "if_devide_out": True})["byte_length"] == 1600


def test_the_form_follows_from_the_keys():
    adapter = zoo.reference("netmamba")
    made = NetMambaPretrain(**SMALL, decoder_embed_dim=8, decoder_depth=1)
    config = {**SMALL, "num_classes": 3, "decoder_embed_dim": 8, "decoder_depth": 1}
    assert isinstance(adapter.build(config, made.state_dict()), NetMambaPretrain)
    assert isinstance(adapter.build(config, NetMamba(**SMALL, num_classes=3).state_dict()), NetMamba)


def test_bytes_that_fill_no_stride_are_not_read():
    model = NetMamba(**{**SMALL, "byte_length": 82}, num_classes=3).eval()
    assert model.num_patches == 20
    x = torch.rand(2, 82)
    expected = model.patch_embed.proj(x[:, None]).transpose(1, 2)
    torch.testing.assert_close(model.patch_embed(x), expected)
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_two_way_mixers(kind):
    """Turned round, with the directions' weights exchanged, the output turns round."""
    torch.manual_seed(0)
    mixer = TwoWayMamba(16, kind).double()
    own = {"A_log": "A_b_log"}
    if kind == "v2":
        own |= {n: n.replace(".", "_b.", 1) if "." in n else f"{n}_b" for n, _ in mixer.named_parameters()
                if n.startswith(("conv1d.", "x_proj.", "dt_proj.")) or n == "D"}  # fmt: skip
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        if kind == "v1":  # the convolution is causal in both directions: leave it out
            mixer.conv1d.weight[..., :-1] = 0
    other = TwoWayMamba(16, kind).double()
    state = mixer.state_dict()
    swapped = {**state, **{a: state[b] for a, b in own.items()}, **{b: state[a] for a, b in own.items()}}
    other.load_state_dict(swapped)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(x).flip(1), other(x.flip(1)))
    assert not torch.allclose(mixer(x)[:, :4], mixer(x[:, :4]))
    with pytest.raises(ValueError, match="cannot step"):
        mixer.init_state(1)
    model = NetMambaPretrain(**SMALL, decoder_embed_dim=8, decoder_depth=1, bimamba_type=kind)
    model(torch.rand(2, 80))["loss"].backward()
    assert model.cls_token.grad is not None


def test_pretraining_learns_and_gives_a_start():
    torch.manual_seed(0)
    model = NetMambaPretrain(**SMALL, decoder_embed_dim=16, decoder_depth=1)
    data = np.tile(np.arange(80, dtype=np.uint8) * 3, (32, 1))
    losses = pretrain(model, data, steps=30, batch_size=16, base_rate=0.1, mask_ratio=0.5)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    classifier = NetMamba(**SMALL, num_classes=3)
    taken = start_from(classifier, model)
    assert "blocks.1.mixer.A_log" in taken
    assert "head.weight" not in taken
    for name, value in classifier.state_dict().items():
        if not name.startswith("head"):
            assert torch.equal(value, model.state_dict()[name])
    assert classifier.head.weight.abs().max() < 1e-4
    with pytest.raises(ValueError, match="embed_dim is 8"):
        start_from(NetMamba(80, embed_dim=8, depth=2, num_classes=3), model)


def test_training_goes_on_after_an_interruption(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (20, 80), np.uint8)

    def pretrained(run, report):
        torch.manual_seed(0)
        model = NetMambaPretrain(**{**SMALL, "drop_path_rate": 0.2}, decoder_embed_dim=8, decoder_depth=1)
        pretrain(model, data, steps=5, batch_size=4, run=run, report=report)
        return model

    def tuned(run, report):
        torch.manual_seed(0)
        model = NetMamba(**{**SMALL, "drop_path_rate": 0.2}, num_classes=3)
        settings = {"epochs": 4, "batch_size": 16, "base_rate": 0.1, "warmup_epochs": 1}
        finetune(model, flows(48), flows(12, seed=1), run=run, report=report, **settings)
        return model

    zoo.testing.check_resume(pretrained, tmp_path / "a", after=3)
    zoo.testing.check_resume(tuned, tmp_path / "b")


def test_positions_of_another_length():
    positions = torch.arange(9.0).reshape(1, 9, 1)
    found = resized_positions(positions, 4)
    assert found.flatten().tolist() == [0.5, 2.5, 4.5, 6.5, 8.0]  # pairs meet in the middle, the token's stays
    assert resized_positions(positions, 8) is positions


def test_finetuning_learns():
    torch.manual_seed(0)
    train, valid = flows(192), flows(48, seed=1)
    model = NetMamba(**SMALL, num_classes=3)
    history = finetune(model, train, valid, epochs=16, batch_size=16, base_rate=0.1, warmup_epochs=2, layer_decay=1.0)
    best = max(e.accuracy for e in history)
    assert best > 0.9
    assert float((predict(model, valid.flows) == valid.labels).mean()) == pytest.approx(best)
    with pytest.raises(ValueError, match="3 classes, the model 4"):
        finetune(NetMamba(**SMALL, num_classes=4), train, valid, epochs=1)
    with pytest.raises(ValueError, match=r"expected uint8 \(n, 80\)"):
        finetune(model, FlowSet(train.flows[:, :40], train.labels, train.classes), valid, epochs=1)


def test_groups_cover_every_parameter_once():
    model = NetMamba(**SMALL, num_classes=3)
    found = groups(model, 0.05, 0.5)
    assert sum(len(g["params"]) for g in found) == len(list(model.parameters()))
    rate = {id(p): g["scale"] for g in found for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in found for p in g["params"]}
    assert rate[id(model.head.weight)] == 1
    assert rate[id(model.blocks[1].mixer.A_log)] == 0.5
    assert rate[id(model.blocks[0].mixer.A_log)] == 0.25
    assert rate[id(model.pos_embed)] == 0.125
    assert decay[id(model.pos_embed)] == decay[id(model.cls_token)] == decay[id(model.head.bias)] == 0
    assert decay[id(model.head.weight)] == 0.05


def test_losses():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    plain = FlowLoss("cross-entropy", np.array([9, 1]), smoothing=0.0)(logits, labels)
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(logits, labels))
    balanced = FlowLoss("class-balanced", np.array([9, 1]))
    n = torch.tensor([9.0, 1.0])
    expected = 1e-4 / (1 - 0.9999**n)
    torch.testing.assert_close(balanced.weight, expected / expected.sum() * 2, rtol=1e-3, atol=1e-6)
    margins = FlowLoss("ldam", np.array([16, 1])).margins
    assert margins.tolist() == pytest.approx([0.25, 0.5])
    ldam = FlowLoss("ldam", np.array([16, 1]))(logits, labels)
    shifted = torch.tensor([[1.75, 0.0], [0.0, 0.5]]) * 30
    torch.testing.assert_close(ldam, torch.nn.functional.cross_entropy(shifted, labels))
    with pytest.raises(ValueError, match="loss is 'focal'"):
        FlowLoss("focal", np.array([1, 1]))


def test_scores_against_counting():
    found, per_class = scores(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), ["a", "b"])
    assert found["accuracy"] == 0.75
    assert per_class["a"] == {"flows": 1, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)}
    assert found["f1"] == pytest.approx((2 / 3 + 3 * 0.8) / 4)


def test_scaling():
    assert to_tensor(np.array([0, 51, 255], np.uint8)).tolist() == pytest.approx([-1, -0.6, 1])
