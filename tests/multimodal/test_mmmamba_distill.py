"""From softmax to Mamba-2: seeding, what each stage trains, the schedule, the loop, `zoo distill`."""

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import zoo
import zoo.testing
from zoo.building import ZooInfo, describe
from zoo_multimodal import conversations as data
from zoo_multimodal import mmmamba_distill as d
from zoo_multimodal import scenes
from zoo_multimodal.chat_template import TEMPLATES
from zoo_multimodal.commands_mmmamba import distill
from zoo_multimodal.mmmamba import MmMamba
from zoo_multimodal.mmmamba_mixers import Mamba2Attention
from zoo_multimodal.tokenizer import WordTokenizer

STACK = {"layers": 2, "heads": 4, "kv_heads": 2, "hidden": 48}
SMALL = {"vocab_size": 60, "d_model": 32, "image_size": 16, "patch_size": 4, "image_token": 55}


def models(embedding=(1,), language=(0,), **flags):
    torch.manual_seed(0)
    arguments = {**SMALL, **{name: {**STACK, "softmax": [0, 1]} for name in ("embedding", "language")}}
    teacher = MmMamba(**arguments).eval()
    wanted = d.student_arguments(arguments, (embedding, language))
    for stack in ("embedding", "language"):
        wanted[stack]["mixer"] = dict(flags)
    return teacher, MmMamba(**wanted).eval()


def batch(seed=1):
    torch.manual_seed(seed)
    ids = torch.randint(0, 50, (2, 12))
    ids[:, 2:6] = 55
    return d.Batch(ids, torch.randn(2, 3, 16, 16))


def test_a_student_begins_with_its_teachers_weights():
    teacher, student = models()
    own = d.seed(teacher, student)
    assert {name.split("attention.")[1] for name in own} == {
        "dt_proj.weight", "dt_bias", "A_log_bias", "conv1d.weight", "conv1d.bias", "g_proj.weight", "g_norm",
    }  # fmt: skip
    old, new = teacher.language.layers[1].attention, student.language.layers[1].attention
    P = 8
    rows = old.wqkv.weight.view(2, 4, P, 32)  # two groups of two query heads, a key and a value head
    v, k, q = new.vkq_proj.weight.split(new.sizes)
    assert torch.equal(v, rows[:, 3].reshape(-1, 32))
    assert torch.equal(k, rows[:, 2].reshape(-1, 32))
    assert torch.equal(q, rows[:, :2].reshape(-1, 32))
    assert torch.equal(new.o_proj.weight, old.wo.weight)
    # what the mixer learns to give is the teacher's attention
    u = torch.randn(2, 7, 32)
    phases = student.language.phases(None, 0, 7, u.device)
    with torch.no_grad():
        torch.testing.assert_close(new.o_proj(new.teacher(u, phases).flatten(2)), old(u, phases))
        # and a pass that hands on the teacher's outputs ends in the teacher's logits
        ids, tiles = batch().input_ids, batch().pixel_values
        torch.testing.assert_close(d.alignment_pass(student, ids, tiles).logits, teacher(ids, tiles))


