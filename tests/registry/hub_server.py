"""A small Hub on loopback for tests: enough of the real one's API that the real huggingface_hub client talks to it.

Downloads (``resolve`` with ETag, X-Repo-Commit, Range, redirects of large files to another host), model information,
and uploads (create_repo, upload_folder, create_commit, LFS). Faults are ordered beforehand::

    with HubServer() as hub:
        commit = hub.add("org/repo", {"model.safetensors": data})
        hub.fault("/cdn/", truncate_at=1000, times=1)
        subprocess.run([...], env=hub.env(tmp_path))
        assert hub.count("GET", "/cdn/") == 2
        hub.files("org/repo")["README.md"]

Nothing here imports huggingface_hub or the zoo. Everything lives in memory; the server binds to 127.0.0.1, and what
it calls its storage host is the same port as ``localhost``, which the client treats as a foreign host.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".png", ".msgpack")
TOKEN = "hf_" + "t" * 34


@dataclass
class Fault:
    """What goes wrong with requests whose path contains ``where``. ``times`` None: always."""

    where: str
    method: str | None = None
    times: int | None = None
    status: int | None = None  #: answer with this status and nothing else
    code: str | None = None  #: X-Error-Code
    message: str | None = None  #: X-Error-Message
    retry_after: str | None = None
    drop: bool = False  #: close the connection without an answer
    silent: float = 0.0  #: seconds before the answer begins
    truncate_at: int | None = None  #: promise the whole body, send so many bytes, close
    stall_at: int | None = None  #: send so many bytes, then nothing more
    shrink_to: int | None = None  #: answer, with a fitting Content-Length, as if the file had so many bytes
    corrupt_at: int | None = None  #: flip the byte at this place
    chunk: int = 1 << 16  #: bytes a write
    delay: float = 0.0  #: seconds between writes
    ignore_range: bool = False
    strip: tuple[str, ...] = ()  #: headers to leave out of the answer


@dataclass
class Commit:
    oid: str
    files: dict[str, bytes]
    message: str = "initial commit"


@dataclass
class Repo:
    repo_id: str
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    disabled: bool = False

    def at(self, revision: str) -> Commit | None:
        oid = self.refs.get(revision, revision)
        return next((c for c in self.commits if c.oid == oid), None)


@dataclass
class Request:
    method: str
    path: str
    headers: Message  #: letter case of the names does not count
    body: bytes = b""


class HubServer:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  #: uploaded large files by sha256
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self._stop = threading.Event()
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        server.daemon_threads = True
        server.hub = self  # type: ignore[attr-defined]
        self._server = server
        self.port = server.server_address[1]
        self._thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    # -- life

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def env(self, home: str | Path, **more: str) -> dict[str, str]:
        """The environment of a client process: this Hub, a cache of its own, no token, no proxy, no telemetry."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "ZOO_"))}
        for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            env.pop(proxy, None)
        env |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }
        return env | more

    # -- content

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | None = None,
        *,
        message: str = "add files",
        **flags: Any,
    ) -> str:
        """Commit files to a repository (made when it is new); the commit's hash. Flags: private, gated, disabled."""
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(repo_id))
            for name, value in flags.items():
                setattr(repo, name, value)
            before = repo.at("main")
            merged = {**(before.files if before else {}), **(files or {})}
            return self._commit(repo, merged, message).oid

    def _commit(self, repo: Repo, files: dict[str, bytes], message: str) -> Commit:
        seed = (
            f"{repo.repo_id}{len(repo.commits)}{sorted((n, hashlib.sha256(d).hexdigest()) for n, d in files.items())}"
        )
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), files, message)
        repo.commits.append(commit)
        repo.refs["main"] = commit.oid
        return commit

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repos[repo_id].at(revision)
        assert commit is not None, f"{repo_id} has no revision {revision}"
        return commit.files

    # -- faults and what was asked

    def fault(self, where: str, **how: Any) -> Fault:
        fault = Fault(where, **how)
        self.faults.append(fault)
        return fault

    def heal(self) -> None:
        """Forget all faults and the record of requests."""
        self.faults.clear()
        self.requests.clear()

    def count(self, method: str | None = None, where: str = "") -> int:
        return sum((method is None or r.method == method) and where in r.path for r in self.requests)

    def _fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.where in path and fault.method in (None, method) and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None


