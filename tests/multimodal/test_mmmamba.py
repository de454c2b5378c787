"""mmMamba: flags, the original's formats, image places, decoding from a state."""

import json

import pytest
import torch
from safetensors.torch import save_file

import zoo
import zoo.testing
from zoo.testing import Case
from zoo.testing.cases import case
from zoo_multimodal.mmmamba import MmMamba
from zoo_multimodal.mmmamba_formats import arguments_of

IMAGE = 55

STACK = {"layers": 2, "heads": 4, "kv_heads": 2, "hidden": 48}
SMALL = {"vocab_size": 60, "d_model": 32, "image_size": 16, "patch_size": 4, "image_token": IMAGE}
FLAGS = [
    {},
    {"use_D": True, "use_qknorm": True},
    {"use_A": False},
    {"use_gnorm": False},
    {"use_conv": False},
]


def model(*, softmax=((1,), (0,)), flags=None, kv_heads=2, **more):
    torch.manual_seed(0)
    stacks = {
        name: {**STACK, "kv_heads": kv_heads, "softmax": list(kept), "mixer": dict(flags or {})}
        for name, kept in zip(("embedding", "language"), softmax, strict=True)
    }
    found = MmMamba(**{**SMALL, **stacks, **more})
    with torch.no_grad():  # mimic_init makes dt the same for all tokens
        for name, p in found.named_parameters():
            if name.endswith(("dt_proj.weight", "conv1d.weight", "conv1d.bias")):
                p.normal_(std=0.3)
    return found.eval()


def text(batch=2, tiles=1, tokens=4, length=9):
    """Ids with ``tiles`` images of ``tokens`` places behind the second token, and tiles."""
    torch.manual_seed(1)
    ids = torch.randint(0, 50, (batch, length))
    places = torch.full((batch, tiles * tokens), IMAGE)
    return torch.cat([ids[:, :2], places, ids[:, 2:]], 1), torch.randn(batch * tiles, 3, 16, 16)


class WithImage(Case):
    """A card's tiny form reading text with a tile a row."""

    def build(self, *, seed=0, **overrides):
        built = super().build(seed=seed, **overrides)
        built.unused_parameters = ("tok_embeddings", "vision_embeddings.class_embedding")
        return built

    def inputs(self, batch=2, *, seed=0, shapes=None):
        ids, tiles = text(batch)
        return {"input_ids": ids, "pixel_values": tiles.unflatten(0, (batch, 1))}

    def specifications(self):
        return {"input_ids": {"shape": [13]}, "pixel_values": {"shape": [1, 3, 16, 16]}}


@pytest.mark.parametrize(
    "check", ["forward", "backward", "rows", "save_load", "bfloat16", "device", "compile", "export"]
)
def test_the_contract_holds_with_images(check):
    plain = case("mmmamba_hybrid")
    assert getattr(zoo.testing, f"check_{check}")(WithImage(plain.card, plain.config, plain.specification))


def original_config(flags=None, softmax=(1, 8), kv_heads=2, **embedding):
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": kv_heads,
             "intermediate_size": 48, "rms_norm_eps": 1e-5}  # fmt: skip
    first = {**sizes, "num_channels": 3, "patch_size": 4, "image_size": 16, "llm_vocab_size": 60,
             "img_context_token_id": IMAGE, "pixel_shuffle_loc": "pre", "use_pixel_shuffle_proj": True,
             **embedding}  # fmt: skip
    return {"embedding": first, "llm": {**sizes, "vocab_size": 60, "rope_theta": 500.0, "bias": False},
            "softmax_attention": list(softmax), "mamba2": {**(flags or {}), "inherit_qkv": True}}  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "_".join(f) or "published")