def test_how_new_parts_begin():
    torch.manual_seed(0)
    mixer = Mamba2Attention(512, 64, 64)
    dt = torch.nn.functional.softplus(mixer.dt_bias).detach()
    assert 1e-3 <= float(dt.min()) < 2e-3
    assert 0.07 < float(dt.max()) <= 0.1001
    assert bool((mixer.dt_proj.weight == 0).all())
    torch.testing.assert_close(mixer.A, torch.full((64,), -torch.e))
    x = torch.randn(1, 5, 3 * 512)
    same = torch.nn.functional.conv1d(
        torch.nn.functional.pad(x.transpose(1, 2), (1, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=3 * 512
    )
    torch.testing.assert_close(same.transpose(1, 2), x)
    assert float(mixer.g_proj.weight.abs().max()) <= 2**-2.5 * (6 / 1024) ** 0.5
    other = Mamba2Attention(512, 64, 64, mimic_init=False)
    assert bool((other.dt_bias == 0).all())
    assert -16 <= float(other.A.min()) < float(other.A.max()) <= -1
    assert not bool((other.dt_proj.weight == 0).any())


def test_inherit_qkv_may_be_left_out():
    teacher, student = models()
    before = student.language.layers[1].attention.vkq_proj.weight.clone()
    assert any(name.endswith("vkq_proj.weight") for name in d.seed(teacher, student, inherit_qkv=False))
    assert torch.equal(before, student.language.layers[1].attention.vkq_proj.weight)


def test_models_that_do_not_fit_are_refused():
    teacher, student = models()
    with pytest.raises(ValueError, match="a Mamba layer is seeded from softmax"):
        d.seed(student, student)
    other = MmMamba(**{**SMALL, "embedding": STACK, "language": {**STACK, "layers": 3}})
    with pytest.raises(ValueError, match="language stack has 2 layers, the student's 3"):
        d.seed(teacher, other)
    wide = MmMamba(**{**SMALL, "vocab_size": 61, "embedding": STACK, "language": STACK})
    with pytest.raises(ValueError, match=r"do not fit: .*text_embeddings.weight"):
        d.seed(teacher, wide)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_trains_what_it_should(stage):
    teacher, student = models(use_D=True, use_qknorm=True)
    d.seed(teacher, student)
    if stage == 2:
        d.with_shadows(student, teacher)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    settings = d.STAGES[stage].scaled(3)
    losses = d.distil(student, (batch(i) for i in range(100)), stage, teacher=teacher, settings=settings)
    assert len(losses) == 3
    changed = {k.split("attention.")[-1] for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    new = {"dt_proj.weight", "conv1d.weight", "conv1d.bias", "g_proj.weight", "g_norm", "D"}
    new |= {f"{n}_norm.{p}" for n in "qk" for p in ("weight", "bias")}
    scan = {"dt_bias", "A_log_bias"}
    assert changed == {1: new | scan, 2: new | scan | {"vkq_proj.weight"}, 3: new | {"vkq_proj.weight"}}[stage]
    assert all(p.requires_grad for n, p in student.named_parameters() if "shadow" not in n)


def test_every_stage_learns():
    teacher, student = models(embedding=(), language=())
    d.seed(teacher, student)
    few = [batch(i) for i in range(2)]

    def repeated():
        while True:
            yield from few

    for stage, rate, steps in ((1, 1e-2, 40), (2, 1e-2, 40), (3, 3e-3, 40)):
        if stage == 2:
            d.with_shadows(student, teacher)
        if stage == 3:
            d.without_shadows(student)
        settings = d.StageSettings(rate, (4, steps - 8, 4), accumulation=1)
        losses = d.distil(student, repeated(), stage, teacher=teacher, settings=settings)
        assert losses[-1] < 0.8 * losses[0], f"stage {stage}: {losses[0]} to {losses[-1]}"


def test_stage_2_keeps_the_teachers_target():
    teacher, student = models(embedding=(), language=())
    d.seed(teacher, student)
    with pytest.raises(ValueError, match="call with_shadows first"):
        d.distil(student, [], 2)
    d.with_shadows(student, teacher)
    ids, tiles = batch().input_ids, batch().pixel_values
    wanted = [pair[1] for pair in d.alignment_pass(student, ids, tiles).pairs]
    d.distil(student, (batch(i) for i in range(16)), 2, settings=d.STAGES[2].scaled(2))
    for old, (_, new) in zip(wanted, d.alignment_pass(student, ids, tiles).pairs, strict=True):
        assert torch.equal(old, new)
    state = zoo.reference("mmmamba").to_reference(student.state_dict(), model=student)
    assert "language_model.model.layers.0.attention.q_proj_shadow.weight" in state
    d.without_shadows(student)
    assert not any("shadow" in key for key in student.state_dict())


def test_losses():
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    p, q = b.softmax(-1), a.softmax(-1)
    expected = (p * (p / q).log()).sum() / 2  # over tokens, mean over the batch
    torch.testing.assert_close(d.distribution_loss(a, b), expected)
    labels = torch.tensor([[1, 2, -100, 3, 4], [0, -100, -100, 5, 6]])
    kept = labels[:, 1:] != -100
    cross = -a.log_softmax(-1)[:, :-1][kept].gather(1, labels[:, 1:][kept][:, None]).mean()
    torch.testing.assert_close(d.distribution_loss(a, b, labels), expected + cross)
    pair = (torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    assert float(d.alignment_loss([None, pair, (pair[1], pair[1])])) == 500.0
    with pytest.raises(ValueError, match="no Mamba layer"):
        d.alignment_loss([None])


def test_the_schedule_is_transformers_wsd():
    transformers = pytest.importorskip("transformers")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = transformers.get_wsd_schedule(
        optimizer, num_warmup_steps=7, num_decay_steps=9, num_stable_steps=12, num_training_steps=28
    )
    for step in range(32):
        assert theirs.get_last_lr()[0] == pytest.approx(d.wsd(step, 7, 12, 9), abs=1e-12)
        optimizer.step()
        theirs.step()
    assert d.STAGES[2].total == 20000  # stops in its stable phase
    assert d.STAGES[1].scaled(40).steps == (4, 32, 4)


def test_stage_3_needs_the_teacher():
    _, student = models()
    with pytest.raises(ValueError, match="give teacher="):
        d.stage_loss(student, batch(), 3)
    with pytest.raises(ValueError, match="expected 1"):
        d.trained_parameters(student, 4)


# -- data and the command


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_goes_on(tmp_path, stage):
    """What it passes over are the batches that were done, two a step."""

    def trained(run, report):
        teacher, student = models()
        d.seed(teacher, student)
        if stage == 2:
            d.with_shadows(student, teacher)
        settings = d.StageSettings(1e-2, (1, 2, 2), accumulation=2)
        given = (batch(seed) for seed in range(20))
        losses = d.distil(student, given, stage, teacher=teacher, settings=settings, on_step=report, run=run)
        assert len(losses) == 5
        return student

    zoo.testing.check_resume(trained, tmp_path, after=3)


@pytest.fixture
def chats(tmp_path):
    """Four conversations about generated pictures, and one without."""
    lines = []
    for i, s in enumerate(scenes.samples(4, seed=3)):
        s.scene.picture().save(tmp_path / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\n{s.question}"}, {"from": "gpt", "value": s.answer}]
        lines.append({"image": f"{i}.png", "conversations": turns})
    lines.append({"conversations": [{"from": "human", "value": "how many ?"}, {"from": "gpt", "value": "nothing"}]})
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def test_conversations_become_batches(chats):
    model = zoo.create("mmmamba_micro").eval()
    words = WordTokenizer(scenes.WORDS)
    reader = data.Reader(model, words, TEMPLATES["plain"], {"size": 32})
    found = data.read(chats)
    assert len(found) == 5
    made = reader.batch(found[0])
    assert made.pixel_values.shape == (1, 3, 32, 32)
    assert int((made.input_ids == 3).sum()) == 16
    learned = [scenes.WORDS[i] for i in made.labels[0].tolist() if i != data.IGNORED]
    assert learned == [*found[0].turns[0][1].split(), "<|im_end|>"]
    assert reader.batch(found[4]).pixel_values is None
    with torch.no_grad():
        model(made.input_ids, made.pixel_values)
    assert len(list(reader.batches(found, epochs=2))) == 10
    short = data.Reader(model, words, TEMPLATES["plain"], {"size": 32}, max_length=8)
    assert len(list(short.batches(found, epochs=1))) == 1
    assert short.left_out == 4
    with pytest.raises(ValueError, match="every conversation is longer"):
        list(short.batches(found[:2]))


def test_damaged_conversations_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for line, said in (
        ("no json", "line 1"),
        ("3", "line 1: it has no conversations"),
        ('{"conversations": "x"}', "it has no conversations"),
        ('{"conversations": [{"from": "human", "value": 3}]}', "it has no conversations"),
        ('{"image": 5, "conversations": []}', "its turns are from"),
        (
            '{"image": 5, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
            "no file name",
        ),
        ('{"conversations": []}', "its turns are from"),
        ('{"conversations": [{"from": "gpt", "value": ""}]}', "its turns are from"),
        (
            '{"image": "b.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
            "no picture",
        ),
    ):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match=said):
            data.read(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no conversation"):
        data.read(path)
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    turns = [{"from": "human", "value": "<image><image> a"}, {"from": "gpt", "value": "b"}]
    path.write_text(json.dumps({"image": "b.png", "conversations": turns}))
    with pytest.raises(ValueError, match="2 places '<image>' and 1 pictures"):
        data.read(path)


def test_distil_on_the_command_line(chats, tmp_path):
    card = zoo.info("mmmamba_micro.scenes")
    torch.manual_seed(0)
    softmax = {"embedding": [0], "language": [0, 1, 2]}
    teacher = zoo.create(
        "mmmamba_micro", **{name: {**card.card.config[name], "softmax": kept} for name, kept in softmax.items()}
    )
    describe(teacher, ZooInfo("mmmamba_micro", "scenes", teacher.zoo_info.config, card=card.card, weights=card.weights))
    zoo.save(teacher, tmp_path / "teacher")
    where = [str(tmp_path / "teacher"), str(chats)]

    def run(stage, *more):
        out = tmp_path / f"stage{stage}"
        return CliRunner().invoke(
            distill, [*where, "--stage", str(stage), "--out", str(out), "--steps", "2", "--accumulation", "2", *more]
        )

    first = run(1, "--softmax", "0,9")
    assert first.exit_code == 0, first.output
    assert "stage 1: loss" in first.output
    student = zoo.load(tmp_path / "stage1")
    kinds = [type(layer.attention).__name__ for layer in (*student.embedding.layers, *student.language.layers)]
    assert kinds == ["SoftmaxAttention", "Mamba2Attention", "SoftmaxAttention", "Mamba2Attention"]
    second = run(2, "--student", str(tmp_path / "stage1"))
    assert second.exit_code == 0, second.output
    third = run(3, "--student", str(tmp_path / "stage2"), "--labels")
    assert third.exit_code == 0, third.output
    assert not any("shadow" in key for key in zoo.load(tmp_path / "stage3").state_dict())
    asked = zoo.pipeline(tmp_path / "stage3", max_new_tokens=3)((chats.parent / "0.png", "how many shapes are there ?"))
    assert asked.tokens <= 3
    assert "give --student" in run(2).output
    assert "names layer 3 of the language stack" in run(1, "--softmax", "11").output
    assert "expected numbers" in run(1, "--softmax", "a").output
