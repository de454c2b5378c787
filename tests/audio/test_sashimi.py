"""SaShiMi: steps against whole sequences in every form, the originals' key layouts, tokens, generation."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
import zoo.testing
from zoo_audio.generation import bits_per_sample, generate, stream
from zoo_audio.mulaw import linear_encode, mu_law_decode, mu_law_encode
from zoo_audio.sashimi import Sashimi, SashimiLM, UpPool
from zoo_audio.sashimi_reference import SashimiAdapter, steps
from zoo_audio.sashimi_step import Stepper

GOLDEN = Path(__file__).parents[1] / "golden"
RECIPES = Path(__file__).parents[2] / "plugins/audio/recipes"
S4 = {"d_state": 8, "n_ssm": 1, "dt_transform": "softplus"}
FORMS = {
    "plain": {},
    "u-net": {"unet": True, "weight_norm": False},
    "no feed-forward": {"ff": 0, "n_layers": 2},
    "u-net of two layers": {"unet": True, "n_layers": 2},
    "center without feed-forward": {"unet": True, "center_ff": 0},
    "batch norm after the sum": {"norm": "batch", "prenorm": False},
    "activated pooling": {"act_pool": "gelu", "scalar_norm": False},
    "one pool": {"pool": [4]},
    "no pool": {"pool": []},
    "means and repetition": {"unet": True, "pool_mode": "avg", "weight_norm": False},
    "gated pooling": {"act_pool": "glu"},
    "another layer in the middle": {"center_layer": {"mode": "diag", "init": "diag-inv", "d_state": 4}},
    "learned residual": {"residual": "A", "prenorm": False},
    "diagonal": {"layer": {"mode": "diag", "init": "diag-lin", "d_state": 8}},
}


def backbone(seed=0, **config):
    torch.manual_seed(seed)
    given = {"d_model": 4, "n_layers": 1, "pool": [2, 3], "layer": S4, **config}
    return Sashimi(**given).double().eval()


@pytest.mark.parametrize("form", FORMS)
def test_steps_are_the_whole(form):
    model = backbone(**FORMS[form])
    x = torch.randn(2, 25, 4, dtype=torch.float64)  # no multiple of the rates
    with torch.no_grad():
        whole = model(x)
        for mode in ("linear", "dense", "diagonal"):
            assert torch.allclose(steps(model, x, mode), whole, rtol=1e-9, atol=1e-9), mode


@pytest.mark.parametrize("form", FORMS)
def test_the_unrolled_stepper_is_the_model(form):
    torch.manual_seed(2)
    model = SashimiLM(16, 4, **{"n_layers": 1, "pool": [2, 3], "layer": S4, **FORMS[form]}).double().eval()
    tokens = torch.randint(0, 16, (2, 25))
    with torch.inference_mode():
        whole, stepper = model(tokens), Stepper(model, 2)
        made = torch.stack([stepper.step(tokens[:, t]) for t in range(25)], 1)
    assert torch.allclose(made, whole, rtol=1e-8, atol=1e-8)
    usual = form not in ("batch norm after the sum",)
    parts = [part for part in stepper.center if "block.<locals>" in part.__qualname__]
    assert len(parts) == len(stepper.center) or not usual


def test_real_eigenvalues_are_kept():
    """A matrix with real eigenvalues among its conjugate pairs: strongly damped real modes."""
    torch.manual_seed(0)
    model = SashimiLM(16, 4, n_layers=1, pool=[2], layer={"mode": "dplr", "init": "dplr-real", "d_state": 8}).double()
    tokens = torch.randint(0, 16, (1, 12))
    with torch.inference_mode():
        stepper = Stepper(model.eval(), 1)
        made = torch.stack([stepper.step(tokens[:, t]) for t in range(12)], 1)
        assert torch.allclose(made, model(tokens), rtol=1e-7, atol=1e-7)


def test_no_output_sees_its_future():
    model = backbone(unet=True)
    x = torch.randn(1, 24, 4, dtype=torch.float64)
    other = x.clone()
    other[:, 13:] = torch.randn(1, 11, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(model(x)[:, :13], model(other)[:, :13], atol=1e-12)


def test_up_pooling_is_a_pooled_step_late():
    pool = UpPool(8, 2, 4)
    y = pool(torch.randn(1, 3, 8))
    assert y.shape == (1, 12, 4)
    assert not y[:, :4].any()
    assert y[:, 4:].all()


def test_the_state_has_one_size():
    model = SashimiLM(16, 4, n_layers=1, pool=[2, 2], layer=S4).eval()

    def numbers(state):
        if isinstance(state, torch.Tensor):
            return state.numel()
        values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
        return sum(map(numbers, values))

    state = model.init_state(1)
    before = numbers(state)
    with torch.inference_mode():
        for _ in range(50):
            model.step(torch.zeros(1, dtype=torch.long), state)
    assert numbers(state) == before > 0


def test_bidirectional_models_neither_step_nor_guess_lengths():
    model = backbone(layer={**S4, "bidirectional": True})
    with pytest.raises(ValueError, match="cannot step"):
        model.init_state(1)
    with pytest.raises(ValueError, match="multiple of 6"):
        model(torch.randn(1, 7, 4, dtype=torch.float64))
    assert model(torch.randn(1, 12, 4, dtype=torch.float64)).shape == (1, 12, 4)


# -- the originals' arguments and keys ---------------------------------------------------------------------------------

UNET = {
    "d_model": 4, "n_layers": 1, "pool": [2, 2], "expand": 2, "prenorm": True, "norm": "layer", "residual": "R",
    "cff": 2, "layer": dict(S4),
}  # fmt: skip


def test_sequence_unets_list_their_way_up_flat():
    adapter = SashimiAdapter()
    source = "state-spaces/s4 src/models/sequence/backbones/unet.py:SequenceUNet"
    torch.manual_seed(0)
    ours = Sashimi(4, 1, [2, 2], unet=True, weight_norm=False, layer=S4).eval()
    flat = {}
    for key, value in ours.state_dict().items():
        if key.startswith("u_layers."):
            _, tier, i, rest = key.split(".", 3)
            key = f"u_layers.{3 * int(tier) + int(i)}.{rest}"
        flat[key] = value
    model = adapter.build(UNET, flat, source=source)
    x = torch.randn(2, 8, 4)
    with torch.no_grad():
        assert torch.equal(model(x), ours(x))
        assert torch.allclose(adapter.run(model, {"x": x}, wanted=["step"])["step"], ours(x), atol=1e-5)
    assert adapter.to_reference(model.state_dict(), model=model).keys() == flat.keys()
    assert adapter.build(UNET, flat).unet  # known by its keys alone
    assert adapter.rules(flat).to_zoo(flat).keys() == ours.state_dict().keys()
    parallel = {f"module.{key}": value for key, value in flat.items()}
    assert adapter.build(UNET, parallel, source=source).unet


@pytest.mark.parametrize("file", ["standalone", "lm_modular"])
def test_state_dicts_return_to_the_original(file):
    golden = zoo.reference.read_golden(GOLDEN / f"sashimi__{file}.safetensors")
    adapter = SashimiAdapter()
    model = adapter.build(golden.config, golden.state, source=golden.source)
    back = adapter.to_reference(model.state_dict(), model=model)
    assert back.keys() == golden.state.keys()
    for key, value in back.items():
        assert torch.equal(value, golden.state[key]), key
    assert adapter.build(golden.config, golden.state)  # without being told the class


def test_version_3_checkpoints():
    golden = zoo.reference.read_golden(GOLDEN / "sashimi__lm_modular.safetensors")
    names = {"inv_dt": "log_dt", "A_real": "log_w_real", "A_imag": "w_imag", "l_kernel": "L"}
    old = {}
    for key, value in golden.state.items():
        head, found, name = key.partition(".layer.layer.kernel.")
        if found:
            value = value[:, 0] if name == "inv_dt" else -value if name == "A_imag" else value
            key = f"{head}.layer.kernel.kernel.{names.get(name, name)}"
        old[key.replace(".layer.layer.D", ".layer.D")] = value
    assert old.keys() != golden.state.keys()
    model = SashimiAdapter().build(golden.config, old, source=golden.source)
    with torch.no_grad():
        assert torch.allclose(model(golden.inputs["tokens"]), golden.outputs["logits"], atol=1e-5)


@pytest.mark.parametrize("file", ["standalone", "lm_modular"])
def test_gradients_are_the_originals(file):
    zoo.testing.check_golden(GOLDEN / f"sashimi__{file}.safetensors", grad=True)


def test_a_shorter_input_keeps_the_kernel():
    """A checkpoint knows how long its kernels are; a part of the recording gives a part of the output."""
    golden = zoo.reference.read_golden(GOLDEN / "sashimi__lm_modular.safetensors")
    model = SashimiAdapter().build(golden.config, golden.state, source=golden.source)
    with torch.no_grad():
        short = model(golden.inputs["tokens"][:, :8])
    assert torch.allclose(short, golden.outputs["logits"][:, :8], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"interp": 6}, "interp is 6"),
        ({"residual": "Q"}, "residual is 'Q'"),
        ({"pool_mode": "sample"}, "pool_mode='sample'"),
        ({"depth": 3}, "no argument 'depth'"),
        ({"layer": {"_name_": "lstm"}}, "lstm"),
    ],
)
def test_arguments_that_are_refused(config, message):
    source = "state-spaces/s4 src/models/sequence/backbones/sashimi.py:Sashimi"
    with pytest.raises(ValueError, match=message):
        SashimiAdapter().build({**UNET, **config}, {}, source=source)


MODULAR = {"d_model": 4, "n_layers": 1, "pool": [2], "expand": 2, "layer": {"_name_": "s4", "mode": "diag",
           "init": "diag-lin", "d_state": 4}}  # fmt: skip


def theirs(model, **config):
    """The adapter's model from the modular original's arguments, holding ``model``'s weights under its keys."""
    model.standalone = False
    state = SashimiAdapter().to_reference(model.state_dict(), model=model)
    source = f"state-spaces/s4 src/models/sequence/backbones/{'unet' if model.unet else 'sashimi'}.py:"
    return SashimiAdapter().build({**MODULAR, **config}, state, source=source), state


