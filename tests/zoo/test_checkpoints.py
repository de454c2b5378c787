"""What is inside files: read safely, or refused by name."""

import argparse
import collections
import os
import pathlib
import pickle
import sys
import types

import msgspec
import numpy as np
import pytest
import torch

from zoo import checkpoints, errors

STATE = collections.OrderedDict(a=torch.arange(3.0), b=torch.ones(2, dtype=torch.bfloat16))


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def write(path, content, *, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_what_published_files_hold(tmp_path, zipped):
    content = {
        "model": STATE,
        "args": argparse.Namespace(lr=1, out=pathlib.Path("runs")),
        "best": np.float64(0.5),
        "curve": np.arange(3),
        "optimizer": {"state": {0: torch.zeros(1)}},
        "epoch": 3,
        "history": collections.defaultdict(list, a=[1]),
    }
    found = checkpoints.read_foreign(write(tmp_path / "a.pth", content, zipped=zipped))
    assert found.keys() == STATE.keys()
    assert torch.equal(found["a"], STATE["a"])
    assert found["b"].dtype == torch.bfloat16


def test_dictionaries_of_frameworks_that_are_not_installed(tmp_path, monkeypatch):
    module = types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config", "__qualname__": "CfgNode"})
    module.CfgNode = node
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        path = write(tmp_path / "y.pth", {"state_dict": STATE, "config": node(a=node(b=1))})
    assert checkpoints.read_foreign(path).keys() == STATE.keys()


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_pickle_that_wants_to_run_code(tmp_path, kind):
    mark = tmp_path / "owned"
    path = tmp_path / "evil.pth"
    if kind == "plain":
        path.write_bytes(pickle.dumps({"model": STATE, "x": Evil(mark)}))
    else:
        write(path, {"model": STATE, "x": Evil(mark)}, zipped=kind == "zip")
    with pytest.raises(errors.UnsafeFile, match=r"posix\.system|nt\.system") as caught:
        checkpoints.read_foreign(path)
    assert "was not opened" in str(caught.value)
    assert any("system" in name for name in caught.value.objects)
    assert not mark.exists()


@pytest.mark.parametrize(
    "target",
    [
        eval,
        exec,
        __import__,
        getattr,
        os.popen,
        np.fromfile,
        np.load,
        torch.load,
        pickle.loads,
        argparse.ArgumentParser,
    ],
    ids=lambda f: f"{f.__module__}.{f.__name__}",
)
def test_callables_that_are_not_data(tmp_path, target):
    class Call:
        def __reduce__(self):
            return target, ("1",)

    with pytest.raises(errors.UnsafeFile):
        checkpoints.read_foreign(write(tmp_path / "e.pth", {"model": STATE, "x": Call()}))


def test_allowed_globals_do_nothing():
    for entry in checkpoints.allowed_globals():
        name = entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"
        assert name.partition(".")[0] in {
            *("argparse", "collections", "builtins", "pathlib", "numpy", "yacs", "omegaconf", "mmengine", "mmcv"),
            *("timm", "easydict", "addict", "typing", "src"),
        }
        if name.startswith(("typing.", "src.")):
            assert issubclass(entry[0], checkpoints._Inert), "a name without its code"
        assert name not in ("builtins.eval", "builtins.exec", "builtins.getattr", "builtins.open")


def test_subkeys(tmp_path):
    path = write(tmp_path / "m.pth", {"model": STATE, "model_ema": STATE, "net": {"inner": STATE}})
    assert checkpoints.read_foreign(path, subkey="net.inner").keys() == STATE.keys()
    assert checkpoints.read_foreign(path, subkey="model_ema").keys() == STATE.keys()
    with pytest.raises(errors.BadCheckpoint, match="has no 'ema'"):
        checkpoints.read_foreign(path, subkey="ema")
    ambiguous = write(tmp_path / "two.pth", {"model": STATE, "state_dict": STATE})
    with pytest.raises(errors.BadCheckpoint, match="choose one with subkey="):
        checkpoints.read_foreign(ambiguous)
    with pytest.raises(errors.BadCheckpoint, match="no state dict itself; found epoch"):
        checkpoints.read_foreign(write(tmp_path / "none.pth", {"epoch": 1}))


def test_data_parallel_prefix(tmp_path):
    path = write(tmp_path / "p.pth", {f"module.{k}": v for k, v in STATE.items()})
    assert checkpoints.read_foreign(path).keys() == STATE.keys()
    mixed = write(tmp_path / "q.pth", {"module.a": STATE["a"], "b": STATE["b"]})
    assert set(checkpoints.read_foreign(mixed)) == {"module.a", "b"}


@pytest.mark.parametrize("size", [0, 1, 10, 300, 900])
@pytest.mark.parametrize("name", ["t.pth", "t.safetensors"])
def test_cut_short(tmp_path, size, name):
    whole = tmp_path / f"whole-{name}"
    if name.endswith(".pth"):
        write(whole, STATE)
    else:
        checkpoints.write_safetensors({"a": torch.arange(300.0)}, whole)
    cut = tmp_path / name
    cut.write_bytes(whole.read_bytes()[:size])
    with pytest.raises((errors.BadCheckpoint, errors.UnsafeFile)):
        checkpoints.read_foreign(cut)


def test_numpy_and_flax(tmp_path):
    np.savez(tmp_path / "n.npz", **{"x/kernel": np.ones((2, 3), np.float32)})
    assert checkpoints.read_foreign(tmp_path / "n.npz")["x/kernel"].shape == (2, 3)
    np.savez(tmp_path / "o.npz", x=np.array([{}], dtype=object))
    with pytest.raises(errors.BadCheckpoint, match="numpy"):
        checkpoints.read_foreign(tmp_path / "o.npz")

    def array(x):
        return msgspec.msgpack.Ext(1, msgspec.msgpack.encode((x.shape, str(x.dtype), x.tobytes())))

    tree = {"params": {"dense": {"kernel": array(np.arange(6, dtype=np.float32).reshape(2, 3))}}}
    (tmp_path / "f.msgpack").write_bytes(msgspec.msgpack.encode(tree))
    found = checkpoints.read_foreign(tmp_path / "f.msgpack")
    assert torch.equal(found["params/dense/kernel"], torch.arange(6.0).reshape(2, 3))


def test_safetensors_both_ways(tmp_path):
    shared = torch.randn(4, 4)
    state = {"a": shared, "b": shared.t(), "c": torch.randn(3, dtype=torch.complex64).conj(), "e": torch.zeros(0)}
    checkpoints.write_safetensors(state, tmp_path / "s.safetensors", meta={"x": "y"})
    found = checkpoints.read_safetensors([tmp_path / "s.safetensors"])
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k].resolve_conj()) for k in state)
    assert checkpoints.metadata(tmp_path / "s.safetensors") == {"format": "pt", "x": "y"}
    assert checkpoints.is_safetensors(tmp_path / "s.safetensors")
    assert checkpoints.sniff(tmp_path / "s.safetensors") == "safetensors"


@pytest.mark.parametrize(
    "content",
    [b"\x89PNG\r\n\x1a\n" + bytes(40), b"hello world", b"", b"PK\3\4" + bytes(40), b"{}", b"<html></html>"],
    ids=["png", "text", "empty", "zip", "json", "html"],
)
def test_other_files_are_no_checkpoints_and_nobody_is_told_to_unpickle_them(content, tmp_path):
    path = tmp_path / "given.pth"
    path.write_bytes(content)
    with pytest.raises(errors.BadCheckpoint, match=r"given\.pth") as caught:
        checkpoints.read_foreign(path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_newer_pickles_are_named_without_a_warning(tmp_path):
    path = tmp_path / "given.pth"
    torch.save({"a": torch.ones(2)}, path, pickle_protocol=4)
    with pytest.raises(errors.BadCheckpoint, match="another protocol than 2"):
        checkpoints.read_foreign(path)
