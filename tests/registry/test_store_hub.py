"""The store against a Hub on loopback, through the real huggingface_hub client: what works, and every failure."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clients import Client, Failed, run, tree
from hub_server import TOKEN, HubServer

DATA = bytes(range(256)) * 1200  # 307,200 bytes
SHA = hashlib.sha256(DATA).hexdigest()
NOTHING = "f" * 40

#: In the client: a card whose weights are on the Hub, fetched by name as a user would.
FETCH = """
from zoo_registry import *
from zoo_registry import errors, store
def toy(**weights):
    card = ModelCard(name="toy_small", system="toy", domain="toys", task="a-task", builder="x.y:Z",
                     weights={{"in1k": WeightsCard(tag="in1k", **weights)}})
    return Resolved(card, card.weights["in1k"])
options = {options!r}
files = store.fetch(toy(**{weights!r}), **options)
result = dict(paths=[str(p) for p in files.paths], revision=files.revision, repo=files.repo_id,
              data=[__import__("hashlib").sha256(p.read_bytes()).hexdigest() for p in files.paths])
"""


def fetch(
    client: Client, cache: Path, *, repo_id: str = "org/repo", filename: str = "model.safetensors", **more: Any
) -> Any:
    """``store.fetch`` in the client. Keyword arguments of the weights card; ``options`` are fetch's own."""
    options = {"cache_dir": str(cache)} | more.pop("options", {})
    weights = {"repo_id": repo_id, "filename": filename} | more
    return client(FETCH.format(weights=weights, options=options))


