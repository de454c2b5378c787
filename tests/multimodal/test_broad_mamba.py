"""Broad Mamba, a reading of its paper: each part against its definition, and what padding must not do."""

import math

import pytest
import torch

import zoo.testing
from zoo_multimodal.broad_learning import BroadLearning, ridge
from zoo_multimodal.broad_mamba import BidirectionalScan, BroadMamba, emotion_loss

DIMS = {"text": 6, "audio": 5, "visual": 4}
CLASSES = ["a", "b", "c"]


def model(seed=0, **more):
    torch.manual_seed(seed)
    arguments = {"dim": 8, "layers": 2, "scan": {"d_state": 4}, "broad": {"feature_width": 3, "enhancement_width": 3}}
    return BroadMamba(CLASSES, DIMS, **{**arguments, **more}).eval()


def features(batch=3, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {m: torch.randn(batch, length, n, generator=generator) for m, n in DIMS.items()}


# -- the scan


def one_direction(part, u, k):
    """Direction k of the part over (length, E) rows in its own order, the recurrence step by step."""
    scan, weight = part.scan, part.conv_weight[k]
    padded = torch.nn.functional.pad(u.t(), (weight.shape[1] - 1, 0))
    u = torch.nn.functional.conv1d(padded[None], weight[:, None], part.conv_bias[k], groups=u.shape[1])[0].t()
    u = torch.nn.functional.silu(u)
    low, B, C = (u @ scan.x_proj[k].t()).split([scan.dt_rank, scan.state, scan.state], -1)
    dt = torch.nn.functional.softplus(low @ scan.dt_proj[k].t() + scan.dt_bias[k])
    A, h, rows = -scan.A_log[k].exp(), u.new_zeros(u.shape[1], scan.state), []
    for t in range(len(u)):
        h = (dt[t, :, None] * A).exp() * h + (dt[t] * u[t])[:, None] * B[t]
        rows.append((h * C[t]).sum(-1) + scan.D[k] * u[t])
    return torch.stack(rows)


def test_bidirectional_scan_is_its_definition():
    torch.manual_seed(0)
    part = BidirectionalScan(8, d_state=4)
    x, lengths = torch.randn(2, 7, 8), torch.tensor([7, 4])
    with torch.no_grad():
        found = part(x, lengths)
        for row, n in enumerate(lengths.tolist()):
            u, gate = part.in_proj(part.norm(x[row, :n])).chunk(2, -1)
            both = one_direction(part, u, 0) + one_direction(part, u.flip(0), 1).flip(0)
            wanted = x[row, :n] + part.out_proj(both * torch.nn.functional.silu(gate))
            zoo.testing.assert_close(found[row, :n], wanted, tolerance=1e-5, what=f"row {row}")


def test_both_directions_are_seen():
    part, x = BidirectionalScan(8, d_state=4), torch.randn(1, 7, 8)
    other = x.clone()
    other[0, 3] += torch.arange(8)
    with torch.no_grad():
        moved = (part(x) - part(other))[0].abs().amax(-1) > 1e-6
    assert moved.all()


# -- broad learning


def test_broad_learning_is_its_definition():
    torch.manual_seed(0)
    part, x = BroadLearning(4, 3, features=2, feature_width=5, enhancements=3, enhancement_width=2), torch.randn(6, 4)
    with torch.no_grad():
        groups = [
            torch.tanh(x @ part.feature.weight[i * 5 : i * 5 + 5].t() + part.feature.bias[i * 5 : i * 5 + 5])
            for i in (0, 1)
        ]
        z = torch.cat(groups, -1)
        h = [
            torch.tanh(z @ part.enhancement.weight[j * 2 : j * 2 + 2].t() + part.enhancement.bias[j * 2 : j * 2 + 2])
            for j in (0, 1, 2)
        ]
        a = torch.cat([z, *h], -1)
        torch.testing.assert_close(part(x), a @ part.out.weight.t() + part.out.bias)
    linear = BroadLearning(4, 3, phi="linear")
    torch.testing.assert_close(linear.nodes(x)[:, :128], linear.feature(x))


@pytest.mark.parametrize("penalty", [0.5, 20.0])
def test_ridge_is_the_closed_form(penalty):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(30, 5, generator=generator, dtype=torch.double)
    y = torch.randn(30, 2, generator=generator, dtype=torch.double) + 3
    weight, bias = ridge(A, y, penalty, intercept=False)
    torch.testing.assert_close(
        weight, torch.linalg.inv(A.t() @ A + penalty * torch.eye(5, dtype=torch.double)) @ A.t() @ y
    )
    assert not bias.any()
    weight, bias = ridge(A, y, penalty)
    weight.requires_grad_()
    bias.requires_grad_()
    ((A @ weight + bias - y).pow(2).sum() + penalty * weight.pow(2).sum()).backward()
    assert weight.grad.abs().max() < 1e-9
    assert bias.grad.abs().max() < 1e-9


def test_ridge_refuses():
    with pytest.raises(ValueError, match="expected 0 or more"):
        ridge(torch.ones(2, 2), torch.ones(2, 1), -1.0)
    with pytest.raises(ValueError, match="2 rows do not determine the weights of 5 nodes"):
        ridge(torch.ones(2, 5), torch.ones(2, 1), 0.0)


def test_a_random_broad_learner_solves_what_no_linear_one_can():
    torch.manual_seed(0)
    x = torch.randn(400, 2)
    y = (x[:, :1] * x[:, 1:] > 0).float()  # exclusive or
    part = BroadLearning(2, 1, features=4, feature_width=16, enhancements=4, enhancement_width=16)
    with torch.no_grad():
        part.feature.weight.mul_(3)
        part.enhancement.weight.mul_(3)
    part.solve(x[:300], y[:300], 1e-2)
    with torch.no_grad():
        right = ((part(x[300:]) > 0.5) == y[300:].bool()).float().mean()
    weight, bias = ridge(x[:300], y[:300], 1e-2)
    linear = ((x[300:].double() @ weight + bias > 0.5) == y[300:].bool()).float().mean()
    assert right > 0.9 > 0.7 > linear


# -- fusion


@pytest.mark.parametrize("confidence", ["predicted", "label", "entropy"])
def test_fusion_weights(confidence):
    m, x = model(confidence=confidence), features()
    with torch.no_grad():
        found = m(**x)
    share = [found[name].softmax(-1) for name in DIMS]
    if confidence == "entropy":
        sure = [1 + (s * s.log()).sum(-1) / math.log(3) for s in share]
    else:
        sure = [s.amax(-1) for s in share]  # labels are used in training alone
    torch.testing.assert_close(found["weights"], torch.stack(sure, -1).softmax(-1))


def test_labels_guide_the_fusion_in_training():
    m, x = model(), features()
    labels = torch.randint(0, 3, (3, 9), generator=torch.Generator().manual_seed(2))
    m.train()
    found = m(**x, labels=labels)
    sure = [found[name].softmax(-1).gather(-1, labels[..., None])[..., 0] for name in DIMS]
    torch.testing.assert_close(found["weights"], torch.stack(sure, -1).softmax(-1))
    with torch.no_grad():
        assert torch.equal(m.eval()(**x, labels=labels)["logits"], m(**x)["logits"])


@pytest.mark.parametrize("fusion", ["sum", "concat"])
def test_fused_is_the_weighted_sum(fusion):
    m, x = model(fusion=fusion), features()
    with torch.no_grad():
        found = m(**x)
        present = torch.ones(3, 9, 1, dtype=torch.bool)
        hidden = [m.context[name](x[name], present, None, None) for name in DIMS]
        each = [h * found["weights"][..., i : i + 1] for i, h in enumerate(hidden)]
        fused = torch.cat(each, -1) if fusion == "concat" else sum(each)
        zoo.testing.assert_close(found["logits"], m.classifier(fused), tolerance=1e-6)


def test_a_missing_modality_takes_no_part():
    m, x = model(), features()
    present = torch.ones(3, 9, 3, dtype=torch.bool)
    present[1, 4, 1] = False
    present[2, 2] = False  # nothing known: finite all the same
    other = {k: v.clone() for k, v in x.items()}
    other["audio"][1, 4] = torch.nan
    other["text"][2, 2] = torch.nan
    with torch.no_grad():
        a, b = m(**x, present=present), m(**other, present=present)
    assert a["weights"][1, 4, 1] == 0
    assert torch.isfinite(a["logits"]).all()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# -- dialogues of different lengths


@pytest.mark.parametrize(
    "form", [{}, {"confidence": "entropy", "fusion": "concat", "head": "broad"}, {"speakers": 2}], ids=str
)
def test_padding_changes_nothing(form):
    m, x = model(**form), features()
    speaker = torch.randint(0, 2, (3, 9), generator=torch.Generator().manual_seed(5))
    who = {"speaker": speaker} if "speakers" in form else {}
    lengths = torch.tensor([9, 5, 2])
    junk = {k: v.clone() for k, v in x.items()}
    for row, n in enumerate(lengths.tolist()):
        for k in junk:
            junk[k][row, n:] = torch.nan
    with torch.no_grad():
        together, again = m(**x, **who, lengths=lengths), m(**junk, **who, lengths=lengths)
        longer = m(**{k: torch.nn.functional.pad(v, (0, 0, 0, 4), value=7.0) for k, v in x.items()}, lengths=lengths,
                   **{k: torch.nn.functional.pad(v, (0, 4)) for k, v in who.items()})  # fmt: skip
        for name, value in together.items():
            assert torch.equal(again[name], value), name
            zoo.testing.assert_close(longer[name][:, :9], value, tolerance=1e-6)
            for row, n in enumerate(lengths.tolist()):
                alone = m(
                    **{k: v[row : row + 1, :n] for k, v in x.items()},
                    **{k: v[row : row + 1, :n] for k, v in who.items()},
                )
                zoo.testing.assert_close(value[row, :n], alone[name][0], tolerance=1e-5, what=name)
                assert not value[row, n:].any()


def test_gradients_stop_at_padding():
    m, x = model(), {k: v.requires_grad_() for k, v in features().items()}
    labels = torch.zeros(3, 9, dtype=torch.long)
    lengths = torch.tensor([9, 5, 2])
    for row, n in enumerate(lengths.tolist()):
        labels[row, n:] = -1
    emotion_loss(m(**x, lengths=lengths), labels).backward()
    for value in x.values():
        assert torch.isfinite(value.grad).all()
        assert value.grad[1, :5].any()
        assert not value.grad[1, 5:].any()


def test_speakers_are_told_apart():
    m, x = model(speakers=2), features()
    speaker = torch.zeros(3, 9, dtype=torch.long)
    with torch.no_grad():
        one, two = m(**x, speaker=speaker), m(**x, speaker=1 - speaker)
    assert not torch.allclose(one["logits"], two["logits"])
    with pytest.raises(ValueError, match="speaker is missing"):
        m(**x)


# -- losses and heads


def test_loss_is_the_sum_of_cross_entropies():
    m, x = model(), features()
    labels = torch.randint(0, 3, (3, 9), generator=torch.Generator().manual_seed(2))
    labels[0, 4:] = -1
    with torch.no_grad():
        found = m(**x)
        known = labels >= 0

        def entropy(logits):
            return -logits.log_softmax(-1)[known].gather(1, labels[known][:, None]).mean()

        parts = sum(entropy(found[name]) for name in DIMS)
        torch.testing.assert_close(emotion_loss(found, labels, 0.5), entropy(found["logits"]) + 0.5 * parts)
        torch.testing.assert_close(emotion_loss(found, labels, 0.0), entropy(found["logits"]))


def test_a_solved_head_is_ridge_regression_of_its_nodes():
    m = model(head="broad")
    fused, labels = torch.randn(200, 8), torch.randint(0, 3, (200,))
    fused[:, :3] += 2 * torch.nn.functional.one_hot(labels, 3)
    m.solve_head(fused, labels, 1.0)
    with torch.no_grad():
        weight, bias = ridge(m.classifier.nodes(fused), torch.nn.functional.one_hot(labels, 3), 1.0)
        wanted = m.classifier.nodes(fused).double() @ weight + bias
        torch.testing.assert_close(m.classifier(fused), wanted.float(), atol=1e-4, rtol=1e-4)
        assert (m.classifier(fused).argmax(-1) == labels).float().mean() > 0.75
    with pytest.raises(ValueError, match="the head is linear"):
        model().solve_head(fused, labels, 1.0)


def test_bad_arguments():
    for arguments, said in (
        ({"confidence": "guess"}, "confidence is 'guess'"),
        ({"fusion": "product"}, "fusion is 'product'"),
        ({"head": "wide"}, "head is 'wide'"),
        ({"layers": 0}, "0 layers"),
        ({"dims": {"smell": 3}}, "dims names 'smell'"),
        ({"broad": {"phi": "relu"}}, "phi is 'relu'"),
    ):
        with pytest.raises(ValueError, match=said):
            BroadMamba(**{"classes": CLASSES, "dims": DIMS, "dim": 8} | arguments)
    m, x = model(), features()
    with pytest.raises(ValueError, match=r"audio is missing; expected \(3, 9, 5\)"):
        m(text=x["text"], visual=x["visual"])
    with pytest.raises(ValueError, match=r"visual is of shape \(3, 8, 4\)"):
        m(**x | {"visual": x["visual"][:, 1:]})
    with pytest.raises(ValueError, match="of text, audio, visual"):
        m(**x, present=torch.ones(3, 9, 2, dtype=torch.bool))
