"""Networks of touch: streams, the original's configurations, losses, views, training."""

import json

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import rotate

import zoo
import zoo.testing
from zoo_neuro.tactile.augmentation import TouchAugmentation, reversed_time, turned
from zoo_neuro.tactile.encoders import StridedConv
from zoo_neuro.tactile.losses import AutoEncoderLoss, SimCLRLoss, SimSiamLoss
from zoo_neuro.tactile.model import TactileNetwork
from zoo_neuro.tactile.recordings import Recordings, to_frames
from zoo_neuro.tactile.streaming import TouchStream
from zoo_neuro.tactile.training import OBJECTIVES, Settings, accuracy, pretrain, start_from, train

SIZES = {"input_shape": (6, 5, 7), "n_times": 6, "repr_dim": 12, "hidden_dim": 8, "num_classes": 4}
ENCODERS = {
    "graph": {"name": "graph", "cell": "intersection", "layernorm": True, "widths": [4, 6, 6], "hidden": 8},
    "in order": {"name": "graph", "cell": "lstm", "widths": [4, 6, 6], "hidden": 8, "full_unroll": True},
    "resnet18": {"name": "resnet18", "width": 4},
    "s4": {"name": "s4", "model_dim": 8, "nlayers": 2},
    "s4 prenorm": {"name": "s4", "model_dim": 8, "nlayers": 1, "prenorm": True},
    "mamba": {"name": "mamba", "model_dim": 8, "nlayers": 2, "ssm": {"d_state": 4}},
    "linear": {"name": "linear"},
    "whole": {"name": "linear", "whole": True},
}
ATTENDERS = {
    "none": "none",
    "gpt": {"name": "gpt", "block_size": 13, "n_layer": 2, "n_head": 2},
    "mamba": {"name": "mamba", "nlayers": 2, "rms_norm": True},
    "s4": {"name": "s4", "nlayers": 2},
}


def network(encoder="graph", attender="none", decoder=None, **sizes):
    torch.manual_seed(0)
    return TactileNetwork(ENCODERS[encoder], ATTENDERS[attender], decoder, **{**SIZES, **sizes}).eval()


@pytest.mark.parametrize("steps", [[-1], [2, -1], "all"])
@pytest.mark.parametrize("attender", ATTENDERS)
@pytest.mark.parametrize("encoder", [e for e in ENCODERS if e != "whole"])
def test_frame_by_frame_and_step_by_step(encoder, attender, steps):
    """Streams give the whole's logits, and what the decoder does not read may be left out."""
    model = network(encoder, attender, {"widths": [5], "steps": steps})
    x = torch.randn(2, 6, 6, 5, 7)
    with torch.no_grad():
        whole = model(x)
        torch.testing.assert_close(model(x, {}), whole, rtol=1e-4, atol=1e-5)  # with intermediates: all steps
        stream = TouchStream(model, 2)
        answers = [stream.step(x[:, t]) for t in range(6)]
    torch.testing.assert_close(answers[-1], whole, rtol=1e-4, atol=1e-5)
    assert [a is not None for a in answers[:-1]] == [steps == [-1]] * 5
    if steps == [-1]:
        with torch.no_grad():
            torch.testing.assert_close(answers[3], model(x[:, :4]), rtol=1e-4, atol=1e-5)


def test_gpt_groups_features():
    """An action token after every two features."""
    sizes = {"attender": {"name": "gpt", "block_size": 9, "n_layer": 2, "n_head": 2, "num_feat_per_step": 2}}
    model = TactileNetwork(ENCODERS["linear"], decoder={"steps": "all"}, **SIZES, **sizes).eval()
    assert model.num_features == 3 * 8
    x = torch.randn(2, 6, 6, 5, 7)
    stream = TouchStream(model, 2)
    answers = [stream.step(x[:, t]) for t in range(6)]
    with torch.no_grad():
        torch.testing.assert_close(answers[-1], model(x), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="5 features do not divide into groups of 2"):
            model(x[:, :5])
        with pytest.raises(ValueError, match=r"12 tokens .* positions for 9"):
            model(torch.cat([x, x[:, :2]], 1))


