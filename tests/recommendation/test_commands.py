"""`zoo train` and `zoo recommend`, as a user types them."""

import json

import pytest
from click.testing import CliRunner

from zoo_recommendation.commands import recommend, train


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
    ],
)
def test_whom(arguments, message):
    result = CliRunner().invoke(recommend, arguments)
    assert result.exit_code != 0
    assert message in result.output


def test_a_folder_that_is_no_recommender(tmp_path):
    result = CliRunner().invoke(recommend, [str(tmp_path), "--user", "a"])
    assert isinstance(result.exception, FileNotFoundError)
    assert "zoo train mamba4rec_ml1m" in str(result.exception)
