"""Trajectory files: every format gives the same table; what is wrong with a file is said."""

import numpy as np
import pytest

from zoo_registry import errors
from zoo_rl import trajectories
from zoo_rl.trajectories import from_arrays, read

STEPS, EPISODE = 12, 4


def arrays(continuous=True):
    rng = np.random.default_rng(0)
    ends = np.zeros(STEPS, bool)
    ends[EPISODE - 1 :: EPISODE] = True
    return {
        "observations": rng.standard_normal((STEPS, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (STEPS, 2)).astype(np.float32) if continuous else rng.integers(0, 3, STEPS),
        "rewards": rng.standard_normal(STEPS).astype(np.float32),
        "terminals": ends,
    }


def same(found, continuous=True):
    wanted = arrays(continuous)
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(found, name), wanted[name])
    assert [(e.start, e.stop) for e in found.episodes] == [(0, 4), (4, 8), (8, 12)]
    assert found.discrete != continuous


@pytest.mark.parametrize("continuous", [True, False])
def test_npz(tmp_path, continuous):
    np.savez(tmp_path / "a.npz", **arrays(continuous))
    same(read(tmp_path / "a.npz"), continuous)


@pytest.mark.parametrize("names", [("obs", "action", "reward", "dones"), ("states", "actions", "rewards", "done")])
def test_other_names(names):
    same(from_arrays(dict(zip(names, arrays().values(), strict=True))))


def test_episodes_on_an_axis_of_their_own():
    whole = {k: v.reshape(3, EPISODE, *v.shape[1:]) for k, v in arrays().items()}
    same(from_arrays(whole))
    cut = from_arrays({**whole, "lengths": np.array([4, 2, 3])})
    assert [(e.start, e.stop) for e in cut.episodes] == [(0, 4), (4, 6), (6, 9)]
    np.testing.assert_array_equal(cut.observations[4:6], arrays()["observations"][4:6])
    with pytest.raises(ValueError, match="expected 3 numbers from 1 to 4"):
        from_arrays({**whole, "lengths": np.array([4, 2, 5])})


def test_hdf5_as_d4rl_writes_it(tmp_path):
    h5py = pytest.importorskip("h5py")
    parts = arrays()
    timeouts = parts["terminals"].copy()
    timeouts[3] = False
    parts["terminals"][7:] = False  # the first episode ends by itself, the others by time
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, value in {**parts, "timeouts": timeouts}.items():
            file[name] = value
        file["infos/qpos"] = np.zeros(3)
    same(read(tmp_path / "a.hdf5"))