def test_samples_as_they_come():
    model = network("graph", "mamba", input_shape=(30, 5, 7))
    samples = torch.randn(30, 35, 6)
    stream = TouchStream(model)
    found = [logits for part in samples.split([3, 9, 1, 17]) for logits in stream.push(part)]
    assert len(found) == 6
    with torch.no_grad():
        whole = model(to_frames(samples)[None])
    torch.testing.assert_close(found[-1], whole, rtol=1e-4, atol=1e-5)
    stream.reset()
    torch.testing.assert_close(stream.push(samples[None])[-1], whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"samples have shape \(1, 4, 34, 6\)"):
        stream.push(samples[:4, :34])


def test_frames_hold_samples_and_values():
    """(ntime step) (H W) f -> ntime (step f) H W."""
    x = torch.arange(10 * 35 * 6.0).reshape(10, 35, 6)
    frames = to_frames(x)
    assert frames.shape == (2, 30, 5, 7)
    assert frames[1, 3 * 6 + 2, 4, 1] == x[5 + 3, 4 * 7 + 1, 2]


def test_scaling_of_what_is_read():
    plain = network()
    scaled = network(scale=[1, 2, 3, 4, 5, 6], compress=True)
    x = torch.randn(2, 6, 6, 5, 7)
    factors = torch.arange(1, 7.0)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(scaled(x), plain(torch.asinh(x * factors)))
    with pytest.raises(ValueError, match="expected 6 factors"):
        network(scale=[1.0, 2.0])


def test_a_still_picture_a_movie_and_a_last_step():
    """Frames without time, as the original's ImageNet runs take them."""
    model = network("resnet18")
    x = torch.randn(2, 6, 5, 7)
    assert model(x).shape == (2, 4)
    encoder = {**ENCODERS["graph"], "image_off": 2, "return_all": False}
    movie = TactileNetwork(encoder, decoder={"steps": "all"}, **SIZES).eval()
    still = torch.full((2, 6, 6, 5, 7), 0.5)
    still[:, :2] = x[:, None]
    with torch.no_grad():
        torch.testing.assert_close(movie(x), movie(still))
        assert not torch.allclose(movie(x), movie(x[:, None].expand(-1, 6, -1, -1, -1) * 0))
    with pytest.raises(ValueError, match="last step alone"):
        TactileNetwork(encoder, ATTENDERS["gpt"], **SIZES)


LAST = {"name": "MLP", "n_layer": 1, "out_channels": [1000], "init_dict": None, "dropout": 0.0, "use_bias": True,
        "bias": None, "batchnorm": None, "activation": None, "temporal_decoder": True,
        "temporal_steps": [-1]}  # fmt: skip


def configuration(encoder, attender=None, decoder=None, **model):
    sizes = {"repr_dim": 12, "hidden_dim": 8, "out_dim": 4}
    return {
        "data": {"num_classes": 4, "input_shape": [6, 5, 7], "n_times": 6},
        "model": {"encoder": encoder, "attender": attender, "decoder": decoder or LAST, **sizes, **model},
    }


TNN = {"name": "TNNEncoder", "n_times": 6, "full_unroll": False, "dropout": 0.0, "return_all": True,
       "model_config_file": "model_configs/rnn_fdb_converted_modern_gru_ln.json"}  # fmt: skip
MAMBA = {"nlayers": 2, "d_intermediate": 0, "ssm_cfg": None, "norm_epsilon": 1e-5, "rms_norm": False,
         "fused_add_norm": False, "residual_in_fp32": False}  # fmt: skip
