"""From files, folders, patterns and objects to results; batching; errors that name the file."""

import numpy as np
import pytest
import torch
from toy_weights import toy

import zoo
from zoo import errors
from zoo.pipelines import Pipeline, describe_source
from zoo.results import Failure, Result, plain, ranked


@pytest.fixture
def files(tmp_path):
    generator = torch.Generator().manual_seed(1)
    for i in range(12):
        rows = torch.rand(3, 36 if i != 5 else 72, generator=generator)
        (tmp_path / f"f{i}.txt").write_text("\n".join(" ".join(f"{v:.3f}" for v in row) for row in rows.tolist()))
    (tmp_path / "notes.md").write_text("not an input")
    (tmp_path / ".hidden.txt").write_text("not either")
    return tmp_path


@pytest.fixture
def pipe(toys):
    return zoo.pipeline("toy_small")


def test_one_file(pipe, files):
    answer = pipe(files / "f0.txt")
    assert isinstance(answer, Result)
    assert answer.model == "toy_small.packed"
    assert answer.source.endswith("f0.txt")
    assert answer.milliseconds > 0
    assert answer.label in ("ant", "bee", "cat", "dog")
    found = answer.to_dict()
    assert found["answer"] == answer.label
    assert 0 < found["confidence"] <= 1
    assert str(answer).endswith(f"{answer.label} ({answer.sure:.1%})")


def test_the_answer_is_the_models(pipe, files):
    x = pipe.read(files / "f0.txt")
    expected = toy()(x[None] * 2.0).softmax(-1).max()
    assert pipe(x).confidence == pytest.approx(expected.item(), abs=1e-6)


def test_folders_lists_and_patterns(pipe, files):
    every = pipe(files, batch_size=4)
    assert [r.source.rpartition("/")[2] for r in every] == [f"f{i}.txt" for i in range(12)], "natural order"
    assert [r.best for r in pipe(str(files / "f*.txt"))] == [r.best for r in every]
    assert len(pipe([files / "f1.txt", str(files / "f1[01].txt")])) == 3
    assert [r.best for r in pipe.stream(files, batch_size=5)] == [r.best for r in every]


def test_batches_equal_single_answers(pipe, files):
    single = [r.confidence for r in pipe(files, batch_size=1)]
    assert [r.confidence for r in pipe(files, batch_size=64)] == pytest.approx(single, abs=1e-6)


def test_samples_of_other_shapes_get_batches_of_their_own(pipe, files):
    sizes = []
    collate = pipe.collate
    pipe.collate = lambda samples: sizes.append(len(samples)) or collate(samples)
    pipe(files, batch_size=12)
    assert sizes == [5, 1, 6]


