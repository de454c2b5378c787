"""Loading from and pushing to a Hub on loopback, through the real huggingface_hub client."""

import io
import json
import subprocess
import sys
import time

import pytest
import torch
from clients import Client, Failed
from hub_server import TOKEN, HubServer
from toy_weights import original, toy

SUM = "float(model.pair.sum())"


def pickled(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return print, ("owned",)


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, installed, tmp_path_factory):
    home = tmp_path_factory.mktemp("hf")
    env = hub.env(home, HF_HUB_ETAG_TIMEOUT="2", HF_HUB_DOWNLOAD_TIMEOUT="2", **installed)
    with Client(env) as process:
        process("import zoo, torch, zoo.loading, zoo.conversion, huggingface_hub, zoo_toys.models")
        process.home = home
        yield process


@pytest.fixture(autouse=True)
def healthy(hub):
    hub.heal()
    yield
    hub.heal()


def expected():
    return pytest.approx(toy().pair.sum().item())


def test_a_published_pickle_is_fetched_and_converted_once(hub, client):
    hub.add("toys/original", {"toy.pth": pickled({"model": original(toy()), "epoch": 1})})
    code = f"import zoo; model = zoo.load('toy_small.original'); result = [{SUM}, model.zoo_info.source]"
    first, source = client(code)
    assert first == expected()
    assert source.startswith("hf-hub:toys/original@")
    made = list(client.home.rglob("derived/toy-*.safetensors"))
    assert len(made) == 1
    assert "models--toys--original" in str(made[0])
    stamp = made[0].stat().st_mtime_ns
    asked = hub.count()
    assert client(code)[0] == expected()
    assert hub.count() == asked, "a second load asks nobody"
    assert [p.stat().st_mtime_ns for p in client.home.rglob("derived/toy-*.safetensors")] == [stamp]


def test_the_original_s_own_configuration_counts_where_the_card_names_it(hub, client, installed, tmp_path):
    wide = toy(width=12, num_classes=5)
    files = {"toy.pth": pickled({"model": original(wide)}), "settings.json": b'{"dim": 12, "classes": 5}'}
    hub.add("toys/wide", files)
    load = "import zoo; model = zoo.load({name!r}{more}); result = [" + SUM + ", model.zoo_info.config]"
    want = [pytest.approx(wide.pair.sum().item()), {"width": 12, "num_classes": 5}]
    assert client(load.format(name="toy_small.wide", more="")) == want
    assert client(load.format(name="toy_small.wide", more=", num_classes=2"))[1] == {"width": 12, "num_classes": 2}

    folder = tmp_path / "carry"
    client(f"import zoo; zoo.download('toy_small.wide', {str(folder)!r})")
    assert sorted(p.name for p in folder.iterdir()) == ["settings.json", "toy.pth", "zoo-download.json"]
    saved = tmp_path / "saved"
    client(f"import zoo; zoo.save(zoo.load('toy_small.wide'), {str(saved)!r})")
    with Client(hub.env(tmp_path / "other-home", HF_HUB_OFFLINE="1", **installed)) as other:
        assert other(load.format(name=str(folder), more="")) == want
        assert other(load.format(name=str(saved), more="")) == want
        (folder / "settings.json").unlink()
        with pytest.raises(Failed) as caught:
            other(f"import zoo; zoo.load({str(folder)!r})")
    assert caught.value.error == "LocalFileMissing"
    assert "settings.json" in caught.value.message

    hub.add("toys/wide", {**files, "settings.json": b'{"width": 12}'})
    with pytest.raises(Failed) as caught:
        client("import zoo; zoo.load('toy_small.wide', force_download=True)")
    assert caught.value.error == "BadCheckpoint"
    assert "settings.json" in caught.value.message
    assert "'dim'" in caught.value.message


def test_a_published_pickle_with_code_is_refused(hub, client, tmp_path):
    hub.add("toys/original", {"toy.pth": pickled({"model": original(toy()), "x": Evil()})})
    with pytest.raises(Failed) as caught:
        client(f"import zoo; zoo.load('toy_small.original', cache_dir={str(tmp_path)!r})")
    assert caught.value.error == "UnsafeFile"
    assert "print" in caught.value.message
    assert not list(tmp_path.rglob("derived/*.safetensors"))


def test_download_then_load_elsewhere(hub, client, installed, tmp_path):
    hub.add("toys/original", {"toy.pth": pickled({"model": original(toy())})})
    folder = tmp_path / "carry"
    client(f"import zoo; zoo.download('toy_small.original', {str(folder)!r}, cache_dir={str(tmp_path / 'c')!r})")
    assert sorted(p.name for p in folder.iterdir()) == ["toy.pth", "zoo-download.json"]
    offline = hub.env(tmp_path / "other-home", HF_HUB_OFFLINE="1", **installed)
    with Client(offline) as other:
        found = other(f"import zoo; model = zoo.load({str(folder)!r}); result = [{SUM}, model.zoo_info.name]")
    assert found == [expected(), "toy_small.original"]


PUSH = """
import zoo
model = zoo.load('toy_small')
result = zoo.push(model, 'me/toy.mine', token={token!r}, licence='mit', labels=['a', 'b', 'c', 'd'])
"""


