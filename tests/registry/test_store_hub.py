"""The store against a Hub on loopback, through the real huggingface_hub client: what works, and digests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from clients import DATA, FETCH, SHA, Client, Failed, fetch, refused
from hub_server import TOKEN, HubServer

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