def test_mistakes(pipe, files, tmp_path):
    with pytest.raises(errors.LocalFileMissing, match="there is no file or folder"):
        pipe("no/such.txt")
    with pytest.raises(errors.LocalFileMissing, match="no file matches"):
        pipe(str(files / "*.xyz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.LocalFileMissing, match=r"expected \.txt"):
        pipe(tmp_path / "empty")
    assert len(pipe(files, batch_size=np.int64(5))) == len(pipe(files))
    for wrong in (0, "4", True):
        with pytest.raises(errors.BadArgument, match=f"batch_size is {wrong!r}"):
            pipe(files, batch_size=wrong)


def test_a_file_that_cannot_be_read(pipe, files):
    (files / "f3.txt").write_text("not numbers")
    with pytest.raises(ValueError, match="could not convert") as caught:
        pipe(files)
    assert any("f3.txt" in note for note in caught.value.__notes__)
    results = pipe(files, batch_size=4, keep_going=True)
    assert [i for i, r in enumerate(results) if isinstance(r, Failure)] == [3]
    assert results[3].to_dict()["error"] == "ValueError"
    assert "failed" in str(results[3])


def test_one_bad_sample_does_not_take_its_batch_along(pipe, files):
    expected = [r.best for r in pipe(files, batch_size=4)]
    finish, count = pipe.finish, []

    def finishing(output, sample):
        count.append(1)
        if torch.equal(sample, bad):
            raise ValueError("this one")
        return finish(output, sample)

    bad, pipe.finish = pipe.read(files / "f9.txt"), finishing
    results = pipe(files, batch_size=4, keep_going=True)
    assert [i for i, r in enumerate(results) if isinstance(r, Failure)] == [9]
    assert [r.best for i, r in enumerate(results) if i != 9] == [b for i, b in enumerate(expected) if i != 9]


def test_a_model_in_training_answers_in_evaluation(pipe, files):
    expected = pipe(files / "f0.txt").confidence
    modes = []
    pipe.model.train()
    next(iter(pipe.model.children())).eval()  # a frozen part
    before = [m.training for m in pipe.model.modules()]
    pipe.model.register_forward_pre_hook(lambda m, a: modes.append(m.training))
    assert pipe(files / "f0.txt").confidence == expected
    assert modes == [False]
    assert [m.training for m in pipe.model.modules()] == before


def test_classes_are_not_ranked_where_there_is_no_answer():
    assert ranked(torch.tensor([0.0, 2.0]), ["a", "b"], 1)["labels"] == ["b"]
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            ranked(torch.tensor([0.0, wrong]), ["a", "b"], 1)


def test_a_model_that_fails(pipe, files):
    pipe.forward = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError) as caught:
        pipe(files / "f0.txt")
    assert any("while answering" in note for note in caught.value.__notes__)
    assert all(isinstance(r, Failure) for r in pipe(files, keep_going=True))


def test_options_go_where_they_belong(toys, files):
    assert zoo.pipeline("toy_small", upper=True)(files / "f0.txt").label.isupper()
    pipe = zoo.pipeline("toy_small", num_classes=2, dtype=torch.float64, upper=True)
    assert pipe.dtype == torch.float64
    assert pipe(files / "f0.txt").label.startswith("CLASS")
    assert zoo.pipeline(zoo.load("toy_small"), upper=True).upper


def test_wrong_devices_types_and_options(toys):
    with pytest.raises(errors.BadArgument, match="device is 'banana', which this machine cannot compute on"):
        zoo.load("toy_small", device="banana")
    with pytest.raises(errors.BadArgument, match="device is 'banana'"):
        zoo.create("toy_small", device="banana")
    with pytest.raises(errors.BadArgument, match="dtype is 'int8'; expected a type of floating-point numbers"):
        zoo.load("toy_small", dtype="int8")
    assert zoo.create("toy_small", dtype="float64").head.weight.dtype == torch.float64
    for model in ("toy_small", zoo.load("toy_small")):
        with pytest.raises(errors.BadArgument, match="upper is 'yes'; expected bool"):
            zoo.pipeline(model, upper="yes")
    with pytest.raises(errors.BadArgument, match="toy_small: width is '8'; expected int"):
        zoo.create("toy_small", width="8")


def test_tasks(toys):
    with pytest.raises(errors.UnknownTask, match="toy-counting"):
        zoo.pipeline("toy_small", task="toy-countin")
    with pytest.raises(errors.UnknownTask, match="give task="):
        zoo.pipeline(torch.nn.Linear(1, 1))
    assert zoo.pipeline(torch.nn.Linear(1, 1), task="toy-counting").name == "Linear"


def test_pictures(pipe, files, tmp_path):
    answer = pipe(files / "f0.txt")
    assert answer.has_picture
    assert answer.save_picture(tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(errors.BadArgument, match="has no picture"):
        Result().save_picture(tmp_path / "b.png")
    assert not Result().has_picture


class Echo(Pipeline):
    task = "echo"
    text_input = True

    def __init__(self):
        super().__init__(torch.nn.Identity())

    def read(self, source):
        return source if isinstance(source, str) else source.read_text()

    def prepare(self, sample):
        return {"input": torch.tensor([float(len(sample))], dtype=torch.float32)}

    def finish(self, output, sample):
        return Said(text=sample, length=output)


@__import__("dataclasses").dataclass(kw_only=True)
class Said(Result):
    text: str
    length: object

    def summary(self):
        return self.text


def test_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("from a file")
    pipe = Echo()
    assert pipe("some words").text == "some words"
    assert [r.text for r in pipe(["a", "bc"], batch_size=2)] == ["a", "bc"]
    assert pipe(pipe.argument("t.txt")).text == "from a file"
    assert pipe(pipe.argument("x" * 5000)).text == "x" * 5000
    assert pipe("a").to_dict()["length"] == [1.0]


class Pair(Echo):
    text_input = False
    files_per_sample = 2
    extensions = (".txt",)

    def read(self, source):
        return "+".join(p.read_text() for p in source)


def test_several_files_a_sample(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(name)
    pipe = Pair()
    assert pipe((tmp_path / "a.txt", tmp_path / "b.txt")).text == "a+b"
    assert [r.text for r in pipe([tmp_path / f"{n}.txt" for n in "abcd"])] == ["a+b", "c+d"]
    assert pipe((tmp_path / "a.txt", tmp_path / "b.txt")).source.count(" + ") == 1
    with pytest.raises(errors.BadArgument, match="takes 2 for each sample"):
        pipe([tmp_path / "a.txt"])


def test_an_option_that_nobody_has_names_those_of_the_pipeline(toys):
    with pytest.raises(errors.BadArgument, match="uper") as caught:
        zoo.pipeline("toy_small", uper=True)
    assert "upper" in caught.value.__notes__[0]
    with pytest.raises(errors.BadArgument, match="device") as caught:
        zoo.pipeline("toy_small", device="banana")
    assert not hasattr(caught.value, "__notes__")


def test_answers_before_an_input_that_cannot_be_read_are_not_lost(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    for batch_size in (1, 3):
        answers = Echo().stream(["a", "b", tmp_path / "bad.txt", "c"], batch_size=batch_size)
        assert [next(answers).text, next(answers).text] == ["a", "b"]
        with pytest.raises(UnicodeDecodeError) as caught:
            next(answers)
        assert "bad.txt" in caught.value.__notes__[0]


def test_a_full_batch_is_answered_before_the_next_input_is_read(tmp_path):
    read = []

    class Noting(Echo):
        def read(self, source):
            read.append(source)
            return super().read(source)

    answers = Noting().stream(["a", "b", "c"], batch_size=1)
    assert next(answers).text == "a"
    assert read == ["a"]


def test_plain_values():
    assert plain({"a": torch.ones(2), 1: (torch.tensor(3), {"b"}), "p": __import__("pathlib").Path("x")}) == {
        "a": [1.0, 1.0],
        "1": [3, ["b"]],
        "p": "x",
    }


def test_sources_in_words():
    assert describe_source(torch.zeros(2, 3)) == "Tensor(2, 3)"
    assert describe_source("y" * 100) == "y" * 57 + "..."
    assert describe_source(object()) == "object"