def test_the_originals_keys_both_ways(flags):
    adapter = zoo.reference("mmmamba")
    config = original_config(flags, kv_heads=4)
    first = MmMamba(**arguments_of(config)).eval()
    assert first.reference_form == ("released" if flags.get("use_gnorm", True) else "training")
    first.reference_form = "training"
    state = adapter.to_reference(first.state_dict(), model=first)
    mixer = {k.rpartition("layers.1.attention.")[2] for k in state if "layers.1.attention." in k}
    expected = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "in_proj.weight", "dt_bias"}
    expected |= {"A_log_bias"} if flags.get("use_A", True) else set()
    expected |= {"conv1d.weight", "conv1d.bias"} if flags.get("use_conv", True) else set()
    expected |= {"g_proj.weight", "g_norm.weight"} if flags.get("use_gnorm", True) else set()
    if flags.get("use_D"):
        expected |= {"D", "q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"}
    assert mixer == expected
    again = adapter.build(config, state)
    ids, tiles = text()
    with torch.no_grad():
        torch.testing.assert_close(again(ids, tiles), first(ids, tiles), rtol=0, atol=0)
    if flags.get("use_gnorm", True):
        first.reference_form = "released"
        released = adapter.to_reference(first.state_dict(), model=first)
        key = "language_model.model.layers.1.attention.wvkqgdt.weight"
        parts = [state[key.replace("wvkqgdt", n)] for n in ("v_proj", "k_proj", "q_proj", "g_proj", "in_proj")]
        assert torch.equal(released[key], torch.cat(parts))
        third = adapter.build(config, released)
        assert third.reference_form == "released"
        with torch.no_grad():
            assert torch.equal(third(ids, tiles), again(ids, tiles))


