"""`zoo train` and `zoo recommend`, as a user types them."""

import json
import shutil

import pytest
from click.testing import CliRunner

import zoo
from zoo_recommendation import artifact
from zoo_recommendation.commands import create, recommend, train
from zoo_recommendation.protocol import prepare
from zoo_recommendation.recbole_models import installed


@pytest.fixture(scope="module")
def interactions(tmp_path_factory):
    """A circle of 12 items that everyone walks: the next item follows from the last."""
    path = tmp_path_factory.mktemp("data") / "interactions.csv"
    rows = [f"u{user},i{(user * 5 + t) % 12},{1_600_000_000 + 100 * t}" for user in range(36) for t in range(9)]
    path.write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def run(interactions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    arguments = ["mamba4rec_ml1m", str(interactions), "--out", str(folder), "--epochs", "8", "--batch-size", "32"]
    arguments += ["--lr", "0.01", "--max-length", "8", "--set", "hidden_size=16", "--set", "d_state=4", "--json"]
    result = CliRunner().invoke(train, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout.strip().splitlines()[-1])


def test_train_learns_and_leaves_a_folder(run):
    folder, answer = run
    assert answer["test"]["hit@10"] > 0.9
    for name in ("model", "items.json", "users.sqlite", "history.json", "results.json", "curve.png"):
        assert (folder / name).exists(), name


def test_recommend_a_user(run):
    folder, _ = run
    result = CliRunner().invoke(recommend, [str(folder), "--user", "u1", "-k", "2", "--json"], catch_exceptions=False)
    answer = json.loads(result.stdout)
    assert answer["user"] == "u1"
    assert len(answer["items"]) == 2
    assert not answer["cold"]
    # u1 walked 5, 6, ... 13 -> items 5..11, 0, 1; what comes next, and was not seen, is 2
    assert answer["items"][0]["item"] == "i2"


def test_recommend_a_stranger(run):
    folder, _ = run
    result = CliRunner().invoke(recommend, [str(folder), "--user", "nobody"], catch_exceptions=False)
    assert "no history: the most popular" in result.stdout


def test_recommend_everyone_to_parquet(run, tmp_path):
    import pyarrow.parquet as parquet

    folder, _ = run
    out = tmp_path / "all.parquet"
    result = CliRunner().invoke(recommend, [str(folder), "--all", "-k", "3", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    assert parquet.read_table(out).num_rows == 36 * 3


def test_a_run_does_not_go_on_with_other_data(run, interactions, tmp_path):
    folder, _ = run
    changed = tmp_path / "changed.csv"  # the same users, items and times, in pairs the other way round
    head, first, *rest = interactions.read_text().splitlines()
    second = rest.pop(0)
    one, two = first.split(","), second.split(",")
    one[1], two[1] = two[1], one[1]
    changed.write_text("\n".join([head, ",".join(one), ",".join(two), *rest]) + "\n")
    arguments = ["mamba4rec_ml1m", str(changed), "--out", str(folder), "--epochs", "8", "--batch-size", "32"]
    arguments += ["--lr", "0.01", "--max-length", "8", "--set", "hidden_size=16", "--set", "d_state=4"]
    result = CliRunner().invoke(train, arguments)
    assert isinstance(result.exception, ValueError)
    assert "other settings (data)" in str(result.exception)


def test_the_same_command_goes_on(run, interactions):
    folder, answer = run
    arguments = ["mamba4rec_ml1m", str(interactions), "--out", str(folder), "--epochs", "8", "--batch-size", "32"]
    arguments += ["--lr", "0.01", "--max-length", "8", "--set", "hidden_size=16", "--set", "d_state=4", "--json"]
    result = CliRunner().invoke(train, arguments, catch_exceptions=False)
    assert json.loads(result.stdout.strip().splitlines()[-1])["test"] == answer["test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--user", "a", "--all"], "say whom to answer"),
        (["run"], "say whom to answer"),
        (["run", "--all", "--out", "all.csv"], "--out is all.csv; expected a name that ends in .parquet"),
    ],
)
def test_whom(arguments, message):
    result = CliRunner().invoke(recommend, arguments)
    assert result.exit_code != 0
    assert message in result.output


