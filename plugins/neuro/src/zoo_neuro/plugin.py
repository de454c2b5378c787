"""The hooks of the neuro plugin: names only. Nothing here imports torch or a model."""

from __future__ import annotations

ZOO_PLUGIN_API = 1