def naive(mixer, u):
    """The mixer by the sheet's formulas, a token at a time, in float64."""
    u = u.double()
    weights = {k: v.double() for k, v in mixer.state_dict().items()}
    H, G, P = mixer.heads, mixer.kv_heads, mixer.head_dim
    vkq = u @ weights["vkq_proj.weight"].T
    if mixer.conv1d is not None:
        before = torch.cat([torch.zeros_like(vkq[:, :1]), vkq[:, :-1]], 1)
        kernel = weights["conv1d.weight"][:, 0]
        vkq = before * kernel[:, 0] + vkq * kernel[:, 1] + weights["conv1d.bias"]
    vkq = torch.nn.functional.silu(vkq)
    v, k, q = (t.unflatten(-1, (-1, P)) for t in vkq.split([G * P, G * P, H * P], -1))
    v, k = (t.repeat_interleave(H // G, 2) for t in (v, k))
    if mixer.q_norm is not None:
        q, k = (
            torch.nn.functional.layer_norm(t, (P,), weights[f"{n}_norm.weight"], weights[f"{n}_norm.bias"])
            for t, n in ((q, "q"), (k, "k"))
        )
    dt = torch.nn.functional.softplus(u @ weights["dt_proj.weight"].T + weights["dt_bias"])
    A = -weights["A_log_bias"].exp() if "A_log_bias" in weights else -torch.ones(H, dtype=torch.float64)
    S, rows = torch.zeros(u.shape[0], H, P, P, dtype=torch.float64), []
    for t in range(u.shape[1]):
        S = S * (dt[:, t] * A).exp()[..., None, None] + dt[:, t, :, None, None] * v[:, t, :, :, None] * k[:, t, :, None]
        rows.append((S @ q[:, t, :, :, None])[..., 0])
    y = torch.stack(rows, 1)
    if "D" in weights:
        y = y + weights["D"][:, None] * v
    if mixer.g_proj is not None:
        gate = (u @ weights["g_proj.weight"].T).unflatten(-1, (H, P))
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights["g_norm"]
        y = y * torch.nn.functional.silu(gate)
    return y.flatten(2) @ weights["o_proj.weight"].T


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "_".join(f) or "published")
def test_the_mixer_is_its_formula(flags):
    mixer = model(softmax=((), ()), flags=flags, kv_heads=2 if flags.get("use_conv", True) else 4).language.layers[0]
    u = torch.randn(2, 37, 32)
    with torch.no_grad():
        expected = naive(mixer.attention, u)
        torch.testing.assert_close(mixer.attention(u).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_layer_of_the_published_size():
    """2048 channels, 16 heads, a state of 128 x 128: whole, in pieces and by the formula in float64."""
    from zoo_multimodal.mmmamba_mixers import Mamba2Attention

    torch.manual_seed(0)
    mixer = Mamba2Attention(2048, 16, 8)
    torch.nn.init.normal_(mixer.dt_proj.weight, std=0.02)
    torch.nn.init.normal_(mixer.conv1d.weight)
    u = torch.randn(1, 300, 2048)
    with torch.no_grad():
        whole = mixer(u)
        expected = naive(mixer, u)
        assert (whole - expected).abs().max() < 1e-4 * expected.abs().max()
        state = mixer.init_state(1)
        pieces = torch.cat([mixer(part, state=state) for part in u.split(128, 1)], 1)
        last = mixer.step(u[:, 0], state)
    assert (pieces - whole).abs().max() < 1e-4 * whole.abs().max()
    assert state["ssm"].shape == (1, 16, 128, 128)
    assert last.shape == (1, 2048)


def test_fewer_kv_heads_need_the_convolution():
    m = model(softmax=((), ()), flags={"use_conv": False}, kv_heads=2)
    with pytest.raises(ValueError, match="2 kv heads over 4 heads"):
        m(torch.zeros(1, 3, dtype=torch.long))


# -- decoding


@pytest.mark.parametrize("softmax", [((), ()), ((1,), (0,)), ((0, 1), (0, 1))], ids=["linear", "hybrid", "teacher"])
@pytest.mark.parametrize("chunk", [3, 100])
def test_decoding_equals_the_whole(softmax, chunk):
    m = model(softmax=softmax, flags={"use_D": True, "use_qknorm": True})
    ids, tiles = text(tiles=2, length=12)
    with torch.no_grad():
        whole = m(ids, tiles)
        state = m.prefill(ids[:, :15], tiles, chunk=chunk)
        found = [state.logits]
        for t in range(15, ids.shape[1]):
            found.append(m.step(ids[:, t], state))
    torch.testing.assert_close(torch.stack(found, 1), whole[:, 14:], rtol=1e-4, atol=1e-4)
    assert state.position == state.embedding_position == ids.shape[1]


def test_a_linear_model_remembers_in_constant_memory():
    m = model(softmax=((), ()))
    sizes = {m.prefill(torch.zeros(1, n, dtype=torch.long)).nbytes for n in (1, 50, 500)}
    assert len(sizes) == 1
    hybrid = model()
    assert (
        hybrid.prefill(torch.zeros(1, 500, dtype=torch.long)).nbytes
        > hybrid.prefill(torch.zeros(1, 5, dtype=torch.long)).nbytes
    )


def test_a_forked_state_goes_its_own_way():
    m = model()
    ids, tiles = text(batch=1)
    state = m.prefill(ids, tiles)
    other = state.fork()
    m.step(torch.tensor([3]), other)
    again = m.step(torch.tensor([4]), state)
    with torch.no_grad():
        whole = m(torch.cat([ids, torch.tensor([[4]])], 1), tiles)[:, -1]
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-4)


# -- images


def hd_text(m, ids):
    """The same text with four times the places."""
    rows = []
    for row in ids.tolist():
        wide = []
        for token in row:
            wide += [token] * (m.patches_per_tile // m.tokens_per_tile if token == IMAGE else 1)
        rows.append(wide)
    return torch.tensor(rows)


def test_hd_shuffles_after_the_embedding_stack():
    m = model(shuffle="post")
    ids, tiles = text(batch=1, tiles=2)
    hd = hd_text(m, ids)
    with torch.no_grad():
        found = {}
        logits = m(ids, tiles, hd_input_ids=hd)
        m.hidden(ids, tiles, hd, found=found)
        x = m.embedding(m.place(hd, m.embed_text(hd), m.embed_tiles(tiles)))
        short = found["input_embeds_after_embedding_model"]
        torch.testing.assert_close(short[ids != IMAGE], x[hd != IMAGE])
        torch.testing.assert_close(short[ids == IMAGE], m.projected(x[hd == IMAGE].view(2, 16, 32)).flatten(0, 1))
        for chunk in (4, 100):
            state = m.prefill(ids, tiles, hd_input_ids=hd, chunk=chunk)
            torch.testing.assert_close(state.logits, logits[:, -1], rtol=1e-4, atol=1e-4)
        assert (state.position, state.embedding_position) == (ids.shape[1], hd.shape[1])
    with pytest.raises(ValueError, match="HD form"):
        m(ids, tiles)


def test_places_and_tokens_must_agree():
    m = model()
    ids, tiles = text(batch=1)
    with pytest.raises(ValueError, match=r"4 places for image tokens .* the tiles give 8"):
        m(ids, torch.cat([tiles, tiles]))
    with pytest.raises(ValueError, match="the tiles give 8"):
        m.prefill(ids, torch.cat([tiles, tiles]))
    with pytest.raises(ValueError, match="expected integers"):
        m(ids.float())
    with pytest.raises(ValueError, match="expected \\(tiles, 3, height, width\\)"):
        m(ids, tiles[:, :1])
    with pytest.raises(ValueError, match="do not form a square"):
        m(ids, torch.randn(1, 3, 16, 8))


def test_rows_keep_their_tiles():
    """Rows whose places lie elsewhere, read in pieces, take their own tiles."""
    m = model()
    ids, tiles = text(batch=2, tiles=2)
    ids[1] = ids[1].roll(3)
    with torch.no_grad():
        whole = m(ids, tiles)[:, -1]
        torch.testing.assert_close(m.prefill(ids, tiles, chunk=3).logits, whole, rtol=1e-4, atol=1e-4)


def test_special_tokens_have_a_table_of_their_own():
    m = model(text_vocab_size=58, special_tokens=2)
    with torch.no_grad():
        x = m.embed_text(torch.tensor([3, 58, 59]))
    assert torch.equal(x[0], m.text_embeddings.weight[3])
    assert torch.equal(x[1:], m.special_embeddings.weight)
    with pytest.raises(ValueError, match="holds the token 60; expected 0 to 59"):
        m(torch.tensor([[60]]))


def test_another_tile_size_resizes_the_places():
    m = model()
    ids, _ = text(batch=1, tokens=16)
    with torch.no_grad():
        assert m(ids, torch.randn(1, 3, 32, 32)).shape == (1, ids.shape[1], 60)
        assert m.prefill(ids, torch.randn(1, 3, 32, 32), chunk=5).position == ids.shape[1]


@pytest.mark.parametrize("softmax", [(0, 1, 8, 9), ()])
def test_biases_and_other_activations(softmax):
    """The original's constructors take them: biases stay in softmax layers, and of the others in o_proj alone."""
    adapter = zoo.reference("mmmamba")
    config = original_config(softmax=softmax, attention_bias=True, hidden_act="gelu", mlp_bias=True)
    config["llm"] |= {"hidden_act": "relu"}
    del config["llm"]["bias"]  # its default is True
    first = MmMamba(**arguments_of(config)).eval()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    first.reference_form = "training"
    state = adapter.to_reference(first.state_dict(), model=first)
    name = "wo" if softmax else "o_proj"
    assert f"embedding_model.encoder.1.attention.{name}.bias" in state
    assert f"language_model.model.layers.0.attention.{name}.bias" in state
    ids, tiles = text()
    with torch.no_grad():
        torch.testing.assert_close(adapter.build(config, state)(ids, tiles), first(ids, tiles), rtol=0, atol=0)
        ff, x = first.language.layers[0].feed_forward, torch.randn(3, 32)
        torch.testing.assert_close(ff(x), ff.w2(torch.relu(ff.w1(x)) * ff.w3(x)))
    with pytest.raises(ValueError, match="activation is 'cube'"):
        adapter.build(original_config(hidden_act="cube"), state)


def test_the_convolution_of_a_silent_configuration_follows_the_weights():
    adapter = zoo.reference("mmmamba")
    for use_conv in (False, True):
        config = original_config({"use_conv": use_conv}, kv_heads=4)
        first = MmMamba(**arguments_of(config))
        first.reference_form = "training"
        state = adapter.to_reference(first.state_dict(), model=first)
        del config["mamba2"]["use_conv"]
        mixer = adapter.build(config, state).embedding.layers[0].attention
        assert (mixer.conv1d is not None) == use_conv


def test_padding_is_left_out_by_softmax_layers_of_the_language_stack():
    m = model(softmax=((), (0,)))
    x, padding = torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        whole, left = (m.language(x, padding=p) for p in (None, padding))
        short = m.language(x[1:, :3])
    torch.testing.assert_close(left[0], whole[0])
    torch.testing.assert_close(left[1, :3], short[0])
    assert not torch.allclose(left[1, 4], whole[1, 4])


# -- published files


def published_config():
    config = original_config()
    first = {**config["embedding"], "layers_block_type": ["mamba2", "mha"], "model_type": "mmMamba_embedding",
             "architectures": None, "torch_dtype": "bfloat16"}  # fmt: skip
    second = {**config["llm"], "layers_block_type": ["mha", "mamba2"], "model_type": "mmMamba", "hidden_act": "silu",
              "rope_scaling": {"type": "dynamic", "factor": 2.0}}  # fmt: skip
    return {"embedding_config": first, "llm_config": second, "model_type": "mmMamba_chat", "template": "internlm2-chat"}


def test_a_published_configuration():
    found = arguments_of(published_config())
    assert found["embedding"]["softmax"] == [1]
    assert found["language"]["softmax"] == [0]
    assert found["language"]["rope_theta"] == 500.0
    assert found["language"]["rope_scaling"]["factor"] == 2.0
    assert "rope_theta" not in found["embedding"]  # 10000, the stack's own default
    silent = published_config()
    del silent["embedding_config"]["use_pixel_shuffle_proj"]
    assert arguments_of(silent)["shuffle"] == found["shuffle"] == "pre"
    assert arguments_of(original_config(use_pixel_shuffle_proj=False))["shuffle"] is None
    teacher = published_config()
    for stack in ("embedding_config", "llm_config"):
        del teacher[stack]["layers_block_type"]
    assert arguments_of(teacher)["language"]["softmax"] == [0, 1]
    odd = published_config()
    odd["llm_config"]["layers_block_type"] = ["mamba3", "mha"]
    with pytest.raises(ValueError, match="mamba3"):
        arguments_of(odd)
    with pytest.raises(ValueError, match="no flag 'use_B'"):
        arguments_of(original_config({"use_B": True}))
    with pytest.raises(ValueError, match="use_ls is True"):
        arguments_of(original_config(use_ls=True))


def test_a_released_checkpoint_in_shards(tmp_path):
    arguments = arguments_of(published_config())
    torch.manual_seed(0)
    first = MmMamba(**arguments).eval()
    state = zoo.reference("mmmamba").to_reference(first.state_dict(), model=first)
    names = sorted(state)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for name, keys in halves.items():
        save_file({k: state[k].contiguous() for k in keys}, tmp_path / name, metadata={"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {k: n for n, keys in halves.items() for k in keys}}))
    again = zoo.load("mmmamba_linear", checkpoint=index, **arguments)
    ids, tiles = text()
    with torch.no_grad():
        assert torch.equal(again(ids, tiles), first(ids, tiles))


@pytest.mark.parametrize(("kind", "changes"), [("linear", True), ("dynamic", False)])
def test_scaled_rotary_phases(kind, changes):
    """Linear scaling changes every length; dynamic scaling those beyond max_positions alone."""
    ids = torch.arange(12)[None]
    plain = model(softmax=((0, 1), (0, 1)))
    scaled = model(softmax=((0, 1), (0, 1)))
    for stack in (scaled.embedding, scaled.language):
        stack.rotary.kind, stack.rotary.factor, stack.rotary.max_positions = kind, 2.0, 20
    with torch.no_grad():
        assert torch.allclose(plain(ids), scaled(ids)) != changes
        long = ids.repeat(1, 3)
        assert not torch.allclose(plain(long), scaled(long))


def test_recomputing_activations_changes_no_gradient():
    ids, tiles = text()
    found = []
    for recompute in (False, True):
        m = model().train()
        m.set_grad_checkpointing(recompute)
        m(ids, tiles).square().mean().backward()
        found.append({k: p.grad for k, p in m.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient)


def test_positions_may_be_given():
    """Softmax layers turn by them; Mamba-2 layers know no positions."""
    ids, tiles = text()
    at = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        for softmax, moves in ((((), ()), False), (((1,), (0,)), True)):
            m = model(softmax=softmax)
            plain = m(ids, tiles)
            torch.testing.assert_close(m(ids, tiles, position_ids=at), plain)
            assert torch.allclose(m(ids, tiles, position_ids=3 * at), plain, atol=1e-6) != moves


def test_text_without_a_token():
    m = model()
    with torch.no_grad():
        assert m(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 60)
    with pytest.raises(ValueError, match="holds no token"):
        m.prefill(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="chunk is 0"):
        m.prefill(torch.zeros(1, 3, dtype=torch.long), chunk=0)


def test_wrong_sizes_are_named():
    for wrong, said in (
        ({"shuffle": "later"}, "expected 'pre', 'post'"),
        ({"image_size": 18}, "not a multiple of patch_size 4"),
        ({"embedding": {**STACK, "heads": 3}}, "does not divide into 3 heads"),
        ({"embedding": {**STACK, "kv_heads": 3}}, "not a multiple of 3 kv heads"),
        ({"embedding": {**STACK, "softmax": [2]}}, "layers 0 to 1"),
        ({"embedding": {**STACK, "rope_scaling": {"type": "yarn", "factor": 2}}}, "'linear' or 'dynamic'"),
    ):
        with pytest.raises(ValueError, match=said):
            MmMamba(**{**SMALL, "embedding": STACK, "language": STACK, **wrong})
