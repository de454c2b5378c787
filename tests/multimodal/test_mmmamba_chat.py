"""From a picture and a question to an answer: tiles, templates, tokenizers, sampling, the pipeline, `zoo ask`."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import zoo
from zoo_multimodal import scenes, tiles
from zoo_multimodal.chat_template import TEMPLATES, ask, template_of, with_pictures
from zoo_multimodal.commands_mmmamba import ask as ask_command
from zoo_multimodal.generation import Sampling, choose, stream
from zoo_multimodal.image_text import ImageTextToText
from zoo_multimodal.mmmamba import MmMamba
from zoo_multimodal.tokenizer import SentencePieceTokenizer, WordTokenizer, tokenizer_of
from zoo_registry import errors

MARKS = ["<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>"]
WORDS = [
    *MARKS,
    "?",
    "what",
    "is",
    "this",
    "a",
    "cat",
    "dog",
    "red",
    "two",
    "system",
    "user",
    "assistant",
    "be",
    "brief",
]


def model(**more):
    torch.manual_seed(0)
    stack = {"layers": 1, "heads": 4, "kv_heads": 2, "hidden": 32}
    config = {"vocab_size": len(WORDS), "d_model": 32, "image_size": 16, "patch_size": 4, "image_token": 3}
    return MmMamba(**{**config, "embedding": {**stack, "softmax": [0]}, "language": stack, **more}).eval()


def pipe(m=None, **more):
    options = {"tokenizer": WordTokenizer(WORDS), "system": "be brief", "max_new_tokens": 5, **more}
    return ImageTextToText(model() if m is None else m, **options)


def picture(width=40, height=20):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


# -- tiles


@pytest.mark.parametrize(
    ("size", "grid"),
    [((448, 448), (1, 1)), ((896, 448), (2, 1)), ((448, 1344), (1, 3)), ((1000, 750), (4, 3)), ((5000, 100), (12, 1))],
)
def test_the_grid_follows_the_pictures_sides(size, grid):
    assert tiles.grid_for(*size) == grid


def test_larger_pictures_take_more_tiles_of_the_same_ratio():
    assert tiles.grid_for(400, 400) == (1, 1)
    assert tiles.grid_for(800, 800) == (2, 2)
    assert tiles.grid_for(2000, 2000) == (3, 3)
    assert tiles.grid_for(2000, 2000, max_tiles=4) == (2, 2)
    assert tiles.grid_for(400, 400, min_tiles=2) != (1, 1)
    with pytest.raises(ValueError, match="min_tiles is 3 and max_tiles 2"):
        tiles.grid_for(10, 10, min_tiles=3, max_tiles=2)


def test_tiles_lie_row_by_row_with_the_thumbnail_behind():
    whole = Image.new("RGB", (32, 48))
    for i in range(6):
        whole.paste((10 * i, 0, 0), (16 * (i % 2), 16 * (i // 2), 16 * (i % 2) + 16, 16 * (i // 2) + 16))
    cut = tiles.cut(whole, size=16)
    assert [t.getpixel((8, 8))[0] for t in cut[:6]] == [0, 10, 20, 30, 40, 50]
    assert len(cut) == 7
    assert cut[6].size == (16, 16)
    assert len(tiles.cut(whole, size=16, thumbnail=False)) == 6
    assert len(tiles.cut(Image.new("RGB", (9, 9)), size=16)) == 1  # one tile is its own thumbnail


def test_pixels_are_normalised_as_imagenets():
    white = tiles.pixels_of(Image.new("L", (448, 448), 255))
    assert white.shape == (1, 3, 448, 448)
    torch.testing.assert_close(white[0, :, 0, 0], (1 - torch.tensor(tiles.MEAN)) / torch.tensor(tiles.STD))


def test_what_is_no_picture_is_said(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match="is no picture that can be read"):
        tiles.open_picture(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        tiles.open_picture(tmp_path / "b.png")
    with pytest.raises(ValueError, match="given as float"):
        tiles.open_picture(1.0)
    assert tiles.open_picture(np.zeros((4, 6, 3), np.uint8)).size == (6, 4)


# -- the text


def test_internlm2s_template():
    text = TEMPLATES["internlm2-chat"].text("B?", [("A?", "a")], "S")
    assert text == (
        "<|im_start|>system\nS<|im_end|><|im_start|>user\nA?<|im_end|><|im_start|>assistant\na<|im_end|>"
        "<|im_start|>user\nB?<|im_end|><|im_start|>assistant\n"
    )
    assert TEMPLATES["internlm2-chat"].text("A?").startswith("<|im_start|>system\n你是由")
    assert TEMPLATES["plain"].text("A ?", [("B ?", "b")]) == "B ?<|im_end|>b<|im_end|>A ?<|im_end|>"
    with pytest.raises(ValueError, match="expected one of internlm2-chat, plain"):
        template_of("vicuna")


def test_places_of_pictures():
    assert ask("what ?", 2) == "<image>\n<image>\nwhat ?"
    assert ask("in <image> what ?", 1) == "in <image> what ?"
    assert with_pictures("<image> a <image>", [1, 2], 2) == (
        "<img><IMG_CONTEXT><IMG_CONTEXT></img> a <img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    )
    with pytest.raises(ValueError, match="1 places '<image>', but 2 pictures"):
        with_pictures("<image>", [1, 1], 2)


def test_words_as_tokens():
    words = WordTokenizer(WORDS)
    ids = words.encode("<img><IMG_CONTEXT></img> What is this?<|im_end|>")
    assert [WORDS[i] for i in ids] == ["<img>", "<IMG_CONTEXT>", "</img>", "what", "is", "this", "?", "<|im_end|>"]
    assert words.decode(ids[3:6]) == "what is this"
    with pytest.raises(ValueError, match="'cats' is no word of this small model; it knows cat"):
        words.encode("cats")
    with pytest.raises(ValueError, match="name no tokenizer"):
        tokenizer_of({})


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A sentencepiece model with InternVL's marks behind it, as their repositories hold them."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text").write_text("what is this a cat a dog two red cats be brief\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=60, model_type="bpe",
        byte_fallback=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    added = {mark: size + i for i, mark in enumerate(MARKS)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder, added


def test_sentencepiece_with_marks(spm):
    folder, added = spm
    tokenizer = SentencePieceTokenizer(folder)
    ids = tokenizer.encode("<|im_start|>a cat<|im_end|>")
    assert ids[0] == 1  # begin of text
    assert ids[1] == added["<|im_start|>"]
    assert ids[-1] == added["<|im_end|>"]
    assert tokenizer.decode(ids[2:-1]) == tokenizer.decode([*ids[2:-1], 10_000]) == "a cat"
    assert tokenizer.decode(ids[1:]) == "<|im_start|>a cat<|im_end|>"
    assert tokenizer.encode("a cat", begin=False) == ids[2:-1]
    assert tokenizer.id_of("<img>") == added["<img>"]
    assert tokenizer_of({}, folder).id_of("</s>") == 2
    with pytest.raises(ValueError, match="has no token '<box>'"):
        tokenizer.id_of("<box>")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"99": {"content": "<box>"}, "2": {"content": "</s>"}}})
    )
    assert SentencePieceTokenizer(folder).id_of("<box>") == 99
    (folder / "tokenizer_config.json").unlink()


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(errors.MissingExtra, match=r"pip install 'ssm-zoo-multimodal\[tokenizer\]'"):
        SentencePieceTokenizer(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path):
    pytest.importorskip("sentencepiece")
    with pytest.raises(FileNotFoundError, match="expected the tokenizer's folder"):
        SentencePieceTokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no sentencepiece model"):
        SentencePieceTokenizer(tmp_path)


# -- tokens


def test_sampling():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)

    def drawn(how, seen=()):
        return {choose(logits, seen, how, generator) for _ in range(200)}

    assert drawn(Sampling()) == {1}
    assert drawn(Sampling(repetition_penalty=4.0), [1]) == {2}
    assert drawn(Sampling(temperature=3.0)) == {0, 1, 2, 3}
    assert drawn(Sampling(temperature=3.0, top_k=2)) == {1, 2}
    assert drawn(Sampling(temperature=1.0, top_p=0.8)) == {1, 2}
    assert drawn(Sampling(temperature=1.0, top_p=0.1)) == {1}
    for wrong in ({"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"repetition_penalty": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            Sampling(**wrong)


def test_greedy_decoding_is_the_argmax_of_the_whole():
    m = model()
    ids = torch.tensor([[5, 6, 7, 8]])
    tokens = list(stream(m, m.prefill(ids), max_new_tokens=6))
    with torch.no_grad():
        for token in tokens:
            assert int(m(ids)[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    again = list(stream(m, m.prefill(ids[:, :4]), max_new_tokens=6, stop_tokens=(tokens[2],)))
    assert again == tokens[: tokens.index(tokens[2])]
    how = Sampling(temperature=2.0, seed=3)
    assert list(stream(m, m.prefill(ids), sampling=how)) == list(stream(m, m.prefill(ids), sampling=how))
    with pytest.raises(ValueError, match="prefill it first"):
        next(stream(m, m.init_state(1)))
    with pytest.raises(ValueError, match="2 texts; expected 1"):
        next(stream(m, m.prefill(ids.repeat(2, 1))))


# -- the pipeline


def test_an_answer_to_a_picture(tmp_path):
    p = pipe(max_tiles=2)
    picture().save(tmp_path / "a.png")
    found = p((tmp_path / "a.png", "what is this ?"))
    assert found.tiles == 3  # two, and the thumbnail
    assert found.question == "what is this ?"
    assert found.tokens <= 5
    assert found.reason == ("length" if found.tokens == 5 else "stop")
    assert found.to_dict()["answer"] == found.text
    assert "state" not in found.to_dict()
    same = pipe(max_tiles=2, question="what is this ?")(tmp_path / "a.png")
    assert same.text == found.text
    assert p({"image": picture(), "question": "what is this ?"}).text == found.text
    # the marks stand where the template puts them
    ids = p.prepare(p.read((picture(), "what is this ?")))["input_ids"]
    words = [WORDS[i] for i in ids]
    assert words[:5] == ["<|im_start|>", "system", "be", "brief", "<|im_end|>"]
    assert words[7:9] == ["<img>", "<IMG_CONTEXT>"]
    assert words.count("<IMG_CONTEXT>") == 12
    assert words[-3:] == ["<|im_end|>", "<|im_start|>", "assistant"]


def test_pictures_are_seen():
    m = model()
    with torch.no_grad():
        m.vision_embeddings.patch_embedding.weight.normal_(std=0.5)
    logits = [pipe(m)({"image": p, "question": "what ?"}).state.logits for p in (picture(), picture().rotate(180))]
    assert not torch.allclose(*logits)


def test_streaming_gives_the_same_text():
    p = pipe()
    source = {"image": picture(), "question": "what is this ?"}
    assert "".join(p.stream_text(source)).strip() == p(source).text
    assert p.last.text == p(source).text


@pytest.mark.parametrize("shuffle", ["pre", "post"])
def test_a_follow_up_reads_nothing_again(shuffle):
    m = model(shuffle=shuffle)
    with torch.no_grad():
        m.output.weight[: len(MARKS)] = 0  # answers in words
    p = pipe(m)
    first = p({"image": picture(), "question": "what is this ?"})
    history = [("what is this ?", first.text)]
    whole = p({"image": picture(), "question": "a dog ?", "history": history})
    assert "".join(p.follow_up("a dog ?", first.state)).strip() == whole.text
    assert first.state.position == whole.state.position


def test_text_alone_and_several_pictures():
    p = pipe()
    assert p({"image": None, "question": "a cat ?"}).tiles == 0
    assert p({"image": [picture(16, 16), picture(16, 16)], "question": "a <image> two <image> ?"}).tiles == 2
    many = p([{"image": None, "question": "a cat ?"}, {"image": picture(), "question": "a cat ?"}], batch_size=2)
    assert [m.tiles > 0 for m in many] == [False, True]


def test_wrong_inputs_are_named():
    p = pipe()
    with pytest.raises(ValueError, match="expected \\(picture, question\\)"):
        p((picture(), picture()))
    with pytest.raises(ValueError, match="keys \\['text'\\]"):
        p({"text": "a"})
    with pytest.raises(errors.BadArgument, match="expected MmMamba"):
        ImageTextToText(torch.nn.Linear(1, 1))
    with pytest.raises(errors.BadArgument, match="do not belong together"):
        pipe(model(image_token=4))


# -- the demo


def test_the_demo_answers_as_its_card_says():
    """On questions that neither the training nor the card's figure saw; without the pictures it falls to guessing."""
    card = zoo.info("mmmamba_micro.scenes")
    figures = {m.name: m.value for m in card.weights.metrics}
    demo = zoo.pipeline("mmmamba_micro.scenes")
    held = scenes.samples(160, seed=7)
    answers = demo([{"image": s.scene.picture(), "question": s.question} for s in held])
    right = sum(a.text == s.answer for a, s in zip(answers, held, strict=True)) / len(held)
    assert right == pytest.approx(figures["accuracy"], abs=0.1)
    grey = Image.new("RGB", (scenes.SIZE, scenes.SIZE), (124, 116, 104))
    blind = demo([{"image": grey, "question": s.question} for s in held])
    assert sum(a.text == s.answer for a, s in zip(blind, held, strict=True)) / len(held) < right - 0.2


