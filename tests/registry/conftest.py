"""Fixtures of the registry's tests. ``hub_server`` and ``clients`` beside this file are imported by name."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from clients import DATA, Client  # noqa: E402
from hub_server import HubServer  # noqa: E402

from zoo_registry import Manager, ModelCard, hookimpl  # noqa: E402


def make_card(name: str = "toy_small", **fields: Any) -> ModelCard:
    base: dict[str, Any] = {
        "name": name,
        "system": "toy",
        "domain": "toys",
        "task": "image-classification",
        "builder": "toys.models:Toy",
    }
    return ModelCard(**(base | fields))


def make_plugin(name: str = "toys", *, api: Any = 1, **hooks: Any) -> types.ModuleType:
    """A plugin module in memory. Hooks by name: a function, or the value that the hook answers with."""
    module = types.ModuleType(name)
    module.ZOO_PLUGIN_API = api  # type: ignore[attr-defined]
    for hook, answer in hooks.items():
        function = answer if callable(answer) else (lambda answer=answer: answer)
        function.__name__ = hook
        setattr(module, hook, hookimpl(function))
    return module


@pytest.fixture
def plugins() -> Manager:
    """A manager without installed plugins."""
    return Manager([], env={})


@pytest.fixture
def card() -> Callable[..., ModelCard]:
    return make_card


@pytest.fixture
def plugin() -> Callable[..., types.ModuleType]:
    return make_plugin


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture
def hub(server: HubServer) -> Iterator[HubServer]:
    """The module's Hub, without faults."""
    server.heal()
    yield server
    server.heal()


@pytest.fixture(scope="module")
def shared_client(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    home = tmp_path_factory.mktemp("hf")
    with Client(server.env(home, HF_HUB_ETAG_TIMEOUT="3", HF_HUB_DOWNLOAD_TIMEOUT="2")) as client:
        client("import zoo_registry.store, huggingface_hub; huggingface_hub.hf_hub_download")
        yield client


@pytest.fixture
def client(shared_client: Client) -> Client:
    return shared_client


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def commit(hub: HubServer) -> str:
    """The newest commit of org/repo."""
    if "org/repo" not in hub.repos:
        hub.add("org/repo", {"model.safetensors": DATA, "config.json": b"{}", "nested/x.bin": b"nested"})
    return hub.repos["org/repo"].refs["main"]
