"""Processes that are killed, and several at once: the cache never serves a wrong byte."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from clients import Client, run, tree
from hub_server import HubServer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

DATA = os.urandom(1 << 20)
SHA = hashlib.sha256(DATA).hexdigest()

#: In the client: run ``work`` in a forked process and kill it after ``after`` seconds; whether it had ended by itself.
KILL = """
import os, signal, sys, time
def killed(work, after):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            status = 0
        finally:
            os._exit(status)
    time.sleep(after)
    ended = os.waitpid(child, os.WNOHANG)[0] == child
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return ended
def lasts(work):
    "Seconds that the work takes in a forked process, so that kills are spread over it on any machine."
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return time.monotonic() - start
"""


@pytest.fixture
def commit(hub: HubServer) -> str:
    return hub.add("org/killed", {"model.safetensors": DATA})


def test_downloads_killed_at_many_points(hub, commit, tmp_path):
    """At each point: what the cache then holds is right or absent, and the next load gets the right bytes."""
    hub.fault("/cdn/", chunk=1 << 16, delay=0.004)  # about 70 ms a transfer
    code = f"""
import hashlib, pathlib
import huggingface_hub, zoo_registry.hub as h
huggingface_hub.hf_hub_download, huggingface_hub.get_hf_file_metadata
file = h.HubFile("org/killed", "model.safetensors", {commit!r}, {SHA!r})
whole = lasts(lambda: h.get(file, h.Access(pathlib.Path({str(tmp_path)!r}) / "first")))
seen = []
for i in range(30):
    root = pathlib.Path({str(tmp_path)!r}) / str(i)
    access = h.Access(root)
    killed(lambda: h.get(file, access), whole * i / 25)
    left = h.cached(file, root)
    seen.append(left is not None)
    if left is not None:
        assert hashlib.sha256(left.read_bytes()).hexdigest() == {SHA!r}, i
    if i % 6 == 0:
        # in a process of its own, as after a real kill: the connection pool must not be shared with later forks
        again = os.fork()
        if again == 0:
            ok = False
            try:
                ok = hashlib.sha256(h.get(file, access).read_bytes()).hexdigest() == {SHA!r}
            finally:
                os._exit(0 if ok else 1)
        assert os.waitpid(again, 0)[1] == 0, i
result = seen
"""
    with Client(hub.env(tmp_path / "home")) as client:
        client(KILL)
        seen = client(KILL + code)
    assert not all(seen), "no kill came before the end of the transfer: the test has lost its point"
    assert seen[0] is False
    assert hub.count("GET", "/cdn/") >= 5


def test_a_download_killed_again_and_again_in_one_cache(hub, commit, tmp_path):
    hub.fault("/cdn/", chunk=1 << 16, delay=0.004)
    code = f"""
import hashlib, pathlib, random
import huggingface_hub, zoo_registry.hub as h
huggingface_hub.hf_hub_download, huggingface_hub.get_hf_file_metadata
file = h.HubFile("org/killed", "model.safetensors", {commit!r}, {SHA!r})
access = h.Access({str(tmp_path / "hub")!r})
random.seed(1)
whole = lasts(lambda: h.get(file, h.Access({str(tmp_path / "first")!r})))
for i in range(15):
    killed(lambda: h.get(file, access), whole * random.uniform(0.1, 0.8))
