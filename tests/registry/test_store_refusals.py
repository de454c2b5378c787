"""Everything that can go wrong between the Hub and the disk, and the sentence that the user gets for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import DATA, FETCH, SHA, Client, Failed, fetch, refused, run, tree
from hub_server import TOKEN

NOTHING = "f" * 40

# -- answers of the Hub


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


def test_how_long_the_hub_asks_to_wait(hub, client, commit, cache):
    hub.fault("/resolve/", status=429, retry_after="30")
    error = refused(client, cache, "HubUnavailable", revision=commit)
    assert "asks to wait 30 s" in error.message
    assert hub.count("HEAD") == 1  # nobody waits that long unasked
    hub.heal()
    hub.fault("/resolve/", status=429, retry_after="2", times=1)
    assert fetch(client, cache, revision=commit)["data"] == [SHA]


def test_a_storage_host_that_is_blocked_is_named(hub, client, commit, cache):
    hub.fault("/cdn/", status=403)
    assert (
        "localhost, where the Hub keeps large files" in refused(client, cache, "AccessDenied", revision=commit).message
    )


FILE = """
from zoo_registry import store
result = str(store.hub_file(**{asked}))
"""


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        ({"repo_id": "a/b/c"}, "BadName", "'a/b/c' is no repository"),
        ({"repo_id": ""}, "BadName", "'' is no repository"),
        ({"filename": ""}, "BadName", "'' is no file of a repository"),
        ({"filename": "../x.bin"}, "BadName", "'../x.bin' is no file of a repository"),
        ({"filename": "/etc/passwd"}, "BadName", "is no file of a repository"),
        ({"sha256": "12"}, "BadName", "expected 64 hexadecimal digits"),
        ({"token": "hf_secret\n"}, "AccessDenied", "copy it again"),
        ({"token": "hf_secr\u00e9t"}, "AccessDenied", "copy it again"),
        ({"token": True}, "AccessDenied", "token=True was given and there is no token"),
    ],
)
def test_what_no_hub_could_answer(hub, client, commit, cache, asked, kind, words):
    given = {"repo_id": "org/repo", "filename": "model.safetensors", "cache_dir": str(cache), **asked}
    with pytest.raises(Failed) as caught:
        client(FILE.format(asked=given))
    assert caught.value.error == kind
    assert words in caught.value.message
    assert "secr" not in caught.value.message
    assert hub.count("HEAD") == hub.count("GET") == 0


def test_digests_in_capital_letters(hub, client, commit, cache):
    given = {"repo_id": "org/repo", "filename": "model.safetensors", "cache_dir": str(cache), "sha256": SHA.upper()}
    assert client(FILE.format(asked=given)).endswith("model.safetensors")


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


@pytest.mark.parametrize("endpoint", ["huggingface.co", ""])
def test_an_endpoint_that_is_no_address(hub, commit, tmp_path, endpoint):
    with Client(hub.env(tmp_path) | {"HF_ENDPOINT": endpoint}) as lost, pytest.raises(Failed) as caught:
        fetch(lost, tmp_path / "hub", revision=commit)
    assert f"HF_ENDPOINT is {endpoint!r}; expected an address" in caught.value.message


def test_a_proxy_is_named_without_its_password(hub, commit, tmp_path):
    env = hub.env(tmp_path) | {"http_proxy": "http://me:secret@127.0.0.1:9"}
    with Client(env) as behind, pytest.raises(Failed) as caught:
        fetch(behind, tmp_path / "hub", revision=commit)
    assert "through the proxy 127.0.0.1:9" in caught.value.message
    assert "secret" not in caught.value.message


def test_a_copy_that_serves_is_not_said_to_be_missing(hub, client, commit, tmp_path):
    asked = {"repo_id": "org/repo", "filename": "model.safetensors", "cache_dir": str(tmp_path / "hub")}
    path = client(FILE.format(asked=asked))
    noted = """
import logging
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("zoo.store").addHandler(handler)
"""
    with Client(hub.env(tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}) as cut_off:
        found, (said,) = cut_off(noted + FILE.format(asked=asked) + "\nresult = [result, said]")
    assert found == path
    assert "cannot be reached" in said
    assert "Using the copy in the cache" in said
    assert "not in the cache" not in said


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
