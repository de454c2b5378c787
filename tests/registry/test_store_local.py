"""The store without a network: the user's files, a plugin's files, derived files, downloads, the cache."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from clients import Client, Failed, tree
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo_registry import ModelCard, Resolved, WeightsCard, _disk, store
from zoo_registry.derived import derived, every
from zoo_registry.errors import BadCheckpoint, CacheReadOnly, DiskFull, HashMismatch, LocalFileMissing
from zoo_registry.names import LocalPath

TEXT = b"the bytes of a checkpoint"
SHA = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture(autouse=True)
def assets(tmp_path, monkeypatch):
    """The folder for assets, in this test alone (huggingface_hub read its environment long ago)."""
    from huggingface_hub import constants

    folder = tmp_path / "assets"
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(folder))
    monkeypatch.setattr(_disk, "_remembered", {})
    return folder / "ssm-zoo"


def entry(**weights) -> Resolved:
    base = {"name": "toy_small", "system": "toy", "domain": "toys", "task": "t", "builder": "x:Y"}
    weights.setdefault("tag", "in1k")
    package = weights.pop("package", "")
    card = ModelCard(**base, weights={weights["tag"]: WeightsCard(**weights)}, package=package)
    return Resolved(card, card.weights[weights["tag"]])


# -- files of the user


def test_a_file(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(TEXT)
    for given_path in (path, str(path), LocalPath(path)):
        files = store.local_files(given_path)
        assert files.path == path
        assert not files.sharded
        assert files.size == len(TEXT)


def test_a_folder(tmp_path):
    with pytest.raises(LocalFileMissing, match="holds no checkpoint"):
        store.local_files(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "x.pth").write_bytes(TEXT)
    assert store.local_files(tmp_path).path.name == "x.pth"
    (tmp_path / "y.pth").write_bytes(TEXT)
    with pytest.raises(BadCheckpoint, match=r"2 checkpoints \(x\.pth, y\.pth\); name the file"):
        store.local_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(TEXT)
    assert store.local_files(tmp_path).config is None
    (tmp_path / "config.json").write_text("{}")
    files = store.local_files(tmp_path)
    assert (files.path.name, files.config) == ("model.safetensors", tmp_path / "config.json")


def test_shards(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    (tmp_path / "m-1.safetensors").write_bytes(b"1")
    with pytest.raises(LocalFileMissing, match=r"names the shard m-2\.safetensors, which is not beside it"):
        store.local_files(tmp_path)
    (tmp_path / "m-2.safetensors").write_bytes(b"22")
    files = store.local_files(tmp_path)
    assert files.sharded
    assert files.index == index
    assert [p.name for p in files.paths] == ["m-1.safetensors", "m-2.safetensors"]
    assert files.weight_map == {"a": files.paths[0], "b": files.paths[1]}
    assert files.size == 3
    with pytest.raises(ValueError, match="consists of 2 files"):
        _ = files.path


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "a\\b"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BadCheckpoint, match="without folders"):
        store.local_files(index)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(LocalFileMissing, match=r"nowhere\.pth"):
        store.local_files(tmp_path / "nowhere.pth")


def test_checkpoint_is_taken_instead_and_never_changed(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(TEXT)
    card = entry(where="a drive", sha256="0" * 64)
    assert store.fetch(card, checkpoint=path).path == path
    with pytest.raises(HashMismatch, match="was not changed and not used") as error:
        store.fetch(card, checkpoint=path, verify=True)
    assert error.value.received == SHA
    assert path.read_bytes() == TEXT
    assert store.fetch(entry(where="a drive", sha256=SHA), checkpoint=str(path), verify=True).path == path


# -- files of a plugin


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "zoo_pack"
    (folder / "demo").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "demo" / "w.safetensors").write_bytes(TEXT)
    return "zoo_pack"


def test_weights_inside_a_plugin(package, tmp_path):
    card = entry(package_file="demo/w.safetensors", package=package, sha256=SHA)
    assert store.fetch(card).path == tmp_path / "zoo_pack" / "demo" / "w.safetensors"
    assert store.is_cached(card)
    (tmp_path / "zoo_pack" / "demo" / "w.safetensors").write_bytes(TEXT + b"!")
    with pytest.raises(HashMismatch, match="is not the file that the card describes"):
        store.fetch(card)
    with pytest.raises(LocalFileMissing, match=r"should hold 'demo/absent\.safetensors'"):
        store.fetch(entry(package_file="demo/absent.safetensors", package=package))


# -- digests


def test_sha256_is_computed_once(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(TEXT)
    calls = []
    real = _disk.sha256_of
    monkeypatch.setattr(_disk, "sha256_of", lambda p: calls.append(p) or real(p))
    assert store.sha256(path) == store.sha256(str(path)) == SHA
    assert len(calls) == 1
    store.sha256(path, again=True)
    assert len(calls) == 2
    path.write_bytes(TEXT + b"!")
    assert store.sha256(path) == hashlib.sha256(TEXT + b"!").hexdigest()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"path": 1}', '{"sha256": "0"}', "\x00"])
def test_damaged_verdicts_are_ignored(tmp_path, assets, text):
    path = tmp_path / "x"
    path.write_bytes(TEXT)
    store.sha256(path)
    (verdict,) = (assets / "verified").glob("*.json")
    verdict.write_text(text)
    _disk._remembered.clear()
    assert store.sha256(path) == SHA


def test_a_file_that_changes_while_it_is_read_gets_no_verdict(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(TEXT)
    real = _disk.sha256_of

    def changing(p):
        value = real(p)
        path.write_bytes(TEXT + b"!")
        return value

    monkeypatch.setattr(_disk, "sha256_of", changing)
    store.sha256(path)
    monkeypatch.setattr(_disk, "sha256_of", real)
    assert store.sha256(path) == hashlib.sha256(TEXT + b"!").hexdigest()


# -- derived files


def test_derived_is_made_once_and_again_when_the_source_changes(tmp_path, assets):
    source = tmp_path / "x.pth"
    source.write_bytes(TEXT)
    calls = []

    def produce(path: Path) -> None:
        calls.append(path)
        path.write_bytes(source.read_bytes().upper())

    first = derived(source, "vim-1", produce)
    assert first.read_bytes() == TEXT.upper()
    assert first.parent == assets / "derived"
    assert first.name.startswith("vim-1-")
    assert first.suffix == calls[0].suffix == ".safetensors"
    assert calls[0].parent == first.parent
    assert derived(source, "vim-1", produce) == first
    assert len(calls) == 1
    other = derived(source, "vim-2", produce)  # another version of the code
    assert other != first
    assert first.exists()
    source.write_bytes(b"changed")
    second = derived(source, "vim-1", produce)
    assert second.read_bytes() == b"CHANGED"
    assert not first.exists()  # nobody asks for it again
    assert [p.name for p, _ in every(first.parent)] == sorted([second.name, other.name])


def test_derived_from_shards_and_from_a_digest(tmp_path):
    shards = [tmp_path / "1", tmp_path / "2"]
    for shard in shards:
        shard.write_bytes(TEXT)
    write = lambda path: path.write_bytes(b"x")  # noqa: E731
    assert derived(shards, "k", write) == derived(list(shards), "k", write) != derived(shards[:1], "k", write)
    assert derived(SHA, "k", write) == derived(SHA, "k", write) != derived("0" * 64, "k", write)
    assert derived(SHA, "k", write, suffix=".npz").suffix == ".npz"


@pytest.mark.parametrize("key", ["", "a/b", "a b", "ä", "x" * 81, "../x"])
def test_derived_keys(tmp_path, key):
    with pytest.raises(ValueError, match="expected up to 80 letters"):
        derived("0", key, lambda path: None)


def test_derived_without_source(tmp_path):
    with pytest.raises(LocalFileMissing, match="not there"):
        derived(tmp_path / "absent", "k", lambda path: None)
    with pytest.raises(ValueError, match="at least one"):
        derived([], "k", lambda path: None)


class Broken(Exception):
    pass


def _write_and_raise(error: BaseException):
    def produce(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    return produce


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Broken("bad file"), Broken),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFull),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), DiskFull),
    ],
)
def test_a_failing_conversion_leaves_nothing_behind(tmp_path, assets, error, expected):
    with pytest.raises(expected):
        derived("0" * 64, "k", _write_and_raise(error))
    assert [f for f in tree(assets) if "lock" not in f] == []
    assert derived("0" * 64, "k", lambda path: path.write_bytes(b"whole")).read_bytes() == b"whole"


def test_a_conversion_that_writes_nothing(assets):
    with pytest.raises(RuntimeError, match="wrote nothing"):
        derived("0" * 64, "k", lambda path: None)


@pytest.mark.parametrize("damage", ["cut", "no facts", "bad facts", "gone"])
def test_a_damaged_derived_file_is_made_again(assets, damage):
    path = derived("0" * 64, "k", lambda p: p.write_bytes(TEXT))
    facts = path.with_name(path.name + ".json")
    if damage == "cut":
        path.write_bytes(TEXT[:-1])
    elif damage == "gone":
        path.unlink()
    elif damage == "no facts":
        facts.unlink()
    else:
        facts.write_text("{")
    assert derived("0" * 64, "k", lambda p: p.write_bytes(b"new")).read_bytes() == b"new"


def test_a_file_system_without_locks(tmp_path, assets, monkeypatch, caplog):
    import filelock

    def no_locks(self, *args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    other = assets / "derived"
    other.mkdir(parents=True)
    name = derived("0" * 64, "k", lambda p: p.write_bytes(TEXT)).name
    assert "has no file locks" in caplog.text
    # without a lock another process may be writing: its temporary file is left alone
    (other / f".{name}.aaaa.tmp.safetensors").write_bytes(b"half")
    (other / name).unlink()
    assert derived("0" * 64, "k", lambda p: p.write_bytes(b"new")).read_bytes() == b"new"
    assert (other / f".{name}.aaaa.tmp.safetensors").exists()


def test_no_place_to_write(tmp_path, monkeypatch):
    from huggingface_hub import constants

    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "file" / "assets"))
    with pytest.raises(CacheReadOnly, match="HF_HOME"):
        derived("0" * 64, "k", lambda p: p.write_bytes(TEXT))


@settings(max_examples=30, deadline=None)
@given(data=st.binary(min_size=1, max_size=200), cut=st.integers(0, 200))
def test_commit_is_all_or_nothing(tmp_path_factory, data, cut):
    folder = tmp_path_factory.mktemp("commit")
    final, temporary = folder / "final", folder / "temporary"
    final.write_bytes(b"old")
    temporary.write_bytes(data[:cut])
    assert final.read_bytes() == b"old"
    _disk.commit(temporary, final)
    assert final.read_bytes() == data[:cut]
    assert not temporary.exists()


# -- download, and the cache


@pytest.fixture
def files(hub: HubServer, tmp_path):
    """A client whose registry has five checkpoints on the Hub, two of them in one file."""
    index = json.dumps({"weight_map": {"a": "s-1.safetensors", "b": "s-2.safetensors"}}).encode()
    content = {
        "a.safetensors": TEXT,
        "b.safetensors": b"b" * 50,
        "c.safetensors": b"c",
        "m.safetensors.index.json": index,
    }
    commit = hub.add("org/cards", content | {"s-1.safetensors": b"1" * 10, "s-2.safetensors": b"2" * 20})
    code = f"""
