"""The toy plugin of ``site/``: registered in this process while a test runs, installed (as files) for subprocesses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SITE = HERE / "site"
for folder in (SITE, HERE.parent / "registry"):  # the toy plugin; the Hub server on loopback and its clients
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

WEIGHTS = SITE / "zoo_toys" / "demo" / "toy.safetensors"


@pytest.fixture(scope="session", autouse=True)
def packed_weights():
    """The checkpoint that the toy plugin ships: written once, so that no binary file lies in the repository."""
    from toy_weights import toy

    from zoo.checkpoints import write_safetensors

    state = {k: v for k, v in toy().state_dict().items() if k != "down.weight"}
    temporary = WEIGHTS.with_name(f"{os.getpid()}.tmp")
    write_safetensors(state, temporary)
    os.replace(temporary, WEIGHTS)
    return WEIGHTS


@pytest.fixture
def toys():
    """The toy plugin in this process; yields its module."""
    import zoo_toys

    from zoo_registry import manager

    manager().register(zoo_toys, name="toys")
    yield zoo_toys
    manager().unregister(zoo_toys)


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> dict[str, str]:
    """Environment variables of a subprocess that has the toy plugin installed, and no other."""
    site = tmp_path_factory.mktemp("site")
    info = site / "zoo_toys-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo-toys\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[zoo.plugins]\ntoys = zoo_toys\n")
    path = os.pathsep.join([str(site), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "ZOO_PLUGINS": "toys", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The zoo's derived files of this test go to a folder of their own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def cli(toys, capsys, cache, monkeypatch, tmp_path):
    """Run words; (exit code, stdout, stderr)."""
    from zoo.cli import run

    monkeypatch.chdir(tmp_path)

    def go(*words):
        capsys.readouterr()
        code = run(list(words))
        out, err = capsys.readouterr()
        return code, out, err

    return go