def test_defaults_of_the_modular_classes():
    """Norms come after the sum and are left out, and no residual means the plain one."""
    layer = {"mode": "diag", "init": "diag-lin", "d_state": 4, "act": "gelu"}
    given = {"d_model": 4, "n_layers": 1, "pool": [2], "layer": layer, "norm": None, "prenorm": False}
    model, _ = theirs(Sashimi(**given))
    block = model.c_layers[0]
    assert not block.prenorm
    x = torch.randn(1, 6, 8)
    with torch.no_grad():
        assert torch.allclose(block(x), x + block.layer(x))
    # a feed-forward in the middle of the U-Net is as wide as all others, whatever ``cff`` is
    unet = Sashimi(**given, unet=True, weight_norm=False, ff=3)
    unet.flat_up = True
    model, _ = theirs(unet, cff=1, ff=3)
    assert model.c_layers[1].layer.ff[0][0].out_features == 24


def test_pooling_activations_have_the_originals_keys():
    made = Sashimi(4, 1, [2], layer={"mode": "diag", "init": "diag-lin", "d_state": 4}, norm=None, act_pool="glu")
    model, state = theirs(made, act_pool="glu", prenorm=True)
    assert state["d_layers.0.linear.0.weight_v"].shape == (16, 8)
    x = torch.randn(1, 6, 4)
    with torch.no_grad():
        assert torch.equal(model(x), made.eval()(x))