import types, pathlib
from zoo_registry import *
from zoo_registry import store, cache
def weights(tag, filename, **more):
    return WeightsCard(tag=tag, repo_id="org/cards", filename=filename, revision={commit!r}, **more)
card = ModelCard(name="toy_small", system="toy", domain="toys", task="t", builder="x:Y", weights={{w.tag: w for w in [
    weights("a", "a.safetensors", sha256={SHA!r}), weights("same", "a.safetensors"), weights("b", "b.safetensors"),
    weights("big", "m.safetensors.index.json"),
    weights("text", "c.safetensors", companions={{"org/words": ("t/words.json", "absent.json")}})]}})
plugin = types.ModuleType("toys"); plugin.ZOO_PLUGIN_API = 1
plugin.zoo_models = hookimpl(lambda: [card], specname="zoo_models")
zoo = Manager([]); zoo.register(plugin)
hub = pathlib.Path({str(tmp_path / "home" / "hub")!r})
def named(tag): return resolve(f"toy_small.{{tag}}", plugins=zoo)
def shown():
    return [[w.name, len(w.paths), w.size, len(w.derived), w.complete] for w in cache.cached_weights(plugins=zoo)]
"""
    with Client(hub.env(tmp_path / "home")) as client:
        client("import builtins; builtins.setup = " + repr(code))
        yield client


def test_cache_lists_verifies_and_removes(files, hub, tmp_path):
    folder = tmp_path / "home" / "hub" / "models--org--cards"
    steps = """exec(setup)
