"""The three MOHAWK stages with a transformers teacher: each lowers its own loss, and together they add up."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import zoo.testing  # noqa: E402
from zoo_language.mohawk import TransformersTeacher, ZooTeacher, distil, distillation_loss, transfer  # noqa: E402
from zoo_language.phi_mamba import PhiMambaLM  # noqa: E402

VOCABULARY, WIDTH, HEADS, LAYERS = 50, 32, 4, 2


@pytest.fixture(scope="module")
def phi():
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, attn_implementation="eager", initializer_range=0.2, resid_pdrop=0.0,
        hidden_act="gelu_new", partial_rotary_factor=0.5, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.PhiForCausalLM(config).eval()


def student():
    torch.manual_seed(1)
    mixer = {"d_state": 16, "v_heads": HEADS, "qk_heads": HEADS}
    return PhiMambaLM(VOCABULARY, WIDTH, ["mamba"] * LAYERS, mixer, heads=HEADS)


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (4, 12), generator=generator) for _ in range(count)]


def mean(rows):
    return sum(map(sum, rows)) / sum(map(len, rows))


def test_teacher_shows_what_the_stages_need(phi):
    ids = batches(1)[0]
    shown = TransformersTeacher(phi)(ids, matrices=True)
    assert [tuple(h.shape) for h in shown.hidden] == [(4, 12, WIDTH)] * (LAYERS + 1)
    assert [tuple(a.shape) for a in shown.attention] == [(4, HEADS, 12, 12)] * LAYERS
    torch.testing.assert_close(shown.attention[0].sum(-1), torch.ones(4, HEADS, 12))
    # the last hidden state stands before the final norm
    torch.testing.assert_close(phi.lm_head(phi.model.final_layernorm(shown.hidden[-1])), shown.logits)


@pytest.mark.parametrize("stage", [1, 2])
def test_layer_stages_lower_their_loss(phi, stage):
    model, teacher = student(), TransformersTeacher(phi)
    transfer(phi, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    report = distil(stage, teacher, model, batches(40), optimizer)
    assert len(report.losses) == 40
    assert all(len(row) == LAYERS for row in report.losses)
    assert mean(report.losses[-5:]) < 0.8 * mean(report.losses[:5])


def test_stages_in_turn_bring_the_student_to_the_teacher(phi):
    teacher, model = TransformersTeacher(phi), student()
    ids = batches(1, seed=9)[0]
    with torch.no_grad():
        floor = float(distillation_loss(phi(ids).logits, phi(ids).logits))  # the teacher's own entropy
        before = float(distillation_loss(model(ids), phi(ids).logits)) - floor
        copied = transfer(phi, model)
    assert "embedding.weight" in copied
    assert any("fc1" in name for name in copied)
    gaps = []
    for stage, rate, count in ((1, 1e-2, 20), (2, 1e-2, 40), (3, 3e-3, 40)):
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        distil(stage, teacher, model, batches(count, seed=stage), optimizer)
        with torch.no_grad():
            gaps.append(float(distillation_loss(model(ids), phi(ids).logits)) - floor)
    assert gaps[1] < gaps[0]  # aligned mixers beat oriented ones
    assert gaps[2] < gaps[1] < before
    assert gaps[2] < 0.5 * before


@pytest.mark.parametrize("stage", [1, 3])
def test_a_stage_goes_on(phi, stage, tmp_path):
    """With a schedule of the caller's: of the batches, those that were done are passed over."""

    def trained(run, report):
        model = student()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

        def on_step(step, values):
            schedule.step()
            report(step, values)

        found = distil(
            stage, TransformersTeacher(phi), model, iter(batches(5)), optimizer, on_step=on_step, run=run,
            schedule=schedule,
        )  # fmt: skip
        assert len(found.losses) == 5
        return model

    zoo.testing.check_resume(trained, tmp_path, after=3)


def test_teacher_weights_do_not_move(phi):
    before = {k: v.clone() for k, v in phi.state_dict().items()}
    model = student()
    distil(3, TransformersTeacher(phi), model, batches(2), torch.optim.SGD(model.parameters(), lr=0.1))
    for key, value in phi.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_model_of_ours_can_teach():
    ours = PhiMambaLM(VOCABULARY, WIDTH, ["attention"] * LAYERS, {}, heads=HEADS)
    shown = ZooTeacher(ours)(batches(1)[0], matrices=True)
    assert len(shown.attention) == LAYERS
    torch.testing.assert_close(shown.attention[0].sum(-1), torch.ones(4, HEADS, 12))


def test_errors(phi):
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="stage is 4; expected 1"):
        distil(4, TransformersTeacher(phi), model, batches(1), optimizer)
    with pytest.raises(ValueError, match="no modules named self_attn or attn"):
        TransformersTeacher(torch.nn.Linear(2, 2))
    config = transformers.PhiConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=HEADS,
        attn_implementation="sdpa",
    )  # fmt: skip
    teacher = TransformersTeacher(transformers.PhiForCausalLM(config))
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        teacher(batches(1)[0], matrices=True)