def test_a_folder_that_is_no_recommender(tmp_path):
    result = CliRunner().invoke(recommend, [str(tmp_path), "--user", "a"])
    assert isinstance(result.exception, FileNotFoundError)
    assert "zoo train mamba4rec interactions.csv" in str(result.exception)


SMALL = ["--batch-size", "64", "--max-length", "8", "--epochs", "1", "--set", "hidden_size=16"]


def test_a_systems_name_and_no_folder(interactions, tmp_path, monkeypatch):
    """`zoo train tim4rec interactions.csv` is enough: the folder is named for both."""
    monkeypatch.chdir(tmp_path)
    arguments = ["tim4rec", str(interactions), *SMALL, "--set", "head_dim=8", "--scale-time", "--json"]
    result = CliRunner().invoke(train, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    recommender = artifact.load("tim4rec-interactions")
    low, high = recommender.time_scale
    assert (low, high) == (1_600_000_000, 1_600_000_800)
    recommender.update("u1", "i3", 1_600_000_400)
    assert recommender.store.get("u1").times[-1] == 0.5  # an update's seconds are read as training read them
    assert len(recommender.recommend("u1", k=2).items) == 2


def test_a_systems_name_is_its_published_configuration():
    assert create("tim4rec", n_items=10).layers[0].ssd.d_state == 32
    assert create("mamba4rec", n_items=10).max_length == 50
    assert create("ssd4rec", n_items=10, max_length=20).recurrent


@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_baselines_train_and_answer(name, interactions, tmp_path):
    result = CliRunner().invoke(
        train, [name, str(interactions), "--out", str(tmp_path), *SMALL], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert installed() or "RecBole is not installed" in result.output
    one, two = artifact.load(tmp_path), artifact.load(tmp_path)
    assert one.recommend("u1", k=3) == two.recommend("u1", k=3)
    assert one.model.built_from["baseline"] == name


def test_ctrl_c_says_how_to_go_on(interactions, tmp_path, monkeypatch):
    from zoo_recommendation import training

    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "evaluate", interrupted)
    result = CliRunner().invoke(train, ["mamba4rec", str(interactions), "--out", str(tmp_path), *SMALL])
    assert result.exit_code != 0
    assert "the same command goes on" in result.output


def test_the_trained_model_is_one_of_the_zoos(run, interactions):
    """Its folder answers and is measured like any other model, with the items' own names."""
    folder, answer = run
    found = zoo.validate(folder / "model", interactions)
    assert found.samples == 36
    assert found.metrics["hit@10"] == pytest.approx(answer["test"]["hit@10"], abs=1e-6)
    assert zoo.pipeline(folder / "model", top_k=1)(["i3", "i4", "i5"]).items == ["i6"]


def test_validate_says_what_it_left_out(run, tmp_path):
    folder, _ = run
    (tmp_path / "more.csv").write_text("user,item,timestamp\na,i1,1\na,new,2\na,i2,3\nb,i5,1\n")
    found = zoo.validate(folder / "model", tmp_path / "more.csv")
    assert found.samples == 1
    assert found.notes.startswith("1 of 4 interactions left out")
    (tmp_path / "other.csv").write_text("user,item,timestamp\na,x,1\na,y,2\n")
    with pytest.raises(zoo.errors.BadArgument, match="none of its 2 items is known"):
        zoo.validate(folder / "model", tmp_path / "other.csv")


def test_what_users_took_since_survives_a_run_that_goes_on(interactions, tmp_path):
    """The same command again, for more epochs: histories stay as they grew, with the states of the new weights."""
    arguments = ["mamba4rec", str(interactions), "--out", str(tmp_path), *SMALL, "--set", "d_state=4"]
    CliRunner().invoke(train, arguments, catch_exceptions=False)
    recommender = artifact.load(tmp_path)
    recommender.update_many([("u1", "i7", 1_600_009_000), ("new", "i1", 1), ("new", "i2", 2)])
    recommender.store.close()
    result = CliRunner().invoke(train, [*arguments, "--epochs", "3"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    again = artifact.load(tmp_path)
    assert len(again.store) == 37
    assert len(again.store.get("u1").items) == 10
    fresh = artifact.Recommender(again.model, again.item_tokens)
    fresh.update_many([("new", "i1", 1), ("new", "i2", 2)])
    assert fresh.scores("new")[1:] == pytest.approx(again.scores("new")[1:], rel=1e-4, abs=1e-5)


def test_what_users_took_since_is_read_on_the_time_scale_of_the_new_table(tmp_path):
    """A folder holds times as its model reads them; a later table of the same items has a scale of its own."""
    users, items = ["a", "a", "b", "b"], ["x", "y", "x", "y"]
    before = prepare(users, items, [100.0, 200.0, 100.0, 200.0], core=1, scale_time=True)
    model = create("mamba4rec", n_items=before.n_items, hidden_size=8, d_state=4, max_length=4)
    recommender = artifact.save(tmp_path, model, before)
    recommender.update("a", "x", 300.0)
    recommender.store.close()
    after = prepare(users, items, [100.0, 200.0, 100.0, 500.0], core=1, scale_time=True)
    assert (before.time_scale, after.time_scale) == ((100, 200), (100, 500))
    again = artifact.save(tmp_path, model, after)
    assert again.store.get("a").times == pytest.approx([0, 0.25, 0.5])
    raw = prepare(users, items, [100.0, 200.0, 100.0, 200.0], core=1)
    again.store.close()
    assert artifact.save(tmp_path, model, raw).store.get("a").times == pytest.approx([100, 200, 300])


def test_a_damaged_file_of_users_does_not_cost_the_training(interactions, tmp_path, caplog):
    arguments = ["mamba4rec", str(interactions), "--out", str(tmp_path), *SMALL, "--set", "d_state=4"]
    CliRunner().invoke(train, arguments, catch_exceptions=False)
    (tmp_path / "users.sqlite").write_text("damaged" * 1000)
    assert CliRunner().invoke(train, arguments, catch_exceptions=False).exit_code == 0
    assert "written anew" in caplog.text
    assert len(artifact.load(tmp_path).store) == 36


def test_a_folder_of_scaled_times_says_so(interactions, tmp_path):
    """What is read for the saved model is scaled as its training data were."""
    arguments = ["tim4rec", str(interactions), "--out", str(tmp_path), *SMALL, "--set", "head_dim=8", "--scale-time"]
    assert CliRunner().invoke(train, arguments, catch_exceptions=False).exit_code == 0
    assert zoo.load(tmp_path / "model").time_scale == (1_600_000_000, 1_600_000_800)
    raw = zoo.validate(tmp_path / "model", interactions).metrics
    assert raw == zoo.validate(tmp_path / "model", interactions, scale_time=True).metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--batch-size", "0"], "--batch-size"),
        (["--max-length", "0"], "--max-length"),
        (["--core", "-1"], "--core"),
        (["--lr", "nan"], "nan is no rate"),
        (["--lr", "inf"], "inf is no rate"),
        (["--set", "n_items=5"], "--set n_items: it follows from the data"),
        (["--set", "layers"], "expected NAME=VALUE"),
        (["--seed", str(2**64)], "--seed"),
    ],
)
def test_options_are_refused_before_anything_is_read(arguments, message, tmp_path):
    result = CliRunner().invoke(train, ["mamba4rec", "none.csv", "--out", str(tmp_path / "run"), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_training(interactions, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/run"):
        result = CliRunner().invoke(train, ["mamba4rec", str(interactions), "--out", str(tmp_path / out), *SMALL])
        assert result.exit_code == 2, out
        assert "is a file" in result.output


def test_models_that_recommend_nothing(interactions, tmp_path):
    result = CliRunner().invoke(train, ["mamba2_micro", str(interactions), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "mamba2_micro is for text-generation" in result.output


def test_json_is_json(run, tmp_path):
    folder, _ = run
    out = tmp_path / "new" / "all.parquet"
    result = CliRunner().invoke(recommend, [str(folder), "--all", "-k", "3", "--out", str(out), "--json"])
    assert json.loads(result.stdout) == {"rows": 108, "file": str(out)}
    assert CliRunner().invoke(recommend, [str(folder), "--user", "u1", "-k", "0"]).exit_code == 2


@pytest.mark.parametrize(
    ("file", "content"),
    [("items.json", "{"), ("items.json", "[]"), ("users.sqlite", "x" * 5000), ("model/config.json", "{")],
)
def test_a_damaged_folder(run, tmp_path, file, content):
    folder = tmp_path / "copy"
    shutil.copytree(run[0], folder)
    (folder / file).write_text(content)
    with pytest.raises(zoo.errors.BadFile):
        artifact.load(folder)
