"""Client processes for tests of the store: the real huggingface_hub reads its environment when it is imported, so
whatever depends on it runs in a process of its own.

``Client`` keeps one process and runs many snippets in it; ``run`` starts a new one for a single snippet.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

#: In the process: run snippets from stdin; the value of ``result``, or the error, goes back as one line of JSON.
_LOOP = """
import json, sys, warnings, traceback
out = sys.stdout
sys.stdout = sys.stderr
for line in sys.stdin:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = {"result": None}
        try:
            exec(json.loads(line), names)
            answer = {"result": names["result"]}
        except BaseException as error:
            answer = {
                "error": type(error).__name__,
                "kinds": [k.__name__ for k in type(error).__mro__],
                "message": str(error),
                "facts": getattr(error, "facts", {}),
                "trace": traceback.format_exc(),
            }
    answer["warnings"] = [[w.category.__name__, str(w.message)] for w in caught]
    out.write(json.dumps(answer, default=str) + "\\n")
    out.flush()
"""


class Failed(Exception):
    """The snippet raised. ``kinds`` are the class names of the error, ``message`` its text."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(answer["trace"])
        self.error: str = answer["error"]
        self.kinds: list[str] = answer["kinds"]
        self.message: str = answer["message"]
        self.facts: dict[str, Any] = answer["facts"]
        self.warnings: list[list[str]] = answer["warnings"]


class Client:
    def __init__(self, env: Mapping[str, str], **options: Any) -> None:
        self.warnings: list[list[str]] = []
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close(); a pipe that nobody reads fills up
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log if options.pop("quiet", True) else None,
            env=dict(env),
            text=True,
            **options,
        )

    def send(self, code: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the client process ended: {self.log.read()}")
        answer = json.loads(line)
        self.warnings = answer["warnings"]
        if "error" in answer:
            raise Failed(answer)
        return answer["result"]

    def __call__(self, code: str) -> Any:
        """Run a snippet; the value it gave to ``result``. Raises Failed."""
        self.send(code)
        return self.receive()

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()  # type: ignore[union-attr]
        self.log.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run(code: str, env: Mapping[str, str], **options: Any) -> Any:
    """One snippet in a new process."""
    with Client(env, **options) as client:
        return client(code)


def tree(folder: Path) -> list[str]:
    """Every file below a folder, for a test that nothing was left behind."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() or p.is_symlink())


# -- one checkpoint of a registry, as the tests of the store use it

#: What the repository org/repo of the fixture ``commit`` holds as model.safetensors.
DATA = bytes(range(256)) * 1200  # 307,200 bytes
SHA = hashlib.sha256(DATA).hexdigest()

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


def refused(client: Client, cache: Path, error: str, **more: Any) -> Failed:
    """``fetch`` must end with this error of the zoo."""
    with pytest.raises(Failed) as caught:
        fetch(client, cache, **more)
    assert caught.value.error == error, str(caught.value)
    return caught.value