result = hashlib.sha256(h.get(file, access).read_bytes()).hexdigest()
"""
    with Client(hub.env(tmp_path / "home")) as client:
        assert client(KILL + code) == SHA


def test_what_killed_downloads_leave_is_swept_after_a_day(hub, commit, tmp_path):
    blobs = tmp_path / "hub" / "models--org--killed" / "blobs"
    blobs.mkdir(parents=True)
    old, young = blobs / f"{SHA}.aaaaaaaa.incomplete", blobs / f"{SHA}.bbbbbbbb.incomplete"
    for stale in (old, young):
        stale.write_bytes(b"half")
    os.utime(old, (0, 0))
    run(
        "from zoo_registry.store import hub_file; "
        f"hub_file('org/killed', 'model.safetensors', revision={commit!r}, cache_dir={str(tmp_path / 'hub')!r})",
        hub.env(tmp_path / "home"),
    )
    assert not old.exists()
    assert young.exists()


def test_two_processes_at_once(hub, commit, tmp_path):
    hub.fault("/cdn/", chunk=1 << 16, delay=0.01)
    code = (
        "import hashlib\nfrom zoo_registry.store import hub_file, derived\n"
        f"p = hub_file('org/killed', 'model.safetensors', revision={commit!r}, sha256={SHA!r}, "
        f"cache_dir={str(tmp_path / 'hub')!r})\n"
        "d = derived(p, 'copy', lambda t: t.write_bytes(p.read_bytes()[::-1]))\n"
        "result = [hashlib.sha256(p.read_bytes()).hexdigest(), hashlib.sha256(d.read_bytes()).hexdigest(), str(d)]"
    )
    env = hub.env(tmp_path / "home")
    with Client(env) as one, Client(env) as two, Client(env) as three:
        for client in (one, two, three):
            client("import huggingface_hub, zoo_registry.store; huggingface_hub.hf_hub_download")
        for client in (one, two, three):
            client.send(code)
        answers = [client.receive() for client in (one, two, three)]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][:2] == [SHA, hashlib.sha256(DATA[::-1]).hexdigest()]
    assert hub.count("GET", "/cdn/") == 1


def test_two_processes_find_the_same_wrong_file(hub, commit, tmp_path):
    """One moves it aside; neither uses it; both end with an error."""
    code = (
        "from zoo_registry.store import hub_file\n"
        f"hub_file('org/killed', 'model.safetensors', revision={commit!r}, sha256={'0' * 64!r}, "
        f"cache_dir={str(tmp_path / 'hub')!r})"
    )
    env = hub.env(tmp_path / "home")
    errors = []
    with Client(env) as one, Client(env) as two:
        for client in (one, two):
            client("import huggingface_hub, zoo_registry.store; huggingface_hub.hf_hub_download")
        for client in (one, two):
            client.send(code)
        for client in (one, two):
            with pytest.raises(Exception) as caught:
                client.receive()
            errors.append(caught.value.error)  # type: ignore[attr-defined]
    assert errors == ["HashMismatch", "HashMismatch"]
    assert not [f for f in tree(tmp_path / "hub") if "snapshots" in f]


def test_conversions_killed_at_many_points(tmp_path):
    """The derived file is absent or whole, and what was left half-written is removed by the next call."""
    source = tmp_path / "source.pth"
    source.write_bytes(b"source")
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path / "home")}
    code = f"""
import pathlib, time
from zoo_registry import _disk
from zoo_registry.derived import derived, every
source = pathlib.Path({str(source)!r})
folder = _disk.assets() / "derived"
def slowly(path):
    with path.open("wb") as file:
        for i in range(20):
            file.write(bytes([i]) * 1000)
            file.flush()
            time.sleep(0.001)
whole = b"".join(bytes([i]) * 1000 for i in range(20))
half = 0
lasting = lasts(lambda: derived(source, "first", slowly))
for i in range(40):
    key = f"k{{i}}"
    killed(lambda: derived(source, key, slowly), lasting * i / 35)
    for path, _ in every(folder):
        assert path.read_bytes() == whole, i
    half += bool(list(folder.glob(f".{{key}}-*.tmp*")))
    assert derived(source, key, slowly).read_bytes() == whole
    assert not list(folder.glob(".k*.tmp*")), i
result = half
"""
    with Client(env) as client:
        assert client(KILL + code) >= 5  # so many kills came in the middle of writing


def test_a_killed_holder_does_not_keep_the_lock(tmp_path):
    source = Path(tmp_path / "source.pth")
    source.write_bytes(b"source")
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path / "home")}
    code = f"""
import pathlib, time
from zoo_registry.derived import derived
source = pathlib.Path({str(source)!r})
killed(lambda: derived(source, "k", lambda t: (t.write_bytes(b"half"), time.sleep(60))), 0.5)
result = derived(source, "k", lambda t: t.write_bytes(b"whole")).read_text()
"""
    with Client(env) as client:
        assert client(KILL + code) == "whole"