def test_parquet_with_lists_or_numbered_columns(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parts = arrays()
    lists = {k: list(v) for k, v in parts.items()}
    parquet.write_table(pa.table(lists), tmp_path / "lists.parquet")
    same(read(tmp_path / "lists.parquet"))
    numbered = {f"observations_{i}": parts["observations"][:, i] for i in range(3)}
    numbered |= {f"actions_{i}": parts["actions"][:, i] for i in range(2)}
    numbered |= {"reward": parts["rewards"], "episode": np.repeat([7, 8, 9], EPISODE)}
    parquet.write_table(pa.table(numbered), tmp_path / "numbered.parquet")
    same(read(tmp_path / "numbered.parquet"))


def test_returns():
    data = from_arrays({**arrays(), "rewards": np.arange(12.0)})
    assert data.returns().tolist() == [6, 22, 38]
    assert data.returns_to_go()[:5].tolist() == [6, 6, 5, 3, 22]
    assert data.first.tolist() == [True, False, False, False] * 3
    without = {k: v for k, v in arrays().items() if k != "rewards"}
    with pytest.raises(ValueError, match="no rewards"):
        from_arrays(without).returns()
    alone = {k: without[k] for k in ("observations", "actions")}
    assert len(from_arrays(alone).episodes) == 1  # nothing says where an episode ends


def broken(**changes):
    parts = arrays()
    for name, value in changes.items():
        parts[name] = value
    return parts


def nan_at(name, row):
    values = arrays()[name].copy()
    values[row] = np.nan
    return values


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"observations": np.zeros((3, 2))}, "no field 'actions' or 'action'; found \\['observations'\\]"),
        ({"actions": np.zeros(3)}, "no field 'observations'"),
        (broken(observations=nan_at("observations", 7)), r"observations of step 7 are not finite \(1 such steps\)"),
        (broken(actions=nan_at("actions", 2)), "actions of step 2 are not finite"),
        (broken(rewards=nan_at("rewards", 0)), "rewards of step 0 are not finite"),
        (broken(actions=np.zeros((11, 2))), "11 actions for 12 observations"),
        (broken(terminals=np.zeros(3)), "3 terminals for 12 observations"),
        (broken(observations=np.zeros((0, 3))), "not empty"),
        (broken(observations=np.array([["a"]] * 12)), "expected numbers"),
    ],
)
def test_what_is_wrong_is_said(parts, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(parts)


def test_what_does_not_fit_a_model():
    data = from_arrays(arrays())
    data.fit((3,), 2, discrete=False, limit=1.0)
    with pytest.raises(ValueError, match="observations have 3 numbers; the model takes 9 or 4"):
        data.fit((9, 4), 2, discrete=False)
    with pytest.raises(ValueError, match="actions are floats; the model's are one integer a step"):
        data.fit((3,), 2, discrete=True)
    with pytest.raises(ValueError, match="actions have 2 numbers; the model has 6"):
        data.fit((3,), 6, discrete=False)
    wide = from_arrays(broken(actions=arrays()["actions"] * 3))
    with pytest.raises(ValueError, match=r"the action of step \d+ is .* expected numbers from -1 to 1"):
        wide.fit((3,), 2, discrete=False, limit=1.0)
    with pytest.raises(ValueError, match=r"expected 0 to 1 \(\d such steps\)"):
        from_arrays(arrays(False)).fit((3,), 2, discrete=True)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read(tmp_path / "absent.npz")
    for name, message in (("a.npz", "is no .npz or .npy file"), ("a.csv", "expected .npz, .hdf5, .h5, .parquet")):
        (tmp_path / name).write_text("nothing")
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)
    np.savez(tmp_path / "pickled.npz", observations=np.array([{}], dtype=object), actions=np.zeros(1))
    with pytest.raises(ValueError, match="plain arrays"):  # a pickle is never opened
        read(tmp_path / "pickled.npz")
    for module, name in (("h5py", "a.hdf5"), ("pyarrow", "a.parquet")):
        pytest.importorskip(module)
        (tmp_path / name).write_text("nothing")
        with pytest.raises(ValueError, match="not a"):
            read(tmp_path / name)


def test_a_missing_reader_is_named(tmp_path, monkeypatch):
    def missing(module, what, requirement):
        raise errors.MissingExtra(f"{what} needs {module}: pip install {requirement!r}", extra=requirement, command="")

    monkeypatch.setattr(trajectories, "optional", missing)
    for name in ("a.hdf5", "a.parquet"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(errors.MissingExtra, match="ssm-zoo-rl"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (np.array([0, 0, np.nan, 1] * 3), "terminals of step 2 are not finite"),
        (np.array(["False"] * STEPS), "terminals are of type"),
    ],
)
def test_flags_that_are_none(flags, match):
    """Not a number counts as true, and so does any text: an episode would end there unseen."""
    with pytest.raises(ValueError, match=match):
        from_arrays({**arrays(), "terminals": flags})


def test_episodes_that_end_within_a_row():
    whole = {k: v.reshape(2, 6, *v.shape[1:]) for k, v in arrays().items()}
    assert [(e.start, e.stop) for e in from_arrays(whole).episodes] == [(0, 4), (4, 6), (6, 8), (8, 12)]
    cut = from_arrays({**whole, "lengths": np.array([5, 6])})
    assert [(e.start, e.stop) for e in cut.episodes] == [(0, 4), (4, 5), (5, 7), (7, 11)]


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"episode": [1] * 4 + [2] * 4 + [1] * 4}, "do not follow one another"),
        ({"episode": [1] * 4 + [None] * 4 + [2] * 4}, "without a number of their episode"),
        ({"observations_1": [0.0] * 12, "observations_3": [0.0] * 12}, r"only the numbers \[1, 3\]"),
        ({"observations": [[0.0]] * 11 + [[0.0, 1.0]]}, "lists of different lengths"),
        ({"observations": [[0.0]] * 11 + [None]}, "no list in some places"),
    ],
)
def test_parquet_tables_that_do_not_say_enough(tmp_path, columns, match):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    own = {"observations": [[float(i), 1.0] for i in range(12)], "actions": [0] * 12}
    own = {k: v for k, v in own.items() if not any(c.startswith(k) for c in columns)}
    parquet.write_table(pa.table({**own, **columns}), tmp_path / "t.parquet")
    with pytest.raises(errors.BadFile, match=match):
        read(tmp_path / "t.parquet")
