"""A third party's first five minutes: write a plugin, build it, install it into an empty environment, use it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zoo
from zoo import errors
from zoo.cli.plugins import FILES, write_skeleton

ROOT = Path(__file__).parents[2]
UV = shutil.which("uv")


def shell(*words, cwd=None, env=None):
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_files(tmp_path):
    folder, *files = write_skeleton("seismology", str(tmp_path / "p"))
    assert folder == tmp_path / "p"
    assert len(files) == len(FILES)
    for file in files:
        text = file.read_text()
        assert "$" not in text, f"{file} has a gap that was not filled"
    assert 'seismology = "zoo_seismology.plugin"' in (folder / "pyproject.toml").read_text()


def test_mistakes(tmp_path, toys):
    with pytest.raises(errors.BadName, match="cannot be a domain"):
        write_skeleton("Sea Creatures", str(tmp_path / "p"))
    with pytest.raises(errors.BadName, match="is taken by"):
        write_skeleton("toys", str(tmp_path / "p"))
    with pytest.raises(errors.BadName, match="cannot be a distribution"):
        write_skeleton("seismology", str(tmp_path / "p"), "my plugin")
    assert not (tmp_path / "p").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(errors.BadArgument, match="not empty"):
        write_skeleton("seismology", str(tmp_path / "full"))


@pytest.mark.slow
@pytest.mark.skipif(UV is None, reason="building wheels needs uv")
def test_build_install_list_and_test(tmp_path):
    """The wheels of the workspace and of the plugin, in an environment of their own. torch and the other libraries come
    from this environment (a path file), so nothing but the build tool is downloaded."""
    folder, *_ = write_skeleton("seismology", str(tmp_path / "zoo-seismology"))
    wheels = tmp_path / "wheels"
    for project in (ROOT / "registry", ROOT / "zoo_core", folder):
        shell(UV, "build", "--quiet", "--wheel", "--out-dir", wheels, project)
    environment = tmp_path / "env"
    shell(UV, "venv", "--quiet", "--python", sys.executable, environment)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    shell(UV, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", python, *wheels.glob("*.whl"))
    site = Path(shell(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    # Only libraries: a .pth line appends a path, but does not run the .pth files there, so this workspace stays out.
    # The kernels come from the checkout: their wheel compiles native code, which .ci/run does.
    (site / "libraries.pth").write_text(f"{ROOT / 'kernels' / 'src'}\n{Path(torch.__file__).parents[1]}\n")

    env = {k: v for k, v in os.environ.items() if not k.startswith("ZOO_") and k != "PYTHONPATH"}
    env |= {"ZOO_PLUGINS": "seismology", "OMP_NUM_THREADS": "1"}
    zoo_command = python.parent / "zoo"
    assert shell(zoo_command, "list", cwd=tmp_path, env=env).split() == ["seismology_labeller"]
    where = shell(python, "-c", "import zoo, zoo_seismology; print(zoo.__file__)", cwd=tmp_path, env=env)
    assert str(environment) in where, "the wheel was installed, not the checkout"
    out = shell(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=folder, env=env)
    assert " passed" in out
    assert "failed" not in out


def test_the_template_is_in_the_wheel():
    folder = Path(zoo.__file__).parent / "cli" / "skeleton"
    assert {f.name for f in folder.iterdir()} == set(FILES)