@pytest.fixture
def commit(hub: HubServer) -> str:
    if "org/repo" not in hub.repos:
        hub.add("org/repo", {"model.safetensors": DATA, "config.json": b"{}", "nested/x.bin": b"nested"})
    return hub.repos["org/repo"].refs["main"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def client(shared_client: Client) -> Client:
    return shared_client


def refused(client: Client, cache: Path, error: str, **more: Any) -> Failed:
    with pytest.raises(Failed) as caught:
        fetch(client, cache, **more)
    assert caught.value.error == error, str(caught.value)
    return caught.value


# -- what works


def test_a_pinned_file_is_fetched_once_and_then_served_without_asking(hub, client, commit, cache):
    first = fetch(client, cache, revision=commit, sha256=SHA)
    assert first["data"] == [SHA]
    assert (first["revision"], first["repo"]) == (commit, "org/repo")
    assert hub.count("GET", "/cdn/") == 1
    asked = hub.requests[0]
    assert "ssm-zoo/" in asked.headers["user-agent"]
    hub.requests.clear()
    assert fetch(client, cache, revision=commit, sha256=SHA) == first
    assert hub.requests == []


def test_nested_and_small_files(hub, client, commit, cache):
    assert fetch(client, cache, revision=commit, filename="nested/x.bin")["data"] == [
        hashlib.sha256(b"nested").hexdigest()
    ]
    assert fetch(client, cache, revision=commit, filename="config.json")["data"] == [hashlib.sha256(b"{}").hexdigest()]


def test_an_unpinned_card_warns_and_keeps_what_it_got(hub, client, commit, cache):
    first = fetch(client, cache)
    assert [w[0] for w in client.warnings] == ["NotPinnedWarning"]
    assert first["revision"] == commit
    hub.requests.clear()
    assert fetch(client, cache) == first
    assert hub.requests == []
    assert client.warnings == []


@pytest.mark.parametrize("licence", ["cc-by-nc-4.0", "Research only", "some non-commercial licence"])
def test_a_restrictive_licence_is_said_before_the_first_download(hub, client, commit, cache, licence):
    fetch(client, cache, revision=commit, licence=licence)
    assert [w[0] for w in client.warnings] == ["LicenceWarning"]
    assert licence in client.warnings[0][1]
    fetch(client, cache, revision=commit, licence=licence)
    assert client.warnings == []
    fetch(client, cache / "other", revision=commit, licence="apache-2.0")
    assert client.warnings == []


@pytest.mark.parametrize("ignore_range", [False, True])
def test_an_interrupted_transfer_is_resumed(hub, client, cache, ignore_range):
    large = DATA * 40  # the client writes, and so resumes, in pieces of 10 MiB
    commit = hub.add("org/large", {"model.safetensors": large})
    hub.fault("/cdn/", truncate_at=12_000_000, times=1)
    hub.fault("/cdn/", ignore_range=ignore_range)
    digest = hashlib.sha256(large).hexdigest()
    assert fetch(client, cache, repo_id="org/large", revision=commit, sha256=digest)["data"] == [digest]
    gets = [r.headers.get("Range") for r in hub.requests if r.method == "GET"]
    assert gets == [None, "bytes=10485760-"]


def test_one_refused_connection_is_tried_again(hub, client, commit, cache):
    hub.fault("/resolve/", drop=True, times=1)
    assert fetch(client, cache, revision=commit)["data"] == [SHA]


def test_the_token_is_used_and_never_leaves_the_hub(hub, client, cache):
    secret = hub.add("org/private", {"model.safetensors": DATA}, private=True)
    answer = fetch(client, cache, repo_id="org/private", revision=secret, options={"token": TOKEN})
    assert answer["data"] == [SHA]
    heads = [r for r in hub.requests if "/resolve/" in r.path]
    assert all(r.headers["Authorization"] == f"Bearer {TOKEN}" for r in heads)
    assert all("Authorization" not in r.headers for r in hub.requests if "/cdn/" in r.path)


def test_force_download_fetches_again(hub, client, commit, cache):
    fetch(client, cache, revision=commit)
    fetch(client, cache, revision=commit, options={"force_download": True})
    assert hub.count("GET", "/cdn/") == 2


def test_the_command_of_huggingface_hub_sees_a_clean_cache(hub, client, commit, cache):
    fetch(client, cache, revision=commit, sha256=SHA)
    client(f"from zoo_registry.store import derived; from pathlib import Path; p = Path({str(cache)!r}); "
           "q = next(p.rglob('model.safetensors')); derived(q, 'k', lambda t: t.write_bytes(b'x'))")  # fmt: skip
    scanned = client(
        "import huggingface_hub as h; s = h.scan_cache_dir("
        f"{str(cache)!r}); result = [[str(w) for w in s.warnings], s.size_on_disk, len(s.repos)]"
    )
    assert scanned == [[], len(DATA), 1]


# -- shards


@pytest.fixture
def sharded(hub: HubServer) -> str:
    index = {"metadata": {}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}
    return hub.add(
        "org/big",
        {
            "model.safetensors.index.json": json.dumps(index).encode(),
            "m-1.safetensors": b"one",
            "m-2.safetensors": b"two",
        },
    )


def test_shards_follow_their_index(hub, client, sharded, cache):
    digests = {f"m-{i}.safetensors": hashlib.sha256(t).hexdigest() for i, t in ((1, b"one"), (2, b"two"))}
    answer = fetch(
        client,
        cache,
        repo_id="org/big",
        filename="model.safetensors.index.json",
        revision=sharded,
        shard_sha256=digests,
    )
    assert answer["data"] == list(digests.values())
    wrong = digests | {"m-2.safetensors": "0" * 64}
    where = {"repo_id": "org/big", "filename": "model.safetensors.index.json", "revision": sharded}
    refused(client, cache / "2", "HashMismatch", shard_sha256=wrong, **where)


def test_an_unpinned_index_takes_its_shards_from_its_own_commit(hub, client, sharded, cache):
    fetch(client, cache, repo_id="org/big", filename="model.safetensors.index.json")
    shards = [r.path for r in hub.requests if "m-1" in r.path]
    assert shards
    assert all(f"/resolve/{sharded}/" in path for path in shards)


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": {"a": "../../secret"}}', '{"weight_map": {"a": 3}}', "no json"]
)
def test_a_bad_index_is_refused(hub, client, cache, index):
    commit = hub.add("org/badindex", {"model.safetensors.index.json": index.encode()})
    refused(
        client, cache, "BadCheckpoint", repo_id="org/badindex", filename="model.safetensors.index.json", revision=commit
    )


