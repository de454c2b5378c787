"""Every system that can be loaded is in the documentation, and the documentation names no model that is not there."""

import re
from pathlib import Path

import pytest

import zoo.testing
from zoo_registry import query

ROOT = Path(__file__).parents[2]
SYSTEMS = sorted({entry.card.system for entry in query("*")})


@pytest.mark.parametrize("system", SYSTEMS)
def test_system_is_documented(system):
    assert f"`{system}`" in (ROOT / "docs" / "systems.md").read_text(encoding="utf-8"), (
        f"docs/systems.md has no row for the system {system}"
    )


def test_documented_models_exist():
    names = set(zoo.testing.model_names())
    known = names | {alias for entry in query("*") for alias in entry.card.aliases} | set(SYSTEMS)
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8") + (ROOT / "README.md").read_text(
        encoding="utf-8"
    )
    for found in re.findall(r'zoo\.(?:load|create|pipeline|info)\("([\w.]+)"', text):
        assert found.split(".")[0] in known, f"the documentation loads {found!r}, which is no model"
