"""Interleaved documents: files, ids, codebooks, the pipeline and its commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from recipes import recipe

import zoo
import zoo_multimodal
from zoo.cli.predict import predict as predict_command
from zoo_multimodal.commands_mixture import train_interleaved
from zoo_multimodal.documents import (
    BEGIN,
    END,
    PICTURE,
    Codec,
    codes_of,
    fit_codebook,
    load_picture,
    make_document,
    picture_of,
    read_documents,
)
from zoo_multimodal.interleaved import Interleaved
from zoo_multimodal.mixture_lm import MixtureLM
from zoo_multimodal.transfusion import TransfusionMamba

SAMPLE = Path(zoo_multimodal.__file__).parent / "demo" / "shapes" / "document.json"
MODEL = "mixture_of_mamba_micro.shapes"


@pytest.fixture(scope="module")
def shapes():
    return recipe("multimodal", "picture_documents")


@pytest.fixture(scope="module")
def pipe():
    return zoo.pipeline(MODEL)


# -- pictures and ids


def test_codebook_stands_for_the_pictures(shapes):
    pictures = [load_picture(shapes.draw(q), 16) for q in shapes.pictures(200, 5)]
    codebook = fit_codebook(pictures, 53, 4)
    assert codebook.shape == (53, 3, 4, 4)
    for picture in pictures[:20]:
        codes = codes_of(picture, codebook)
        assert codes.shape == (16,)
        torch.testing.assert_close(picture_of(codes, codebook, 4), picture, atol=1e-5, rtol=0)
        noisy = (picture + 0.05 * torch.randn_like(picture)).clamp(0, 1)
        assert torch.equal(codes_of(noisy, codebook), codes)
    few = fit_codebook(pictures, 8, 4)
    assert len(few.flatten(1).unique(dim=0)) == 8
    more = fit_codebook([pictures[0]], 53, 4)  # more codes than squares
    torch.testing.assert_close(picture_of(codes_of(pictures[0], more), more, 4), pictures[0], atol=1e-5, rtol=0)


def test_squares_are_in_raster_order():
    picture = torch.arange(8.0).view(1, 1, 8).expand(3, 8, 8) + 10 * torch.arange(8.0)[:, None]
    own = torch.stack([picture[:, r : r + 4, c : c + 4] for r in (0, 4) for c in (0, 4)])
    assert codes_of(picture, own).tolist() == [0, 1, 2, 3]
    assert torch.equal(picture_of(torch.arange(4), own, 2), picture)


def test_pictures_of_other_sizes_and_kinds(tmp_path):
    Image.new("L", (40, 30), 128).save(tmp_path / "grey.png")
    found = load_picture(tmp_path / "grey.png", 16)
    assert found.shape == (3, 16, 16)
    torch.testing.assert_close(found, torch.full((3, 16, 16), 128 / 255))


def reader(**more):
    torch.manual_seed(0)
    model = MixtureLM(8, 1, (3 + 4, 5), ssm={"d_state": 4}, alphabet="ab, ", patch=2, grid=2, **more).eval()
    model.codebook.copy_(torch.rand(5, 3, 2, 2))
    return model


def test_ids_of_a_document():
    model = reader()
    codec = Codec(model)
    picture = (picture_of(torch.tensor([4, 0, 1, 2]), model.codebook, 2) * 255).round().byte().permute(1, 2, 0).numpy()
    document = make_document([{"text": "ab"}, {"image": picture}, {"tokens": [3, 0], "modality": 1}, {"text": ","}])
    ids, spans = codec.encode(document, end=True)
    assert ids == [BEGIN, 3, 4, PICTURE, 11, 7, 8, 9, 10, 7, 5, END]
    assert [(s.kind, s.start, s.stop) for s in spans] == [
        ("text", 1, 3), ("image", 3, 8), ("tokens", 8, 10), ("text", 10, 11),
    ]  # fmt: skip
    assert codec.decode_text(ids) == "ab,"
    torch.testing.assert_close(
        codec.decode_picture(ids[4:8]), torch.from_numpy(picture).permute(2, 0, 1) / 255, atol=0.01, rtol=0
    )


BAD = {
    "[]": "expected a list of segments",
    '{"text": "a"}': "expected a list of segments",
    '[{"words": "a"}]': "segment 0 is .*expected one of the keys text, image, tokens",
    '[{"text": "a", "image": "b"}]': "segment 0",
    "[1]": "segment 0 is 1",
    "{": "is no JSON",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_files(text, tmp_path):
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=BAD[text]):
        read_documents(path)
    (tmp_path / "d.jsonl").write_text(f'[{{"text": "a"}}]\n\n{text}\n')
    with pytest.raises(ValueError, match="line 3"):
        read_documents(tmp_path / "d.jsonl")


def test_bad_segments():
    codec = Codec(reader())
    for segment, said in (
        ({"text": "abz"}, "segment 0 has the character 'z'; this model knows 'ab, ' only"),
        ({"tokens": [1], "modality": 2}, "of modality 2; this model has 0 to 1"),
        ({"tokens": [9], "modality": 1}, "integers from 0 to 4"),
        ({"tokens": "1"}, "integers from 0 to 6"),
        ({"text": None}, "segment 0: text is None; expected words in quotation marks"),
    ):
        with pytest.raises(ValueError, match=said):
            codec.encode(make_document([segment]))
    drawn = Codec(reader())
    for source, said in ((None, "given as NoneType"), (Path(__file__), "is no picture"), (Path("no.png"), "no file")):
        with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
            drawn.encode(make_document([{"text": "a"}, {"image": source}], name="d.json"))
        assert caught.value.__notes__ == ["in d.json: segment 1"]
    plain = Codec(MixtureLM(8, 1, (7, 5)))
    with pytest.raises(ValueError, match="this model reads tokens"):
        plain.encode(make_document([{"text": "a"}]))
    with pytest.raises(ValueError, match="this model reads codes"):
        plain.encode(make_document([{"image": "a.png"}]))


# -- the pipeline


def test_scores_are_the_models():
    model = reader()
    pipe = Interleaved(model, write="none")
    document = make_document([{"text": "ab"}, {"tokens": [3, 0], "modality": 1}])
    answer = pipe(document)
    with torch.no_grad():
        chance = model(torch.tensor([[BEGIN, 3, 4, 10, 7]]))[0].log_softmax(-1) / -np.log(2)
    each = [float(chance[t, i]) for t, i in enumerate([3, 4, 10, 7])]
    assert [r["bits"] for r in answer.rows] == pytest.approx([sum(each[:2]) / 2, sum(each[2:]) / 2], rel=1e-4)
    assert [(r["kind"], r["tokens"]) for r in answer.rows] == [("text", 2), ("tokens", 2)]
    assert answer.text is answer.codes is answer.tokens is None
    assert not answer.has_picture
    assert f"{sum(each) / 4:.2f} bits a token in 4" in answer.summary()


def test_what_is_written():
    model = reader()
    words = [{"text": "a,"}]
    drawn = Interleaved(model)(words)
    assert len(drawn.codes) == 4
    assert drawn.picture().size == (256, 256)
    said = Interleaved(model, write="text", max_new_tokens=5)(words)
    assert set(said.text) <= set("ab, ")
    assert said.picture() is None
    tokens = Interleaved(MixtureLM(8, 1, (7, 5)).eval(), max_new_tokens=6)([{"tokens": [1, 2]}])
    assert len(tokens.tokens) == 6
    hot = [Interleaved(model, temperature=3.0, seed=s)(words).codes for s in (0, 0, 1, 2)]
    assert hot[0] == hot[1]
    assert len({tuple(h) for h in hot}) > 1


def test_pipeline_refuses():
    with pytest.raises(ValueError, match="write is 'song'"):
        Interleaved(reader(), write="song")
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        Interleaved(reader(), max_new_tokens=0)
    with pytest.raises(ValueError, match="reads continuous patches"):
        Interleaved(TransfusionMamba(8, 1, 5, 4))
    with pytest.raises(ValueError, match="writes no image: it has no codebook"):
        Interleaved(MixtureLM(8, 1, (7, 5)), write="image")([{"tokens": [1]}])


# -- the demo


def test_sample_is_captioned(pipe, shapes):
    """A document of new pictures, the last without a caption: the model writes it."""
    answer = pipe(SAMPLE)
    last = shapes.pictures(2, 11)[1]
    assert answer.text == shapes.caption(last)
    assert [r["kind"] for r in answer.rows] == ["image", "text", "image"]


def test_a_picture_from_words(pipe, shapes, tmp_path):
    right = []
    for own in shapes.pictures(20, 21):
        answer = pipe([{"text": shapes.caption(own)}])
        small = np.asarray(answer.picture())[8::16, 8::16]
        wrong = (np.abs(small.astype(int) - shapes.draw(own)) > 24).any(-1)
        right.append(1 - wrong.reshape(4, 4, 4, 4).any((1, 3)).mean())  # of 16 squares
    assert np.mean(right) > 0.7
    assert answer.save_picture(tmp_path / "drawn.png").exists()


def test_each_line_is_a_document(pipe, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('[{"text": "red disc"}]\n\n[{"text": "blue ring"}]\n')
    found = pipe(path)
    assert [one.source for one in found] == ["d.jsonl, line 1", "d.jsonl, line 3"]
    path.write_text('[{"text": "red disc"}]\n')
    assert pipe(path).rows == found[0].rows


def test_training_refuses_other_models(tmp_path):
    (tmp_path / "d.jsonl").write_text('[{"text": "a"}]\n' * 3)
    words = ["broad_mamba_micro", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(train_interleaved, words)
    assert done.exit_code == 2
    assert "broad_mamba_micro is a BroadMamba; expected a model of mixture_of_mamba_" in done.output


def test_predict_command(tmp_path):
    run = CliRunner().invoke(predict_command, [MODEL, str(SAMPLE), "--json"], catch_exceptions=False)
    (said,) = json.loads(run.stdout)
    assert said["text"] == zoo.pipeline(MODEL)(SAMPLE).text
    folder = tmp_path / "pictures"
    arguments = [MODEL, str(SAMPLE), "-o", "write=image", "--pictures", str(folder)]
    CliRunner().invoke(predict_command, arguments, catch_exceptions=False)
    assert len(list(folder.glob("*.png"))) == 1


# -- training


def test_training_from_files(tmp_path, shapes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes.write_folder("data", 12, 1)
    arguments = [
        "mixture_of_mamba_micro",
        "data/documents.jsonl",
        "--out",
        "trained",
        "--steps",
        "3",
        "--batch-size",
        "2",
    ]
    run = CliRunner().invoke(train_interleaved, [*arguments, "--json"], catch_exceptions=False)
    found = json.loads(run.output)
    assert found["documents"] == 1
    assert found["bits a token of text"] > 0
    measured = zoo.validate("./trained", "data/documents.jsonl")
    assert measured.samples == 12
    assert set(measured.metrics) == {"bits a token of text", "bits a token of image"}
    again = zoo.load("./trained")
    picture = load_picture("data/0_0.png" if Path("data/0_0.png").exists() else "data/0_1.png", 16)
    torch.testing.assert_close(
        picture_of(codes_of(picture, again.codebook), again.codebook, 4), picture, atol=0.02, rtol=0
    )


def test_training_on_tokens_and_latents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = json.dumps([{"tokens": [1, 2, 3]}, {"tokens": [4, 0], "modality": 2}])
    Path("d.jsonl").write_text(f"{line}\n" * 4)
    small = ["--steps", "2", "--batch-size", "2", "--json", "--set", "d_model=8", "--set", "n_layer=1"]
    run = CliRunner().invoke(
        train_interleaved,
        ["mixture_of_mamba_speech", "d.jsonl", "--out", "t", *small, "--set", "vocab_sizes=[8,4,6]"],
        catch_exceptions=False,
    )
    assert {"bits a token of text", "bits a token of speech"} <= set(json.loads(run.output))
    ids = np.tile([0, 1, 5, 5, 2], (6, 1))
    np.savez("l.npz", input_ids=ids, latents=np.random.default_rng(0).normal(size=(6, 5, 3)).astype(np.float32))
    own = ["--set", "vocab_size=5", "--set", "latent_dim=3"]
    arguments = ["mixture_of_mamba_transfusion", "l.npz", "--out", "u", *small, *own]
    run = CliRunner().invoke(train_interleaved, arguments, catch_exceptions=False)
    assert set(json.loads(run.output)) == {"nats a token of text", "noise error of images", "documents", "folder"}
    np.savez("l.npz", input_ids=ids, latents=np.zeros((6, 5, 2)))
    run = CliRunner().invoke(train_interleaved, arguments)
    assert "expected (documents, length) and (documents, length, 3)" in run.output
    Path("d.jsonl").write_text(f"{line}\n")
    run = CliRunner().invoke(
        train_interleaved, ["mixture_of_mamba_speech", "d.jsonl", "--out", "t", *small, "--set", "vocab_sizes=[8,4,6]"]
    )
    assert "at least 2 are needed" in run.output


@pytest.mark.slow
def test_the_cards_figures_hold():
    found = recipe("multimodal", "train_mixture").figures(zoo.load(MODEL).float())
    for metric in zoo.info(MODEL).weights.metrics:
        assert found[metric.name] == pytest.approx(metric.value, abs=0.006), metric.name