# -- repositories in the zoo's own format


REPO = """
from zoo_registry import store
files = store.fetch_repo({source!r}, cache_dir={cache!r}, **{options!r})
data = [p.read_bytes().decode() for p in files.paths]
result = dict(config=files.config.read_text(), data=data, revision=files.revision)
"""


def fetch_repo(client: Client, cache: Path, source: str, **options: Any) -> Any:
    return client(REPO.format(source=source, cache=str(cache), options=options))


def test_fetch_repo_takes_config_and_weights_from_one_commit(hub, client, cache):
    old = hub.add("org/mine", {"config.json": b'{"v": 1}', "model.safetensors": b"one"})
    assert fetch_repo(client, cache, "hf-hub:org/mine") == {"config": '{"v": 1}', "data": ["one"], "revision": old}
    new = hub.add("org/mine", {"config.json": b'{"v": 2}', "model.safetensors": b"two"})
    # a branch is asked for its newest commit, a commit is served from the cache
    assert fetch_repo(client, cache, "hf-hub:org/mine")["data"] == ["two"]
    hub.requests.clear()
    assert fetch_repo(client, cache, f"hf-hub:org/mine@{old}")["data"] == ["one"]
    assert hub.requests == []
    # without a network the newest copy serves
    hub.fault("/resolve/", status=503)
    assert fetch_repo(client, cache, "hf-hub:org/mine") == {"config": '{"v": 2}', "data": ["two"], "revision": new}
    assert fetch_repo(client, cache, "hf-hub:org/mine", local_files_only=True)["data"] == ["two"]


def test_fetch_repo_with_shards_and_without_weights(hub, client, cache):
    index = json.dumps({"weight_map": {"a": "s.safetensors"}}).encode()
    hub.add("org/shards", {"config.json": b"{}", "model.safetensors.index.json": index, "s.safetensors": b"s"})
    assert fetch_repo(client, cache, "hf-hub:org/shards")["data"] == ["s"]
    hub.add("org/empty", {"config.json": b"{}"})
    with pytest.raises(Failed, match=r"neither model\.safetensors nor") as caught:
        fetch_repo(client, cache, "hf-hub:org/empty")
    assert caught.value.error == "FileNotInRepo"
    hub.add("org/noconfig", {"model.safetensors": b"x"})
    with pytest.raises(Failed, match=r"config\.json"):
        fetch_repo(client, cache, "hf-hub:org/noconfig")


# -- failures


def test_repository_not_found(hub, client, cache):
    error = refused(client, cache, "RepoNotFound", repo_id="org/nothere", revision=NOTHING, options={"token": TOKEN})
    assert "toy_small.in1k" in error.message
    assert "org/nothere" in error.message
    assert error.facts["status"] == 404
    error = refused(client, cache, "RepoHidden", repo_id="org/nothere", revision=NOTHING)
    assert "private" in error.message
    assert "hf auth login" in error.message
    assert {"FileNotFoundError", "PermissionError", "RepoNotFound", "AccessDenied"} <= set(error.kinds)


def test_revision_and_file_not_found(hub, client, commit, cache):
    error = refused(client, cache, "RevisionNotFound", revision=NOTHING)
    assert NOTHING in error.message
    assert "commits/main" in error.message
    error = refused(client, cache, "FileNotInRepo", filename="absent.pth", revision=commit)
    assert "absent.pth" in error.message
    assert f"tree/{commit}" in error.message
    assert "FileNotFoundError" in error.kinds