def test_interpolation_fills_the_steps_between():
    model = backbone(pool=[2], interp=4)
    x = torch.randn(1, 16, 4, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(y[:, 3::4], model._pyramid(x[:, ::4], None))
        z = x[:, ::2]
        for layer in model.interp_layers[1]:
            z = layer(z)
        assert torch.allclose(y[:, 0::2], torch.cat([z[:, 1:], z[:, -1:]], 1))
    with pytest.raises(ValueError, match="multiple of 4"):
        model(x[:, :6])
    with pytest.raises(ValueError, match="cannot step"):
        model.init_state(1)


# -- tokens and sound --------------------------------------------------------------------------------------------------


def test_mu_law_there_and_back():
    audio = torch.linspace(-1, 1, 2001)[None, :, None]
    again = mu_law_decode(mu_law_encode(audio, scale=False))
    assert (again - audio).abs().max() < 0.045  # half a step at full scale is the coarsest
    assert (again - audio)[0, 980:1020].abs().max() < 1e-3
    assert torch.equal(mu_law_encode(mu_law_decode(torch.arange(256))[None, :, None], scale=False)[0, :, 0].diff() >= 0,
                       torch.ones(255, dtype=torch.bool))  # fmt: skip
    silence = torch.zeros(1, 5, 1)
    assert set(mu_law_encode(silence, scale=False).flatten().tolist()) == {128}
    assert linear_encode(audio).min() == 0
    assert linear_encode(audio).max() == 255


def lm():
    torch.manual_seed(1)
    return SashimiLM(16, 4, n_layers=1, pool=[2, 2], layer=S4, sample_rate=8000).eval()


def test_likelihoods_of_generated_sound_are_the_models():
    model = lm()
    sound = generate(model, 21, batch=3, seed=5)
    assert sound.tokens.shape == (3, 21)
    assert (sound.log_likelihood.diff() <= 0).all()
    for tokens, value in zip(sound.tokens, sound.log_likelihood, strict=True):
        assert math.isclose(bits_per_sample(model, tokens[None]), -float(value) / 21 / math.log(2), rel_tol=1e-4)
    again = generate(model, 21, batch=3, seed=np.int64(5))
    assert torch.equal(again.tokens, sound.tokens)
    assert not torch.equal(generate(model, 21, batch=3, seed=6).tokens, sound.tokens)


def test_the_likeliest_sample_and_a_prompt():
    model = lm()
    greedy = generate(model, 9, temperature=0).tokens
    with torch.inference_mode():
        token, state, expected = torch.tensor([8]), model.init_state(1), []
        for _ in range(9):
            token = model.step(token, state).argmax(-1)
            expected.append(int(token))
        rest = [int(t) for (t, _), _ in zip(stream(model, temperature=0, prompt=greedy[:, :4]), range(5), strict=False)]
    assert greedy[0].tolist() == expected
    assert rest == expected[4:]
    assert generate(model, 9, top_p=1e-6, seed=3).tokens[0].tolist() == expected
    for wrong in ({"temperature": -1}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="temperature"):
            generate(model, 2, **wrong)


def test_a_recording_is_continued():
    with pytest.raises(ValueError, match="has 16 tokens"):
        zoo.pipeline(lm(), "audio-generation")
    torch.manual_seed(0)
    model = SashimiLM(256, 4, n_layers=1, pool=[2, 2], layer=S4, sample_rate=8000).eval()
    answer = zoo.pipeline(model, "audio-generation", seconds=0.01)((np.zeros(160, np.float32), 16000))
    assert len(answer.samples) == 160
    assert not answer.samples[:80].any()
    assert answer.seconds == 0.01
    assert "bits a sample" in answer.summary()
    assert answer.picture().size == (1000, 240)


def test_a_batch_answers_as_its_recordings_alone():
    """Every recording goes on from its own beginning, in the order given, by draws of its own."""
    torch.manual_seed(0)
    model = SashimiLM(256, 4, n_layers=1, pool=[2, 2], layer=S4, sample_rate=8000).eval()
    pipe = zoo.pipeline(model, "audio-generation", seconds=0.01)
    draw = np.random.default_rng(0)
    given = [(draw.uniform(-1, 1, 160).astype(np.float32), 8000) for _ in range(4)]
    alone = [pipe(one) for one in given]
    for one, other in zip(alone, pipe(given, batch_size=4), strict=True):
        np.testing.assert_array_equal(one.samples, other.samples)
        assert math.isclose(one.bits, other.bits, rel_tol=1e-5)
    assert len({one.samples[160:].tobytes() for one in alone}) == 4
    again = generate(model, 9, 2, ranked=False, seed=[3, 3])
    assert torch.equal(again.tokens[0], again.tokens[1])


def test_a_long_recording_is_read_from_its_end():
    model = SashimiLM(256, 4, n_layers=1, pool=[2, 2], layer=S4, sample_rate=8000).eval()
    pipe = zoo.pipeline(model, "audio-generation", longest_prompt=0.01)
    audio = pipe.read((np.linspace(-1, 1, 8000 * 25, dtype=np.float32), 8000))
    prompt = pipe.prepare(audio)["prompt"]
    assert prompt.shape == (80,)
    assert prompt.min() > 250


def test_what_cannot_be_generated():
    model = lm()
    for wrong, message in (
        ({"temperature": math.nan}, "temperature is nan"),
        ({"seed": [1, 2, 3]}, "3 seeds for 2"),
        ({"prompt": torch.zeros(1, 4, dtype=torch.long)}, r"expected token ids \(2, samples\)"),
        ({"prompt": torch.full((2, 4), 16)}, "tokens 16 to 16; expected 0 to 15"),
    ):
        with pytest.raises(zoo.errors.BadArgument, match=message):
            generate(model, 2, 2, **wrong)
    model = SashimiLM(256, 4, n_layers=1, pool=[2, 2], layer=S4, sample_rate=8000)
    for option in ("seconds", "longest_prompt"):
        with pytest.raises(zoo.errors.BadArgument, match=f"{option} is -1"):
            zoo.pipeline(model, "audio-generation", **{option: -1.0})


def test_half_precision_steps():
    model = zoo.load("sashimi_micro", dtype=torch.bfloat16)
    tokens = torch.tensor([[1, 200, 30, 130, 128, 90, 3, 77]])
    stepper, state = Stepper(model), model.init_state(1)
    for token in tokens[0]:
        with torch.inference_mode():
            expected = model.step(token[None], state).float()
        found = stepper.step(token[None])
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, atol=0.15 * float(expected.abs().max()), rtol=0)


def test_the_demo_knows_plucked_strings():
    """The recipe's notes from another seed cost about what the card says, well below a table of pairs (5.34 bits)."""
    spec = importlib.util.spec_from_file_location("train_plucks", RECIPES / "train_plucks.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    model = zoo.load("sashimi_micro")
    assert bits_per_sample(model, recipe.notes(8, seed=5)) < 4.3