S4 = {"nlayers": 2, "dropout": 0.2, "prenorm": False}
GPT = {"name": "GPT", "block_size": 13, "n_layer": 2, "n_head": 2, "dropout": 0.1, "num_feat_per_step": 1}
ORIGINALS = {
    "gru and s4": configuration(TNN, {"name": "S4Att", **S4}),
    "resnet and gpt": configuration({"name": "PTResNet18"}, GPT),
    "mamba and mamba": configuration({"name": "MambaEnc", "model_dim": 8, **MAMBA}, {"name": "MambaAtt", **MAMBA}),
    "s4 and nothing": configuration({"name": "S4Enc", "model_dim": 8, **S4}),
    "flatten": configuration({"name": "FlattenEncoder"}, None, {**LAST, "temporal_decoder": False}),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_originals_format_there_and_back(name):
    """Our weights written in the original's format and read again, also as Lightning stores them."""
    adapter = zoo.reference("tactile_ead")
    config = ORIGINALS[name]
    torch.manual_seed(0)
    model = TactileNetwork(**adapter.arguments(config)).eval()
    theirs = adapter.to_reference(model.state_dict(), model=model)
    assert adapter.to_reference(model.state_dict()).keys() == theirs.keys()
    x = torch.randn(2, 6, 6, 5, 7)
    with torch.no_grad():
        expected = model(x)
        for state in (theirs, {f"model.{k}": v for k, v in theirs.items()} | {"loss.x": torch.zeros(1)}):
            torch.testing.assert_close(adapter.build(config, state)(x), expected)
    starts = {
        "gru and s4": "encoder.TG.conv3._recurrent_cell.ln_c_pre.weight",
        "resnet and gpt": "encoder.encoder.layer2.0.downsample.1.running_var",
        "mamba and mamba": "encoder.mamba.layers.1.mixer.x_proj.weight",
        "s4 and nothing": "encoder.s4_layers.1.output_linear.0.weight",
        "flatten": "encoder.lin.lin.weight",
    }
    assert starts[name] in theirs
    assert "decoder.mlp.0.lin.weight" in theirs
    if "gpt" in name:
        mask = theirs["attender._policy.transformer.h.1.attn.bias"]
        assert torch.equal(mask, torch.ones(13, 13).tril()[None, None])
    if "s4" in name:
        assert theirs[next(k for k in theirs if "output_linear.0.weight" in k)].dim() == 3


def test_configurations_that_the_original_has_not(tmp_path):
    read = zoo.reference("tactile_ead").arguments
    for config, message in (
        (configuration({"name": "Perceiver"}), "encoder is 'Perceiver'"),
        (configuration(TNN, {"name": "LSTM"}), "attender is 'LSTM'"),
        (configuration({**TNN, "model_config_file": "alexnet.json"}), "rnn_fdb_converted_modern"),
        (configuration({**TNN, "n_times": 5}), "unrolls 5 steps, the data have 6"),
        (configuration({"name": "MambaEnc", "model_dim": 8, **MAMBA, "d_intermediate": 16}), "d_intermediate is 16"),
        (configuration({"name": "S4Enc", **S4, "bidirectional": True}), "no argument 'bidirectional'"),
    ):
        with pytest.raises(ValueError, match=message):
            read(config)
    file = tmp_path / "rnn_fdb_converted_modern.json"  # a file that is there is read, whatever its name
    file.write_text(json.dumps({"nodes": []}))
    assert read(configuration({**TNN, "model_config_file": str(file)}))["encoder"]["graph"] == {"nodes": []}
    with pytest.raises(ValueError, match="has no 'edges'"):
        TactileNetwork(**read(configuration({**TNN, "model_config_file": str(file)})))
    trained = read(configuration({**TNN, "model_config_file": "rnn_fdb_converted.json"}))
    assert trained["encoder"]["trainable"] is False
    movie = {**TNN, "input_transform": {"name": "MakeMovie", "kwargs": {"times": 6, "image_off": 2}}}
    assert read(configuration(movie))["encoder"]["image_off"] == 2
    everything = configuration(TNN)
    everything["model"]["decoder"] |= {"n_layer": 0, "out_channels": [], "temporal_steps": "all"}
    assert read(everything)["num_classes"] == 0
    flat = network(decoder={"steps": "all"}, encoder="whole")
    with pytest.raises(ValueError, match=r"x has 1050 numbers; expected 1260"):
        flat(torch.zeros(2, 5, 6, 5, 7))
    with pytest.raises(ValueError, match="has no steps"):
        TouchStream(flat)


# -- losses and views


def test_simclr_against_its_definition():
    torch.manual_seed(0)
    loss = SimCLRLoss(6, 8, 5).eval()
    x = torch.randn(8, 6)
    z = F.normalize(loss.embed(x), dim=1)
    s = z @ z.T / 0.1
    terms = [-s[i, i ^ 1] + torch.logsumexp(torch.cat([s[i, :i], s[i, i + 1 :]]), 0) for i in range(8)]
    torch.testing.assert_close(loss(x), torch.stack(terms).mean())
    with pytest.raises(ValueError, match=r"x has shape \(7, 6\)"):
        loss(x[:7])


def test_simsiam_stops_gradients_and_autoencoder_counts():
    torch.manual_seed(0)
    loss = SimSiamLoss(6, 8, 8, 4, 8)
    x1, x2 = torch.randn(2, 9, 6, requires_grad=True)
    value = loss(x1, x2)
    z1, z2 = loss.projection_mlp(x1), loss.projection_mlp(x2)
    p1, p2 = loss.prediction_mlp(z1), loss.prediction_mlp(z2)
    pairs = F.cosine_similarity(p1, z2, dim=1).mean() + F.cosine_similarity(p2, z1, dim=1).mean()
    torch.testing.assert_close(value, -0.5 * pairs)
    (grad,) = torch.autograd.grad(value, loss.projection_mlp.layer3[0].weight)
    whole = -0.5 * (F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean())
    torch.testing.assert_close(grad, torch.autograd.grad(whole, loss.projection_mlp.layer3[0].weight)[0])
    rebuild = AutoEncoderLoss(40, 6, 5, 7)
    assert rebuild.decoder["fc"].out_features == 2 * 35
    features, frames = torch.randn(2, 3, 40), torch.randn(2, 3, 6, 5, 7)
    error = (rebuild.rebuild(features) - frames).square().mean() / 2 + 1e-4 * features.abs().mean()
    torch.testing.assert_close(rebuild(features, frames), error)


@pytest.mark.parametrize("size", [(5, 7), (7, 5), (4, 6), (5, 5)])
@pytest.mark.parametrize("quarters", [1, 2, 3, 4])
def test_turns_are_torchvisions(quarters, size):
    x = torch.randn(2, 3, *size)
    assert torch.equal(turned(x, quarters), rotate(x, 90.0 * quarters))


def test_views():
    x = torch.arange(2 * 3 * 12 * 5 * 7.0).reshape(2, 3, 12, 5, 7)
    back = reversed_time(x)
    assert torch.equal(back[:, 0, :6], -x[:, 2, 6:])  # the first sample is the last, with its six values in their order
    assert torch.equal(reversed_time(back), x)
    view = TouchAugmentation(generator=torch.Generator().manual_seed(0))
    seen = [view(x) for _ in range(40)]
    assert all(v.shape == x.shape for v in seen)
    assert 0.2 < sum(bool((v <= 0).all()) for v in seen) / 40 < 0.8
    assert len({float(v[0, 0, 0, 2, 0]) for v in seen}) > 4
    with pytest.raises(ValueError, match="4 x 7 has no quarter turn"):
        turned(torch.zeros(1, 4, 7), 1)


# -- training


def data(count=48):
    torch.manual_seed(0)
    labels = torch.arange(count) % 4
    x = torch.randn(count, 6, 6, 5, 7) * 0.2
    for i, label in enumerate(labels):
        x[i, :, label] += 1.0
    return Recordings(x, labels, list("abcd"))


def test_training_learns():
    known = data()
    model = network("graph", "mamba")
    settings = Settings(epochs=25, batch_size=16, rate=1e-2, optimiser="adamw", schedule="cosine")
    history = train(model, known, known, settings)
    assert history[-1].loss < history[0].loss
    best = max(e.accuracy for e in history)
    assert best > 0.8
    assert accuracy(model, known) == pytest.approx(best)
    assert accuracy(model, known, top=4) == 1
    seen = train(model, known, None, Settings(epochs=1, batch_size=16), view=TouchAugmentation(temporal=False))
    assert seen[0].accuracy is None
    with pytest.raises(ValueError, match="4 categories, the model 3"):
        train(network(num_classes=3), known)
    with pytest.raises(ValueError, match="optimiser is 'lars'"):
        Settings(optimiser="lars")


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_training_goes_on_after_an_interruption(optimiser, tmp_path):
    known = data(16)
    settings = Settings(epochs=4, batch_size=8, optimiser=optimiser)

    def trained(run, report):
        torch.manual_seed(0)
        model = network("linear", "mamba")
        view = TouchAugmentation(False, torch.Generator().manual_seed(3))
        train(model, known, known, settings, view=view, run=run, report=report)
        return model

    def pretrained(run, report):
        torch.manual_seed(0)
        model = network("linear", "none", num_classes=0)
        pretrain(model, known.frames, "autoencoder", settings, run=run, report=report)
        return model

    zoo.testing.check_resume(trained, tmp_path / "a")
    zoo.testing.check_resume(pretrained, tmp_path / "b")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_without_labels(objective):
    model = network("graph", "none", num_classes=0)
    options = {"simclr": {"hidden_dim": 16, "embedding_dim": 8}, "autoencoder": {}}.get(
        objective, {f"pr{k}_mlp_{s}_dim": 8 for k in ("ojection", "ediction") for s in ("hidden", "output")}
    )
    settings = Settings(epochs=12, batch_size=16, rate=1e-2, optimiser="adamw")
    history = pretrain(model, data().frames, objective, settings, **options)
    assert history[-1].loss < history[0].loss
    other = network("graph", "none")
    assert "encoder.graph.nodes.conv2.cell.conv.weight" in start_from(other, model)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    with pytest.raises(ValueError, match="another form"):
        start_from(network("linear"), model)
    with pytest.raises(ValueError, match="expected num_classes=0"):
        pretrain(other, data().frames, objective)
    with pytest.raises(ValueError, match="objective is 'byol'"):
        pretrain(model, data().frames, "byol")


def test_mistakes_are_named():
    for arguments, message in (
        ({"encoder": "perceiver"}, "encoder is 'perceiver'"),
        ({"encoder": {"name": "s4", "heads": 2}}, "encoder s4 takes no 'heads'"),
        ({"attender": {"name": "lstm"}}, "attender is 'lstm'"),
        ({"decoder": {"depth": 2}}, "decoder takes no 'depth'"),
        ({"decoder": {"steps": "last"}}, "steps is 'last'"),
        ({"attender": {"name": "gpt", "n_head": 3}}, "hidden_dim 8 does not divide into n_head 3"),
    ):
        with pytest.raises(ValueError, match=message):
            TactileNetwork(**{"encoder": "linear", **arguments}, **SIZES)
    with pytest.raises(ValueError, match=r"x has shape \(2, 6, 6, 5, 6\)"):
        network()(torch.zeros(2, 6, 6, 5, 6))
    with pytest.raises(ValueError, match=r"reads the time steps \[7\], but there are 6"):
        network("linear", decoder={"steps": [7]})(torch.zeros(2, 6, 6, 5, 7))
    with pytest.raises(ValueError, match="reads 72 features, and there are 60"):
        network("linear", decoder={"steps": "all"})(torch.zeros(2, 5, 6, 5, 7))


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (2, 2)])
def test_a_strided_convolution_has_gradients_in_bfloat16(size):
    torch.manual_seed(0)
    x, (rough, exact) = torch.randn(14, 16, *size), [StridedConv(16, 32, 3, 2, 1, bias=False) for _ in range(2)]
    rough.load_state_dict(exact.state_dict())
    for layer, kind in ((rough.bfloat16(), torch.bfloat16), (exact, torch.float32)):
        memory = [torch.full((200_000,), torch.nan) for _ in range(4)]
        del memory  # a gradient that is not written holds this
        layer(x.to(kind)).square().sum().backward()
    torch.testing.assert_close(rough.weight.grad.float(), exact.weight.grad, rtol=0.05, atol=0.5)