def test_gated_disabled_and_forbidden(hub, client, commit, cache):
    gated = hub.add("org/gated", {"model.safetensors": DATA}, gated=True)
    error = refused(client, cache, "AccessDenied", repo_id="org/gated", revision=gated)
    assert "gated (401)" in error.message
    assert "accept its terms at https://huggingface.co/org/gated" in error.message
    assert "HF_TOKEN" in error.message
    assert "PermissionError" in error.kinds
    assert fetch(client, cache, repo_id="org/gated", revision=gated, options={"token": TOKEN})["data"] == [SHA]
    off = hub.add("org/disabled", {"model.safetensors": DATA}, disabled=True)
    assert "disabled" in refused(client, cache, "AccessDenied", repo_id="org/disabled", revision=off).message
    hub.fault("/resolve/", status=403, code="GatedRepo", message="restricted", times=1)
    assert "gated (403)" in refused(client, cache, "AccessDenied", revision=commit).message
    hub.fault("/resolve/", status=403, times=1)
    assert "(403)" in refused(client, cache, "AccessDenied", revision=commit).message
    error = refused(client, cache, "AccessDenied", revision=commit, options={"token": "hf_" + "x" * 34})
    assert "token is wrong" in error.message


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_server_errors_when_asking(hub, client, commit, cache, status):
    hub.fault("/resolve/", status=status)
    error = refused(client, cache, "HubUnavailable", revision=commit)
    assert f"({status})" in error.message
    assert "checkpoint=" in error.message
    assert hub.count("HEAD") == 2  # tried once more
    assert "ConnectionError" in error.kinds


def test_server_errors_when_transferring(hub, client, commit, cache):
    hub.fault("/cdn/", status=500)
    assert "(500)" in refused(client, cache, "HubUnavailable", revision=commit).message
    assert [f for f in tree(cache) if "incomplete" in f or "blobs" in f] == []


def test_too_many_requests_and_odd_answers(hub, client, commit, cache):
    hub.fault("/resolve/", status=429)
    assert "429" in refused(client, cache, "HubUnavailable", revision=commit).message
    hub.heal()
    hub.fault("/resolve/", status=418)
    assert "(418)" in refused(client, cache, "HubUnavailable", revision=commit).message
    hub.heal()
    hub.fault("/resolve/", status=404)
    assert "(404)" in refused(client, cache, "FileNotInRepo", revision=commit).message
    hub.heal()
    hub.fault("/resolve/", strip=("X-Repo-Commit",))
    assert "HF_ENDPOINT" in refused(client, cache, "HubUnavailable", revision=commit).message


def test_timeouts(hub, client, commit, cache):
    hub.fault("/resolve/", silent=3.5)
    error = refused(client, cache, "HubTimeout", revision=commit)
    assert "did not answer in time" in error.message
    assert "HF_HUB_ETAG_TIMEOUT" in error.message
    assert f"hf download org/repo model.safetensors --revision {commit}" in error.message
    assert "TimeoutError" in error.kinds


def test_a_transfer_that_stalls_goes_on_after_the_timeout(hub, client, commit, cache):
    hub.fault("/cdn/", stall_at=100_000, times=1)
    assert fetch(client, cache, revision=commit, sha256=SHA)["data"] == [SHA]


@pytest.mark.slow
def test_a_transfer_that_always_breaks_off(hub, client, commit, cache):
    hub.fault("/cdn/", truncate_at=1000)
    error = refused(client, cache, "IncompleteDownload", revision=commit)
    assert "nothing was kept" in error.message
    assert [f for f in tree(cache) if "blobs" in f or "snapshots" in f] == []
    hub.heal()
    assert fetch(client, cache, revision=commit)["data"] == [SHA]


def test_a_body_shorter_than_the_hub_promised(hub, client, commit, cache):
    hub.fault("/cdn/", shrink_to=1000)
    error = refused(client, cache, "IncompleteDownload", revision=commit)
    assert "1000" in error.message
    assert [f for f in tree(cache) if "blobs" in f] == []


# -- digests