def test_scenes_have_answers():
    for about in scenes.QUESTIONS:
        found = scenes.samples(200, seed=1, abouts=[about])
        answers = {s.answer for s in found}
        assert len(answers) > 1
        assert {w for s in found for w in f"{s.question} {s.answer}".split()} <= set(scenes.WORDS)
        commonest = max(sum(s.answer == a for s in found) for a in answers)
        assert commonest < 0.75 * len(found)
    assert scenes.samples(5, seed=2) == scenes.samples(5, seed=2)


def test_ask_on_the_command_line():
    from zoo_registry import package_path

    path = str(package_path("zoo_multimodal", "demo/scene.png"))
    run = CliRunner().invoke(ask_command, ["mmmamba_micro.scenes", path, "how many shapes are there ?"])
    assert run.exit_code == 0, run.output
    told = CliRunner().invoke(ask_command, ["mmmamba_micro.scenes", path, "how many shapes are there ?", "--json"])
    table = json.loads(told.output)
    assert table["text"] == run.output.strip()
    assert table["tiles"] == 1
    more = CliRunner().invoke(
        ask_command,
        ["mmmamba_micro.scenes", path, "how many shapes are there ?", "--chat"],
        input="what is top left ?\n\n",
    )
    assert more.exit_code == 0, more.output
    both = CliRunner().invoke(ask_command, ["mmmamba_micro.scenes", path, "a ?", "--chat", "--json"])
    assert "not both" in both.output


def test_validate_counts_right_answers(tmp_path):
    lines = []
    demo = zoo.pipeline("mmmamba_micro.scenes")
    for i, s in enumerate(scenes.samples(6, seed=11)):
        s.scene.picture().save(tmp_path / f"{i}.png")
        own = demo((tmp_path / f"{i}.png", s.question)).text
        said = own if i < 4 else "nothing nothing nothing"
        turns = [{"from": "human", "value": f"<image>\n{s.question}"}, {"from": "gpt", "value": said}]
        lines.append(json.dumps({"image": f"{i}.png", "conversations": turns}))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    found = zoo.validate("mmmamba_micro.scenes", tmp_path / "chats.jsonl")
    assert found.metrics["accuracy"] == pytest.approx(4 / 6)
    assert found.samples == 6
    few = zoo.validate("mmmamba_micro.scenes", tmp_path / "chats.jsonl", limit=4)
    assert few.metrics["accuracy"] == 1
    assert 0 < few.metrics["nll"] < found.metrics["nll"]
