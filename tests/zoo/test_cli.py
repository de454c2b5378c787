"""The command line, as a user types: in this process for speed, in real processes where that is the point."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_weights import original, toy

import zoo
from zoo.cli import COMMANDS
from zoo_registry import manager

SAMPLE = Path(__file__).parent / "site" / "zoo_toys" / "demo" / "one.txt"


def test_help(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert "toys" in out
    assert cli()[0] == 0
    for name in COMMANDS:
        code, out, _ = cli(name, "--help")
        assert code == 0, name
        assert "--json" in out, name


def test_version(cli):
    assert cli("--version")[1].strip().endswith(zoo.__version__)


def test_list(cli):
    code, out, _ = cli("list", "toy*")
    assert code == 0
    assert out.split() == [
        "toy_large",
        "toy_small.elsewhere",
        "toy_small.original",
        "toy_small.packed",
        "toy_small.small",
        "toy_small.wide",
    ]
    loadable = cli("list", "toy*", "--pretrained")[1].split()
    assert loadable == ["toy_small.original", "toy_small.packed", "toy_small.small", "toy_small.wide"]
    assert cli("list", "--domain", "toys", "--exclude", "*large")[1].count("\n") == 5
    assert cli("list", "toy*", "--max-params", "1k")[1].split()[0] == "toy_small.elsewhere"
    long = cli("list", "toy*", "--long")[1]
    assert "hf-hub:toys/original" in long
    assert "0.3 k" in long
    found = json.loads(cli("list", "toy_small.packed", "--json")[1])
    assert found[0]["weights"]["licence"] == "mit"
    code, out, err = cli("list", "nothing*")
    assert (code, out) == (0, "")
    assert "nothing matches" in err


def test_list_mistakes(cli):
    assert cli("list", "--domain", "toyz")[0] == 2
    code, _, err = cli("list", "--min-params", "many")
    assert code == 2
    assert "500k, 10M or 1.5G" in err


def test_info(cli):
    out = cli("info", "toy_small")[1]
    for words in ("toy_small.packed", "packed (default), small, original, wide, elsewhere", "accuracy 0.5", "mit"):
        assert words in out
    assert json.loads(cli("info", "toy_small", "--json")[1])["loadable"] is True


def test_errors_are_sentences_with_exit_codes(cli):
    code, out, err = cli("info", "toy_smal")
    assert (code, out) == (2, "")
    assert err.startswith("error: no model 'toy_smal'")
    assert "Traceback" not in err
    code, out, _ = cli("info", "toy_smal", "--json")
    assert json.loads(out) == {"error": "UnknownModel", "message": json.loads(out)["message"], "exit_code": 2}
    assert cli("load", "toy_small.elsewhere")[0] == 3
    assert cli("load", "toy_small.original", "--offline")[0] == 4
    code, _, err = cli("lsit")
    assert code == 2
    assert "did you mean list?" in err
    code, _, err = cli("list", "--nonsense")
    assert code == 2
    assert "zoo list --help" in err


def test_a_sentence_about_the_input_stands_alone(cli, monkeypatch):
    """What a plugin raises itself is a sentence for the user; what comes from below it shows where to look."""
    import zoo.catalog

    def raising(module, code):
        places = {"__name__": module, "torch": torch}
        exec(f"def info(name):\n    {code}", places)
        monkeypatch.setattr(zoo.catalog, "info", places["info"])

    raising("zoo_toys.pipelines", "raise ValueError('the picture has 2 axes; expected 3')")
    assert cli("info", "toy_small")[::2] == (1, "error: the picture has 2 axes; expected 3\n")
    found = json.loads(cli("info", "toy_small", "--json")[1])
    assert found == {"error": "ValueError", "message": "the picture has 2 axes; expected 3", "exit_code": 1}
    for module, code in (
        ("zoo_toys.pipelines", "torch.ones(2).numpy().reshape(3)"),  # numpy's sentence
        ("zoo_kernels.ops", "raise ValueError('u has shape (2,)')"),
        ("zoo_toys.pipelines", "raise ValueError"),
        ("elsewhere", "raise ValueError('x')"),
    ):
        raising(module, code)
        code, _, err = cli("info", "toy_small")
        assert code == 1
        assert "zoo --debug" in err


def test_unexpected_errors(cli, monkeypatch):
    import zoo.catalog

    def broken(name):
        raise RuntimeError("a bug")

    monkeypatch.setattr(zoo.catalog, "info", broken)
    code, _, err = cli("info", "toy_small")
    assert code == 1
    assert "RuntimeError: a bug" in err
    assert "zoo --debug" in err
    with pytest.raises(RuntimeError):
        cli("--debug", "info", "toy_small")

    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo.catalog, "info", interrupted)
    assert cli("info", "toy_small")[0] == 130


def test_errors_of_the_system_name_the_place(cli, monkeypatch, tmp_path):
    import zoo.catalog

    def refuse(error):
        def info(name):
            raise error

        monkeypatch.setattr(zoo.catalog, "info", info)
        return cli("info", "toy_small")

    assert refuse(PermissionError(13, "Permission denied", "out.csv"))[::2] == (
        7,
        "error: out.csv: Permission denied\n",
    )
    assert refuse(FileNotFoundError(2, "No such file or directory", "x"))[0] == 3
    assert refuse(FileNotFoundError("there is no x"))[::2] == (3, "error: there is no x\n")
    # an empty file's EOFError is no Ctrl-D, which click takes it for
    code, _, err = refuse(EOFError("No data left in file"))
    assert (code, err.strip()) == (1, "error: EOFError: No data left in file")


def test_predict(cli, tmp_path):
    code, out, err = cli("predict", "toy_small", str(SAMPLE), "--device", "cpu")
    assert code == 0
    assert out.startswith(f"{SAMPLE}: ")
    assert "--pictures FOLDER" in err
    found = json.loads(cli("predict", "toy_small", str(SAMPLE), "--json", "-o", "upper=true")[1])
    assert found[0]["label"].isupper()
    out = cli("predict", "toy_small", str(SAMPLE), "--pictures", "pics")[1]
    assert (tmp_path / "pics" / "000_one.png").exists()
    assert "000_one.png" in out
    assert "class" in cli("predict", "toy_small", str(SAMPLE), "--set", "num_classes=2")[1]


def test_json_has_no_numbers_that_json_does_not_have(capsys):
    from zoo.cli import output

    output.emit({"a": [math.nan, 1.5, (math.inf, "NaN")], "b": True})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": [None, 1.5, [None, "NaN"]],
        "b": True,
    }


def test_predict_mistakes(cli, tmp_path):
    (tmp_path / "bad.txt").write_text("x")
    code, _, err = cli("predict", "toy_small", "bad.txt")
    assert code == 1
    assert "bad.txt" in err
    code, out, _ = cli("predict", "toy_small", "bad.txt", str(SAMPLE), "--keep-going")
    assert code == 1
    assert out.count("\n") == 2
    code, out, _ = cli("predict", "toy_small", str(SAMPLE), "bad.txt")
    assert (code, out.startswith(f"{SAMPLE}: ")) == (1, True)  # what was answered before is shown
    code, out, err = cli("predict", "toy_small", str(SAMPLE), "--pictures", "bad.txt/pictures")
    assert (code, out) == (3, "")
    assert "bad.txt is a file" in err
    assert cli("predict", "toy_small", "missing.txt")[0] == 3
    assert cli("predict", "toy_small", str(SAMPLE), "--set", "num_classes")[0] == 2
    assert cli("predict", "toy_small", str(SAMPLE), "--dtype", "float31")[0] == 2
    assert cli("predict", "toy_small")[0] == 2
    assert cli("predict", "toy_small", "")[0] == 3  # not the working directory
    for words, message in (
        (("--device", "banana"), "device is 'banana'"),
        (("--dtype", "int64"), "--dtype is 'int64'"),
        (("-o", "upper=maybe"), "upper is 'maybe'; expected bool"),
        (("--set", "num_classes=many"), "num_classes is 'many'; expected int"),
    ):
        code, _, err = cli("predict", "toy_small", str(SAMPLE), *words)
        assert code == 2
        assert message in err


def test_demo(cli):
    code, out, _ = cli("demo", "--domain", "toys")
    assert code == 0
    assert "toy_small.packed" in out
    assert "one.txt" in out
    row = json.loads(cli("demo", "--domain", "toys", "--json")[1])[0]
    assert row["answer"] in ("ant", "bee", "cat", "dog")
    assert row["milliseconds"] > 0
    assert cli("demo", "--domain", "none")[0] == 6


def test_one_broken_demo_does_not_stop_the_others(cli, monkeypatch):
    plugin, entry = next((p, d) for p, d in manager().demos() if p.name == "toys")
    demos = [(plugin, {"model": "toy_small.packed", "file": "demo/absent.txt"}), (plugin, entry)]
    monkeypatch.setattr(type(manager()), "demos", lambda self: demos)
    code, out, _ = cli("demo", "--json")
    assert code == 1
    rows = json.loads(out)
    assert "LocalFileMissing" in rows[0]["error"]
    assert rows[1]["answer"]


def test_demo_pictures(cli, monkeypatch, tmp_path):
    plugin, entry = next((p, d) for p, d in manager().demos() if p.name == "toys")
    monkeypatch.setattr(type(manager()), "demos", lambda self: [(plugin, {**entry, "picture": "yes"})])
    out = cli("demo", "--out", "here")[1]
    assert "picture: here" in out
    assert (tmp_path / "here" / "toy_small_packed_one.png").exists()


def test_load(cli):
    assert "subkey is 'model' and checkpoint was not given" in cli("load", "toy_small", "--subkey", "model")[2]
    out = cli("load", "toy_small", "--set", "num_classes=2")[1]
    assert "toy_small.packed" in out
    assert "initialised anew" in out
    assert json.loads(cli("load", "toy_small", "--json", "--dtype", "bfloat16")[1])["dtype"] == "bfloat16"


def test_download(cli, tmp_path):
    assert cli("download", "toy_small.packed", "--to", "carry")[0] == 0
    assert (tmp_path / "carry" / "toy.safetensors").exists()
    assert "toy_small.packed" in cli("load", "./carry")[1]
    assert json.loads(cli("download", "toy_small.packed", "--json")[1])[0]["bytes"] > 0
    assert cli("download", "nothing*")[0] == 2


def test_convert(cli, tmp_path):
    torch.save(original(toy()), tmp_path / "o.pth")
    assert cli("convert", "o.pth", "ours", "--model", "toy_small")[0] == 0
    assert cli("load", "./ours")[0] == 0
    assert cli("convert", "./ours", "back.pth", "--to", "reference")[1].strip() == "back.pth"
    assert set(torch.load(tmp_path / "back.pth", weights_only=True)) == set(original(toy())) - {"counter"}
    assert cli("convert", "o.pth", "one.safetensors", "--model", "toy_small")[0] == 0  # one file where one is asked for
    assert (tmp_path / "one.safetensors").is_file()
    assert cli("load", "./one.safetensors")[0] == 0
    assert cli("convert", "toy_small.packed", "named")[0] == 0
    assert cli("load", "./named")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    for arguments, expected, words in (
        (("nothing.pth", "x"), 3, "there is no file nothing.pth"),
        (("./ours", "back.xyz", "--to", "reference"), 2, "ends in .safetensors"),
        (("./ours", "o.pth/y.pth", "--to", "reference"), 3, "o.pth is a file"),
        (("o.pth", "x", "--system", "toy", "--config", "o.pth"), 5, "no text in UTF-8"),
    ):
        code, _, err = cli("convert", *arguments)
        assert words in err
        assert code == expected
    (tmp_path / "c.json").write_text("[8, 4]")
    assert "holds a list" in cli("convert", "o.pth", "x", "--system", "toy", "--config", "c.json")[2]
    (tmp_path / "c.json").write_text('{"dim": 8, "classes": 4}')
    code, out, _ = cli("convert", "o.pth", "z.safetensors", "--system", "toy", "--config", "c.json", "--json")
    assert (code, json.loads(out)) == (0, {"written": "z.safetensors"})
    assert cli("convert", "o.pth", "x")[0] == 2


def test_bench(cli):
    if not torch.cuda.is_available():
        code, _, err = cli("bench", "toy_small", "--device", "cuda")
        assert code == 2
        assert "cannot compute on" in err
    found = json.loads(cli("bench", "toy_small", "--repeats", "2", "--batch-size", "3", "--json", "--device", "cpu")[1])
    assert found["parameters"] == 340
    assert found["median_ms"] > 0
    assert found["samples_per_s"] == pytest.approx(3000 / found["median_ms"], rel=0.01)
    assert found["peak_memory_bytes"] is None or found["peak_memory_bytes"] > 1e6
    assert "forward and backward" in cli("bench", "toy_small", "--repeats", "1", "--train", "--device", "cpu")[1]


def test_bench_does_not_time_wrong_results(cli, monkeypatch):
    from zoo.cli import bench

    monkeypatch.setattr(bench, "_compare", lambda *a: 0.5)
    code, _, err = cli("bench", "toy_small", "--device", "cpu")
    assert code == 5
    assert "not timed" in err


def test_doctor(cli):
    code, out, _ = cli("doctor")
    assert "selective_scan" in out
    assert "toys" in out
    found = json.loads(cli("doctor", "--json")[1])
    assert found["versions"]["torch"]
    assert "reference" in found["kernels"]["operators"]["selective_scan"]
    assert code == (1 if found["plugins"]["broken"] else 0)


def test_plugins(cli):
    assert "toys" in cli("plugins")[1]
    found = json.loads(cli("plugins", "--json")[1])
    own = next(p for p in found["loaded"] if p["name"] == "toys")
    assert own["models"] == ["toy_small", "toy_large"]
    assert own["tasks"] == ["toy-counting"]
    assert own["systems"] == ["toy"]
    from zoo.cli.plugins import _systems

    toys = next(p for p in manager().plugins if p.name == "toys")
    assert _systems(dataclasses.replace(toys, adapters={})) == ["toy"]  # its models are still of a system


def test_verbs_of_plugins(cli):
    assert cli("toys")[1] == "toys!\n"


def test_cache(cli, tmp_path):
    assert "no checkpoint" in cli("cache")[1]
    torch.save(original(toy()), tmp_path / "o.pth")
    cli("load", "toy_small", "--checkpoint", "o.pth")
    assert "o.pth" in cli("cache")[1]
    assert json.loads(cli("cache", "--json")[1])["converted_from_own_files"][0]["bytes"] > 0
    assert cli("cache", "verify")[0] == 0
    assert json.loads(cli("cache", "remove", "toy*", "--yes", "--json")[1]) == {"removed": [], "bytes": 0}


def typed(*words, env=None):
    words = [sys.executable, "-m", "zoo.cli", *words]
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=300)


def test_real_processes(installed):
    import os

    env = {**os.environ, **installed}
    done = typed("list", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[0] == "toy_large"
    assert typed("info", "nothing", env=env).returncode == 2
    done = typed("predict", "toy_small", str(SAMPLE), env=env)
    assert done.returncode == 0, done.stderr
    assert "one.txt: " in done.stdout


def test_output_into_a_closed_pipe(installed):
    import os

    script = f"{sys.executable} -m zoo.cli list | head -n 1"
    done = subprocess.run(script, shell=True, capture_output=True, text=True, env={**os.environ, **installed})
    assert done.stdout == "toy_large\n"
    assert done.stderr == ""
