"""Cards: everything the zoo knows about a model and about its published weights, as data.

A card never imports the model it describes. The data lives in TOML files beside the plugin's code
(``cards/*.toml``); this module gives it types and checks it. Unknown facts are absent, never guessed:
every optional field defaults to ``None`` and nothing else.

A card file holds one family::

    [defaults]                      # merged into every model of the file (a model's own keys win)
    system = "vim"
    domain = "vision"

    [models.vim_tiny]
    builder = "zoo_vision.vim:Vim"
    config = { embed_dim = 192 }

    [models.vim_tiny.weights.in1k]
    repo_id = "hustvl/Vim-tiny-midclstok"
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

#: Where a reading of a system comes from: its public code, or (none being public) its paper alone.
Faithful = Literal["code", "paper"]
#: File formats that the converter knows. ``torch`` is a pickle, opened with ``weights_only=True`` alone.
Format = Literal["safetensors", "torch", "flax-msgpack", "orbax", "numpy"]


class Metric(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One reported figure. ``source`` says who measured it and where (a table, a README, a script of ours)."""

    name: str
    value: float
    dataset: str
    split: str | None = None
    source: str
    command: str | None = None


class WeightsCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One published checkpoint of one model.

    Exactly one place is given: ``repo_id`` + ``filename`` (the Hub), ``package_file`` (inside the plugin's
    distribution, relative to its import package), or ``where`` (off the Hub: a sentence with the address, so
    that the error can tell the user what to fetch; ``checkpoint=`` then takes the local file).
    """

    tag: str
    licence: str | None = None
    # -- where the bytes are
    repo_id: str | None = None
    filename: str | None = None
    revision: str | None = None  #: a 40-digit commit hash, never a branch
    sha256: str | None = None
    size: int | None = None  #: bytes
    package_file: str | None = None
    where: str | None = None
    # -- what the bytes are
    format: Format = "safetensors"
    subkey: str | None = None  #: where the state dict lies in the file, dotted ("model", "state_dict.net")
    converter: str | None = None  #: system whose reference adapter reads the keys; None: the zoo's own keys
    config: dict[str, Any] = {}  #: overrides of the model card's config that belong to this checkpoint
    # -- how to use them
    labels: str | None = None  #: named label set or a text file of the plugin, one label a line
    num_classes: int | None = None
    preprocess: dict[str, Any] = {}
    metrics: tuple[Metric, ...] = ()
    trained_on: str | None = None
    notes: str | None = None

    @property
    def on_hub(self) -> bool:
        return self.repo_id is not None

    @property
    def loadable(self) -> bool:
        """True when the zoo itself can get the bytes (Hub or package); off-Hub files must be fetched by the user."""
        return self.on_hub or self.package_file is not None


class ModelCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One architecture, by name."""

    name: str
    system: str  #: id of the published system, for example "vim"
    domain: str
    task: str  #: for example "image-classification"
    builder: str  #: import string "module:callable", called with ``**config``
    config: dict[str, Any] = {}
    description: str | None = None
    params: int | None = None  #: exact number of parameters of ``builder(**config)``
    faithful: Faithful = "code"
    paper: str | None = None  #: "arXiv 2401.09417"
    paper_title: str | None = None
    reference_code: str | None = None  #: "hustvl/Vim"
    reference_commit: str | None = None
    licence_code: str | None = None
    input: dict[str, Any] = {}  #: {"shape": [3, 224, 224], "layout": "CHW", "dtype": "float32", "range": ...}
    output: dict[str, Any] = {}
    default_tag: str | None = None
    aliases: tuple[str, ...] = ()
    tiny: dict[str, Any] = {}  #: overrides of config that give a small model, for the contract tests
    tiny_input: dict[str, Any] = {}  #: overrides of ``input`` that belong to ``tiny``
    weights: dict[str, WeightsCard] = {}
    notes: str | None = None
    plugin: str = ""  #: distribution that brought the card; filled in by the registry