def is_large(name: str, data: bytes) -> bool:
    """Whether the Hub would keep a file in large-file storage."""
    return name.endswith(LARGE) or len(data) > 10_000_000


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "TestHub"
    fault: Fault | None = None

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def handle(self) -> None:
        # Clients that go away in the middle are what some tests are about.
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    # -- dispatch

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        body = self._body()
        self.hub.requests.append(Request(method, self.path, self.headers, body))
        fault = self.fault = self.hub._fault_for(method, self.path)
        if fault is not None:
            if fault.silent:
                self.hub._stop.wait(fault.silent)
            if fault.drop:
                self.close_connection = True
                return
            if fault.status is not None:
                self._error(fault.status, fault.code, fault.message, fault.retry_after)
                return
        path = unquote(urlsplit(self.path).path)
        for pattern, methods, handler in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in methods:
                getattr(self, handler)(*match.groups(), body)
                return
        self._error(404, None, f"no route for {method} {path}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # -- answers

    def _headers(self, status: int, headers: Mapping[str, str | int]) -> None:
        strip = {name.lower() for name in self.fault.strip} if self.fault else set()
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in strip:
                self.send_header(name, str(value))
        self.end_headers()

    def _error(self, status: int, code: str | None, message: str | None = None, retry_after: str | None = None) -> None:
        text = json.dumps({"error": message or code or str(status)}).encode()
        headers: dict[str, str | int] = {"Content-Type": "application/json", "Content-Length": len(text)}
        if code:
            headers["X-Error-Code"] = code
        if message:
            headers["X-Error-Message"] = message
        if retry_after:
            headers["Retry-After"] = retry_after
        self._headers(status, headers)
        if self.command != "HEAD":
            self.wfile.write(text)

    def _json(self, value: Any) -> None:
        text = json.dumps(value).encode()
        self._headers(200, {"Content-Type": "application/json", "Content-Length": len(text)})
        if self.command != "HEAD":
            self.wfile.write(text)

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo | None:
        """The repository if this client may see it; otherwise the Hub's own answers."""
        repo = self.hub.repos.get(repo_id)
        signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.headers.get("Authorization") and not signed_in:
            self._error(401, None, "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and not signed_in):
            self._error(404 if signed_in else 401, "RepoNotFound", "Repository not found")
        elif repo.disabled:
            self._error(403, None, "Access to this resource is disabled.")
        elif write and not signed_in:
            self._error(401, None, "Invalid username or password.")
        elif repo.gated and not signed_in:
            self._error(401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        else:
            return repo
        return None

    def _content(self, data: bytes, headers: dict[str, str | int]) -> None:
        """A body, with Range and with whatever fault was ordered."""
        fault = self.fault or Fault("")
        start, status = 0, 200
        data = data[: fault.shrink_to]
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if requested and not fault.ignore_range:
            start = int(requested[1])
            end = int(requested[2]) + 1 if requested[2] else len(data)
            if start >= len(data):
                self._headers(416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": 0})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{min(end, len(data)) - 1}/{len(data)}"
            data = data[:end]
        if fault.corrupt_at is not None:
            changed = bytearray(data)
            changed[fault.corrupt_at] ^= 0xFF
            data = bytes(changed)
        body = data[start:]
        self._headers(status, headers | {"Content-Length": len(body), "Accept-Ranges": "bytes"})
        if self.command == "HEAD":
            return
        stop = len(body)
        for limit in (fault.truncate_at, fault.stall_at):
            if limit is not None:
                stop = min(stop, max(0, limit - start))
        for at in range(0, stop, fault.chunk):
            self.wfile.write(body[at : min(at + fault.chunk, stop)])
            if fault.delay:
                self.wfile.flush()
                time.sleep(fault.delay)
        if stop < len(body):
            self.wfile.flush()
            if fault.stall_at is not None:
                self.hub._stop.wait(60)
            self.close_connection = True

    # -- downloads

    def _resolve(self, repo_id: str, revision: str, name: str, _: bytes) -> None:
        repo = self._repo(repo_id)
        if repo is None:
            return
        commit = repo.at(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        data = commit.files.get(name)
        if data is None:
            self._headers(
                404,
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit.oid}
                | {"Content-Length": 0},
            )
            return
        headers: dict[str, str | int] = {"X-Repo-Commit": commit.oid}
        if is_large(name, data):
            oid = hashlib.sha256(data).hexdigest()
            headers |= {
                "X-Linked-Etag": f'"{oid}"',
                "X-Linked-Size": len(data),
                "Location": f"http://localhost:{self.hub.port}/cdn/{oid}",
                "Content-Length": 0,
            }
            self.hub.blobs[oid] = data
            self._headers(302, headers)
        else:
            self._content(data, headers | {"ETag": f'"{git_oid(data)}"'})

    def _cdn(self, oid: str, _: bytes) -> None:
        data = self.hub.blobs.get(oid)
        if data is None:
            self._error(404, None, "no such object")
        else:
            self._content(data, {"ETag": f'"{oid}"'})

    def _info_main(self, repo_id: str, body: bytes) -> None:
        self._info(repo_id, None, body)

    def _info(self, repo_id: str, revision: str | None, _: bytes) -> None:
        repo = self._repo(repo_id)
        if repo is None:
            return
        commit = repo.at(revision or "main")
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        self._json(
            {
                **{"_id": "0" * 24, "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0]},
                **{"sha": commit.oid, "private": repo.private, "gated": repo.gated, "disabled": False},
                **{"downloads": 0, "likes": 0, "tags": [], "lastModified": "2026-01-01T00:00:00.000Z"},
                "siblings": [self._entry(n, d) for n, d in sorted(commit.files.items())],
            }
        )

    @staticmethod
    def _entry(name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_oid(data)}
        if is_large(name, data):
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _tree(self, repo_id: str, revision: str, _: bytes) -> None:
        repo = self._repo(repo_id)
        if repo is None:
            return
        commit = repo.at(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        entries = []
        for name, data in sorted(commit.files.items()):
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
            if is_large(name, data):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    # -- uploads

    def _whoami(self, _: bytes) -> None:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            self._json({"type": "user", "name": "tester", "fullname": "Tester", "orgs": [], "auth": {}})
        else:
            self._error(401, None, "Invalid username or password.")

    def _create(self, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(401, None, "Invalid username or password.")
            return
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        if repo_id in self.hub.repos:
            text = json.dumps(
                {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}
            ).encode()
            self._headers(409, {"Content-Type": "application/json", "Content-Length": len(text)})
            self.wfile.write(text)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add(repo_id, {".gitattributes": b""}, message="initial commit", private=private)
        self._json({"url": f"{self.hub.url}/{repo_id}", "id": repo_id, "name": repo_id})

    def _preupload(self, repo_id: str, revision: str, body: bytes) -> None:
        repo = self._repo(repo_id, write=True)
        if repo is None:
            return
        commit = repo.at(revision)
        modes = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LARGE) or file["size"] > 10_000_000
            old = commit.files.get(file["path"]) if commit else None
            oid = None
            if old is not None:
                oid = hashlib.sha256(old).hexdigest() if large else git_oid(old)
            modes.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self._json({"files": modes})

    def _lfs_batch(self, repo_id: str, body: bytes) -> None:
        if self._repo(repo_id, write=True) is None:
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._error(400, None, "the body does not have the promised digest")
            return
        self.hub.blobs[oid] = body
        self._headers(200, {"Content-Length": 0})

    def _make_commit(self, repo_id: str, revision: str, body: bytes) -> None:
        repo = self._repo(repo_id, write=True)
        if repo is None:
            return
        before = repo.at(revision)
        if before is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files, message = dict(before.files), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    self._error(400, None, f"{value['path']} was not uploaded")
                    return
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif item["key"] == "deletedFolder":
                files = {n: d for n, d in files.items() if not n.startswith(value["path"].rstrip("/") + "/")}
        with self.hub.lock:
            commit = self.hub._commit(repo, files, message)
        answer = {
            "success": True,
            "commitOid": commit.oid,
            "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit.oid}",
        }
        if parse_qs(urlsplit(self.path).query).get("create_pr"):
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/1"
        self._json(answer)

    def _validate_yaml(self, _: bytes) -> None:
        self._json({"errors": [], "warnings": []})


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (rf"/{_ID}/resolve/([^/]+)/(.+)", ("HEAD", "GET"), "_resolve"),
    (r"/cdn/(\w+)", ("HEAD", "GET"), "_cdn"),
    (rf"/api/models/{_ID}", ("GET",), "_info_main"),
    (rf"/api/models/{_ID}/revision/([^/]+)", ("GET",), "_info"),
    (rf"/api/models/{_ID}/tree/([^/]+)", ("GET",), "_tree"),
    (r"/api/whoami-v2", ("GET",), "_whoami"),
    (r"/api/repos/create", ("POST",), "_create"),
    (rf"/api/models/{_ID}/preupload/([^/]+)", ("POST",), "_preupload"),
    (rf"/{_ID}\.git/info/lfs/objects/batch", ("POST",), "_lfs_batch"),
    (r"/lfs/(\w+)", ("PUT",), "_lfs_put"),
    (rf"/api/models/{_ID}/commit/([^/]+)", ("POST",), "_make_commit"),
    (r"/api/validate-yaml", ("POST",), "_validate_yaml"),
)