def test_push_and_load_back(hub, client):
    name = client(PUSH.format(token=TOKEN))
    files = hub.files("me/toy.mine")
    assert {"README.md", "config.json", "model.safetensors"} <= set(files)
    assert not any(f.endswith((".bin", ".pth", ".pkl")) for f in files)
    assert "hf-hub:me/toy.mine" in files["README.md"].decode()
    assert "ORGANISATION/REPOSITORY" not in files["README.md"].decode()
    assert json.loads(files["config.json"])["labels"] == ["a", "b", "c", "d"]
    assert name.startswith("hf-hub:me/toy.mine@")
    assert client(f"import zoo; model = zoo.load({name!r}); result = {SUM}") == expected()
    assert client(f"import zoo; model = zoo.load('hf-hub:me/toy.mine'); result = {SUM}") == expected()
    assert client("import zoo; result = zoo.pipeline('hf-hub:me/toy.mine').labels()") == ["a", "b", "c", "d"]
    revision = name.rpartition("@")[2]
    code = f"import zoo; model = zoo.load('hf-hub:me/toy.mine', revision={revision!r}); result = {SUM}"
    assert client(code) == expected()


def test_push_shards(hub, client):
    name = client(f"import zoo; result = zoo.push(zoo.load('toy_small'), 'me/parts', token={TOKEN!r}, shard_bytes=400)")
    assert "model.safetensors.index.json" in hub.files("me/parts")
    assert client(f"import zoo; model = zoo.load({name!r}); result = {SUM}") == expected()


def test_push_a_folder(hub, client, tmp_path):
    client(f"import zoo; zoo.save(zoo.load('toy_small'), {str(tmp_path / 'f')!r})")
    (tmp_path / "f" / "notes.txt").write_text("mine")
    name = client(f"import zoo; result = zoo.push({str(tmp_path / 'f')!r}, 'me/folder', token={TOKEN!r})")
    assert client(f"import zoo; model = zoo.load({name!r}); result = {SUM}") == expected()
    assert {"README.md", "config.json", "model.safetensors"} == set(hub.files("me/folder")) - {".gitattributes"}
    assert "hf-hub:me/folder" in hub.files("me/folder")["README.md"].decode()


def test_a_pushed_card_keeps_its_licence_and_names_no_folder_of_the_machine(hub, client, tmp_path):
    client(f"import zoo; zoo.save(zoo.load('toy_small'), {str(tmp_path / 'f')!r}, licence='cc-by-4.0')")
    client(f"import zoo; zoo.push(zoo.load({str(tmp_path / 'f')!r}), 'me/again', token={TOKEN!r})")
    text = hub.files("me/again")["README.md"].decode()
    assert "license: cc-by-4.0" in text
    assert "weights: the file model.safetensors" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("code", "error", "text"),
    [
        ("zoo.push(zoo.load('toy_small'), 'nobody')", "BadName", "organisation/name"),
        ("zoo.push(zoo.load('toy_small'), 'me/a name')", "BadName", "is no repository"),
        ("zoo.push('./nowhere', 'me/x')", "LocalFileMissing", "config.json"),
        ("zoo.push(zoo.load('toy_small'), 'me/x', token='hf_wrong')", "AccessDenied", "token"),
        ("zoo.load('hf-hub:no/such')", None, "no/such"),
        ("zoo.load('toy_small.original', revision='main')", "BadArgument", "40 hexadecimal digits"),
    ],
)
def test_mistakes(client, code, error, text):
    with pytest.raises(Failed) as caught:
        client(f"import zoo; {code}")
    assert error in (None, caught.value.error), caught.value
    assert "ZooError" in caught.value.kinds
    assert text in caught.value.message


def test_a_repository_of_another_library(hub, client):
    hub.add("bert/base", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x" * 100})
    with pytest.raises(Failed, match="BadCheckpoint"):
        client("import zoo; zoo.load('hf-hub:bert/base')")


SLOW = """
from zoo import checkpoints
import zoo, time
write = checkpoints.write_safetensors
def slowly(state, path, **options):
    path.write_bytes(b"half")
    time.sleep(0.3)
    write(state, path, **options)
    time.sleep(0.1)
checkpoints.write_safetensors = slowly
zoo.load("toy_small.original", cache_dir={cache!r})
"""


@pytest.mark.parametrize("moment", [0.02, 0.2, 0.4])
def test_killed_while_converting(hub, client, installed, tmp_path, moment):
    """Whatever the moment of the kill, the next load gives the right weights."""
    hub.add("toys/original", {"toy.pth": pickled({"model": original(toy())})})
    cache = str(tmp_path / "cache")
    with Client(hub.env(client.home, **installed)) as victim:
        victim(f"import zoo, zoo.loading, zoo_toys.models; zoo.download('toy_small.original', cache_dir={cache!r})")
        victim.send(SLOW.format(cache=cache))
        time.sleep(moment)
        victim.process.kill()
        victim.process.wait()
    assert (
        client(f"import zoo; model = zoo.load('toy_small.original', cache_dir={cache!r}); result = {SUM}") == expected()
    )
    assert not list((tmp_path / "cache").rglob("*.tmp.safetensors"))


def test_two_processes_at_once(hub, installed, tmp_path):
    hub.add("toys/original", {"toy.pth": pickled({"model": original(toy())})})
    env = hub.env(tmp_path / "home", **installed)
    code = f"import zoo; model = zoo.load('toy_small.original'); print({SUM})"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert float(out) == expected()
    assert len(list((tmp_path / "home").rglob("derived/toy-*.safetensors"))) == 1