def test_a_wrong_file_is_moved_aside_and_never_used(hub, client, commit, cache):
    error = refused(client, cache, "HashMismatch", revision=commit, sha256="0" * 64)
    for word in ["what the Hub sent", "0" * 64, SHA, "moved aside to", "from the card", "toy_small"]:
        assert word in error.message or word == "toy_small", error.message
    aside = Path(error.facts["path"])
    assert aside.read_bytes() == DATA
    assert ".zoo/wrong" in str(aside)
    assert not list((cache / "models--org--repo" / "snapshots").rglob("model.safetensors"))
    assert not [p for p in (cache / "models--org--repo" / "blobs").iterdir() if p.is_file()]
    assert "ValueError" in error.kinds
    assert error.facts["expected"] == "0" * 64
    assert error.facts["received"] == SHA


def test_flipped_bytes_are_noticed_without_a_digest_on_the_card(hub, client, commit, cache):
    hub.fault("/cdn/", corrupt_at=150_000, times=1)
    error = refused(client, cache, "HashMismatch", revision=commit)
    assert "from the Hub" in error.message
    assert fetch(client, cache, revision=commit)["data"] == [SHA]


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(hub, client, commit, cache):
    path = Path(fetch(client, cache, revision=commit, sha256=SHA)["paths"][0]).resolve()
    path.write_bytes(DATA[:-1])
    assert fetch(client, cache, revision=commit, sha256=SHA)["data"] == [SHA]
    assert hub.count("GET", "/cdn/") == 2
    path.write_bytes(DATA[:-1] + b"!")
    error = refused(client, cache, "HashMismatch", revision=commit, sha256=SHA, options={"local_files_only": True})
    assert "the file in the cache" in error.message


def test_a_download_that_was_never_checked_is_checked_before_it_is_used(hub, client, commit, cache):
    """As if the process had been killed between the transfer and the check."""
    hub.fault("/cdn/", corrupt_at=7, times=1)
    client(f"import huggingface_hub as h; h.hf_hub_download('org/repo', 'model.safetensors', revision={commit!r}, cache_dir={str(cache)!r})")  # fmt: skip # noqa: E501
    assert fetch(client, cache, revision=commit, sha256=SHA)["data"] == [SHA]