before = shown()
for tag in ("a", "b", "big"): store.fetch(named(tag))
made = store.derived(store.fetch(named("b")).path, "k", lambda p: p.write_bytes(b"xyz"))
full = shown()
by = {w.name: w for w in cache.cached_weights(plugins=zoo)}
verdicts = [[v.name, v.state] for v in map(cache.verify, by.values())]
freed = [cache.remove(by["toy_small.b"], only_derived=True), made.exists()]
freed += [cache.remove(cache.cached_weights("toy_small.b", plugins=zoo)[0])]
result = [before, full, verdicts, freed, shown(), store.is_cached(named("a")), store.is_cached(named("b"))]
"""
    index_size = len(hub.files("org/cards")["m.safetensors.index.json"])
    before, full, verdicts, freed, after, has_a, has_b = files(steps)
    assert before == []
    assert full == [
        ["toy_small.a", 1, len(TEXT), 0, True],
        ["toy_small.b", 1, 50, 1, True],
        ["toy_small.big", 3, 30 + index_size, 0, True],
        ["toy_small.same", 1, len(TEXT), 0, True],
    ]
    assert verdicts == [[f"toy_small.{tag}", "ok"] for tag in ("a", "b", "big", "same")]
    assert freed == [3, False, 50]
    assert [row[0] for row in after] == ["toy_small.a", "toy_small.big", "toy_small.same"]
    assert (has_a, has_b) == (True, False)
    assert not [f for f in tree(folder) if f.rpartition("/")[2] == "b.safetensors"]
    scan = "import huggingface_hub as h; s = h.scan_cache_dir(); result = [[str(w) for w in s.warnings], len(s.repos)]"
    assert files(scan) == [[], 1]
    # a shard that is missing is said, a byte that changed is found
    os.remove(next(folder.rglob("s-2.safetensors")))
    blob = next((folder / "snapshots").rglob("a.safetensors")).resolve()
    blob.write_bytes(TEXT[:-1] + b"!")
    states = files(
        "exec(setup)\nresult = [[v.name, v.state] for v in map(cache.verify, cache.cached_weights(plugins=zoo))]"
    )
    # the file of "a" was moved aside before "same", which names the same file, had its turn
    assert states == [["toy_small.a", "wrong"], ["toy_small.big", "incomplete"], ["toy_small.same", "gone"]]
    # the last file takes the folder along
    files("exec(setup)\nfor w in cache.cached_weights(plugins=zoo): cache.remove(w)\nresult = shown()")
    assert files(scan) == [[], 0]


def test_other_programs_files_stay(files, tmp_path):
    files(
        "exec(setup)\nimport huggingface_hub as h\n"
        "h.hf_hub_download('org/cards', 's-1.safetensors'); store.fetch(named('a'))\n"
        "for w in cache.cached_weights(plugins=zoo): cache.remove(w)"
    )
    folder = tmp_path / "home" / "hub" / "models--org--cards"
    assert [f.rpartition("/")[2] for f in tree(folder / "snapshots")] == ["s-1.safetensors"]


def test_a_blob_that_two_snapshots_share_stays(files, hub, tmp_path):
    newer = hub.add("org/cards", {"new.txt": b"new"})
    files(f"import huggingface_hub as h; h.hf_hub_download('org/cards', 'a.safetensors', revision={newer!r})")
    freed = files("exec(setup)\nstore.fetch(named('a'))\nresult = cache.remove(cache.cached_weights(plugins=zoo)[0])")
    assert freed == 0
    folder = tmp_path / "home" / "hub" / "models--org--cards"
    (kept,) = (folder / "snapshots").rglob("a.safetensors")
    assert newer in str(kept)
    assert kept.read_bytes() == TEXT


def test_converted_files_of_the_user_are_listed_and_removed(tmp_path, assets):
    from zoo_registry import cache

    source = tmp_path / "mine.pth"
    source.write_bytes(TEXT)
    path = derived(source, "k", lambda p: p.write_bytes(b"abc"))
    (found,) = cache.local_derived()
    assert (found.path, found.origin, found.size) == (path, (str(source),), 3)
    assert cache.remove(found) == 3
    assert cache.local_derived() == []
    assert not path.exists()


def test_download_for_a_machine_without_a_network(files, hub, tmp_path):
    to = tmp_path / "carried"
    result = files(
        f"exec(setup)\nf = store.download(named('a'), {str(to)!r})\n"
        f"g = store.download(named('big'), {str(to / 'big')!r})\n"
        f"result = [[str(p) for p in f.paths], len(g.paths), sorted(g.weight_map), store.downloaded_name({str(to)!r}), "
        f"store.downloaded_name({str(tmp_path)!r})]"
    )
    assert result == [[str(to / "a.safetensors")], 2, ["a", "b"], "toy_small.a", None]
    assert (to / "a.safetensors").read_bytes() == TEXT
    facts = json.loads((to / "zoo-download.json").read_text())
    assert facts["files"] == {"a.safetensors": SHA}
    assert facts["card"]["name"] == "toy_small"
    assert store.local_files(to).path == to / "a.safetensors"
    assert store.local_files(to / "big").sharded
    assert not [f for f in tree(to) if "tmp" in f]
    (tmp_path / "file").touch()
    with pytest.raises(Failed):
        files(f"exec(setup)\nstore.download(named('a'), {str(tmp_path / 'file' / 'x')!r})")


def test_what_answering_needs_too_is_carried_along(files, hub, tmp_path):
    hub.add("org/words", {"t/words.json": b"[1]"})
    to = tmp_path / "carried"
    files(f"exec(setup)\nstore.download(named('text'), {str(to)!r})")
    assert (to / "c.safetensors").read_bytes() == b"c"
    assert store.companion_in(to, "org/words", "t/words.json").read_bytes() == b"[1]"
    facts = json.loads((to / "zoo-download.json").read_text())
    assert sorted(facts["files"]) == ["c.safetensors", "companions/org--words/t/words.json"]
    assert facts["files"]["companions/org--words/t/words.json"] == hashlib.sha256(b"[1]").hexdigest()
    assert store.local_files(to).path == to / "c.safetensors"
    # what the repository lacks is left out
    assert not [f for f in tree(to) if "tmp" in f or "absent" in f]


# -- uploads: the Hub on loopback understands what `zoo push` sends


def test_the_loopback_hub_takes_uploads(hub, tmp_path):
    from hub_server import TOKEN

    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "config.json").write_text('{"library": "zoo"}')
    (folder / "model.safetensors").write_bytes(TEXT)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Toy")
    code = f"""
import huggingface_hub as h
api = h.HfApi(token={TOKEN!r})
api.create_repo("tester/toy", exist_ok=True, private=True)
api.create_repo("tester/toy", exist_ok=True)
info = api.upload_folder(repo_id="tester/toy", folder_path={str(folder)!r}, commit_message="push")
api.upload_file(repo_id="tester/toy", path_in_repo="README.md", path_or_fileobj=b"# Changed")
files = sorted(api.list_repo_files("tester/toy"))
result = [info.oid, api.whoami()["name"], files, api.model_info("tester/toy").private]
"""
    with Client(hub.env(tmp_path / "home")) as client:
        oid, name, listed, private = client(code)
        assert (name, private) == ("tester", True)
        assert listed == [".gitattributes", "README.md", "config.json", "model.safetensors"]
        assert hub.files("tester/toy", oid)["model.safetensors"] == TEXT
        assert b"# Changed" in hub.files("tester/toy")["README.md"]
        with pytest.raises(Failed, match="401"):
            client("import huggingface_hub as h; h.HfApi().create_repo('tester/other')")
        got = client(
            f"from zoo_registry.store import fetch_repo\nresult = fetch_repo('hf-hub:tester/toy', token={TOKEN!r}).size"
        )
    assert got == len(TEXT)