def test_the_verdict_is_remembered_and_verify_forces(hub, client, commit, cache):
    path = Path(fetch(client, cache, revision=commit, sha256=SHA)["paths"][0])
    verdicts = list((cache / "models--org--repo" / ".zoo" / "verified").glob("*.json"))
    assert [json.loads(v.read_text())["sha256"] for v in verdicts] == [SHA]
    count = (
        "import zoo_registry._disk as d; calls = []; real = d.sha256_of; "
        "d.sha256_of = lambda p: calls.append(p) or real(p)\n"
    )
    uncount = "\nd.sha256_of = real\nresult = len(calls)"
    again = FETCH.format(
        weights={"repo_id": "org/repo", "filename": "model.safetensors", "revision": commit, "sha256": SHA},
        options={"cache_dir": str(cache)},
    )
    assert client(count + again + uncount) == 0
    assert client(count + "d._remembered.clear()\n" + again + uncount) == 0  # from the small file
    forced = again.replace("'cache_dir'", "'verify': True, 'cache_dir'")
    assert client(count + forced + uncount) == 1
    # a change that keeps the size is seen by the time, a change that keeps both by verify=True alone
    blob, stat = path.resolve(), path.stat()
    blob.write_bytes(DATA[:-1] + b"!")
    os.utime(blob, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert client(count + again + uncount) == 0
    assert client(count + forced + uncount) == 2  # found wrong, fetched again, checked again
    assert fetch(client, cache, revision=commit, sha256=SHA)["data"] == [SHA]


def test_a_cache_without_symbolic_links(hub, commit, tmp_path):
    """Nothing in such a cache is named by its digest; what was recorded on arrival serves instead."""
    with Client(hub.env(tmp_path, HF_HUB_DISABLE_SYMLINKS="1")) as client:
        path = Path(fetch(client, tmp_path / "hub", revision=commit)["paths"][0])
        assert not path.is_symlink()
        path.write_bytes(DATA[:-1] + b"!")
        assert fetch(client, tmp_path / "hub", revision=commit)["data"] == [SHA]
        refused(client, tmp_path / "hub", "HashMismatch", revision=commit, sha256="0" * 64)
        assert not path.exists()


# -- no network


def test_not_cached_with_local_files_only(hub, client, commit, cache):
    error = refused(client, cache, "NotCached", revision=commit, options={"local_files_only": True})
    command = f"hf download org/repo model.safetensors --revision {commit}"
    for word in ["toy_small.in1k", "org/repo", "model.safetensors", commit, str(cache), command]:
        assert word in error.message, error.message
    assert hub.requests == []
    assert "FileNotFoundError" in error.kinds


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_variables(hub, commit, tmp_path, variable):
    with Client(hub.env(tmp_path, **{variable: "1"})) as offline:
        with pytest.raises(Failed, match="HF_HUB_OFFLINE is set") as caught:
            fetch(offline, tmp_path / "hub", revision=commit)
        assert caught.value.error == "NotCached"
        run(
            f"import huggingface_hub as h; h.hf_hub_download('org/repo', 'model.safetensors', revision={commit!r})",
            hub.env(tmp_path),
        )
        hub.requests.clear()
        assert fetch(offline, tmp_path / "hub", revision=commit, sha256=SHA)["data"] == [SHA]
        assert hub.requests == []


def test_the_hub_cannot_be_reached(hub, commit, tmp_path):
    env = hub.env(tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    with Client(env) as cut_off, pytest.raises(Failed) as caught:
        fetch(cut_off, tmp_path / "hub", revision=commit)
    assert caught.value.error == "HubUnavailable"
    for word in ["http://127.0.0.1:9", "cannot be reached", str(tmp_path / "hub"), "hf download", "HF_HUB_OFFLINE"]:
        assert word in caught.value.message, caught.value.message


def test_a_cached_file_needs_no_reachable_hub(hub, client, commit, tmp_path):
    fetch(client, tmp_path / "hub", revision=commit, sha256=SHA)
    env = hub.env(tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    with Client(env) as cut_off:
        assert fetch(cut_off, tmp_path / "hub", revision=commit, sha256=SHA)["data"] == [SHA]


# -- the disk


def test_disk_full_is_noticed_before_the_transfer(hub, client, commit, cache):
    client(
        "import shutil; real_usage = shutil.disk_usage; shutil.real_usage = real_usage\n"
        "shutil.disk_usage = lambda path: real_usage(path)._replace(free=1000)"
    )
    try:
        error = refused(client, cache, "DiskFull", revision=commit)
    finally:
        client("import shutil; shutil.disk_usage = shutil.real_usage")
    assert "0.3 MB needed, 0.0 MB free" in error.message
    assert "HF_HOME" in error.message
    assert hub.count("GET") == 0
    assert tree(cache) == []


def test_no_space_in_the_middle_of_the_transfer(hub, commit, tmp_path):
    """The system refuses to write beyond 100,000 bytes a file, as a full disk or a quota does."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    with Client(hub.env(tmp_path)) as small:
        small(limit)
        with pytest.raises(Failed) as caught:
            fetch(small, tmp_path / "hub", revision=commit)
    assert caught.value.error == "DiskFull"
    assert "nothing half-written was kept" in caught.value.message
    assert [f for f in tree(tmp_path / "hub") if "blobs" in f or "snapshots" in f] == []


#: The superuser may write anywhere; without its capabilities (Linux) the permissions of folders hold for it too.
DROP = """
import ctypes, os, sys
if os.geteuid() == 0:
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")
"""


@contextlib.contextmanager
def not_writable(folder: Path) -> Iterator[None]:
    if sys.platform != "linux" and getattr(os, "geteuid", lambda: 0)() == 0:
        pytest.skip("needs a system on which folder permissions hold for this user")
    folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    try:
        for each in folders:
            each.chmod(0o555)
        yield
    finally:
        for each in folders:
            each.chmod(0o755)


def test_read_only_cache(hub, commit, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    with not_writable(home), Client(hub.env(home)) as client:
        client(DROP)
        error = refused(client, home / "hub", "CacheReadOnly", revision=commit)
    assert str(home) in error.message
    assert "HF_HOME" in error.message
    assert "PermissionError" in error.kinds
    assert tree(home) == []


def test_a_file_in_a_read_only_cache_is_served_and_derived_files_go_elsewhere(hub, commit, tmp_path, client):
    shared = tmp_path / "shared" / "hub"
    fetch(client, shared, revision=commit)
    shutil.rmtree(shared / "models--org--repo" / ".zoo")
    weights = {"repo_id": "org/repo", "filename": "model.safetensors", "revision": commit, "sha256": SHA}
    make = FETCH.format(weights=weights, options={"cache_dir": str(shared)})
    make += "\nresult = str(store.derived(files.path, 'k', lambda t: t.write_bytes(b'x')))"
    mine = tmp_path / "mine"
    with not_writable(shared), Client(hub.env(mine)) as reader:
        reader(DROP)
        assert fetch(reader, shared, revision=commit, sha256=SHA)["data"] == [SHA]
        made = reader(make)
        assert made.startswith(str(mine))
        assert reader(make) == made
        # a wrong file that cannot be moved is refused all the same
        error = refused(
            reader, shared, "HashMismatch", revision=commit, sha256="0" * 64, options={"local_files_only": True}
        )
        assert "could not be moved aside" in error.message
        with not_writable(mine):
            with pytest.raises(Failed) as caught:
                reader(make.replace("'k'", "'other'"))
            assert caught.value.error == "CacheReadOnly"


def test_a_cache_that_is_no_folder(hub, client, commit, tmp_path):
    (tmp_path / "file").touch()
    assert (
        str(tmp_path / "file") in refused(client, tmp_path / "file" / "hub", "CacheReadOnly", revision=commit).message
    )


# -- what is on the Hub is not all


def test_off_hub_weights_and_models_without_weights(client, cache):
    with pytest.raises(Failed) as caught:
        client(
            "from zoo_registry import *; from zoo_registry import store\n"
            "card = ModelCard(name='toy_small', system='toy', domain='toys', task='t', builder='x:Y', weights={"
            "'drive': WeightsCard(tag='drive', where='a drive: https://example.org/1'),"
            "'in1k': WeightsCard(tag='in1k', repo_id='org/repo', filename='x')})\n"
            "store.fetch(Resolved(card, card.weights['drive']))"
        )
    assert caught.value.error == "NotOnHub"
    for word in ["toy_small.drive", "https://example.org/1", "checkpoint='PATH'", "toy_small.in1k"]:
        assert word in caught.value.message
    with pytest.raises(Failed) as caught:
        client(
            "card = ModelCard(name='toy_small', system='toy', domain='toys', task='t', builder='x:Y')\n".join(
                ["from zoo_registry import *; from zoo_registry import store\n", "store.fetch(Resolved(card, None))"]
            )
        )
    assert caught.value.error == "NoWeights"
    assert "zoo.create('toy_small')" in caught.value.message


def test_an_unforeseen_error_becomes_a_store_error(client, commit, cache):
    code = (
        "from zoo_registry import hub\n"
        "e = hub.explain(RuntimeError('odd\\nthing'), hub.HubFile('org/repo', 'x'), hub.Access())\n"
        "result = [type(e).__name__, str(e)]"
    )
    name, text = client(code)
    assert name == "StoreError"
    assert "x of org/repo at main cannot be had: RuntimeError: odd" in text
