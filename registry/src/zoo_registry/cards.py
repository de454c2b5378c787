"""Cards: everything the zoo knows about a model and about its published weights, as data.

A card never imports the model it describes. The data lives in TOML files beside the plugin's code
(``cards/*.toml``, read by :func:`zoo_registry.load_cards`); this module gives it types and checks it. Unknown facts
are absent, never guessed: every optional field defaults to ``None`` and nothing else.

A card file holds one family::

    [defaults]                      # merged into every model of the file (a model's own keys win)
    system = "vim"
    domain = "vision"

    [weights_defaults]              # merged into every weights card of the file
    licence = "apache-2.0"

    [models.vim_tiny]
    builder = "zoo_vision.vim:Vim"
    config = { embed_dim = 192 }

    [models.vim_tiny.weights.in1k]
    repo_id = "hustvl/Vim-tiny-midclstok"

A card that breaks a rule cannot be built: the constructors raise ``ValueError`` with the field and the rule.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

#: Where a reading of a system comes from: its public code, or (none being public) its paper alone.
Faithful = Literal["code", "paper"]
#: File formats that the converter knows. ``torch`` is a pickle, opened with ``weights_only=True`` alone.
Format = Literal["safetensors", "torch", "flax-msgpack", "orbax", "numpy"]
DType = Literal["float32", "bfloat16", "float16"]

#: Names of models, systems and domains: lower case, digits, underscores, beginning with a letter.
NAME = re.compile(r"[a-z][a-z0-9_]*")
#: Tags may begin with a digit ("100k") and hold dashes never.
TAG = re.compile(r"[a-z0-9][a-z0-9_]*")
TASK = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
IMPORT_STRING = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
REVISION = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def _require(pattern: re.Pattern[str], value: str | None, field: str, rule: str) -> None:
    if value is not None and not pattern.fullmatch(value):
        raise ValueError(f"{field} is {value!r}; expected {rule}")


def _inside(path: str | None, field: str) -> None:
    """Paths on cards are relative, with forward slashes, and stay inside their repository or package."""
    if path is None:
        return
    parts = path.split("/")
    if not path or path.startswith("/") or "\\" in path or ":" in path or any(p in ("", ".", "..") for p in parts):
        raise ValueError(f"{field} is {path!r}; expected a relative path with forward slashes and without '..'")


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
    shard_sha256: dict[str, str] = {}  #: file name -> digest, where ``filename`` is the index of several shards
    package_file: str | None = None
    where: str | None = None
    # -- what the bytes are
    format: Format = "safetensors"
    subkey: str | None = None  #: where the state dict lies in the file, dotted ("model", "state_dict.net")
    converter: str | None = None  #: system whose reference adapter reads the keys; None: the zoo's own keys
    config: dict[str, Any] = {}  #: overrides of the model card's config that belong to this checkpoint
    config_file: str | None = None  #: JSON in the repository with the original's own configuration, which then counts
    # -- how to use them
    dtype: DType | None = None  #: what stored numbers become on loading; None: they stay as they are
    labels: str | None = None  #: named label set or a text file of the plugin, one label a line
    num_classes: int | None = None
    preprocess: dict[str, Any] = {}
    companions: dict[str, tuple[str, ...]] = {}  #: Hub repository -> files that answering asks it for (a tokenizer)
    metrics: tuple[Metric, ...] = ()
    trained_on: str | None = None
    notes: str | None = None

    def __post_init__(self) -> None:
        _require(TAG, self.tag, "tag", "lower case, digits, underscores")
        places = [f for f in ("repo_id", "package_file", "where") if getattr(self, f) is not None]
        if len(places) != 1:
            raise ValueError(
                f"the bytes of {self.tag!r} have {len(places)} places ({', '.join(places) or 'none'}); expected "
                "exactly one of repo_id with filename (the Hub), package_file (inside the plugin), where (a sentence "
                "with the address off the Hub)"
            )
        if (self.repo_id is None) != (self.filename is None):
            raise ValueError("repo_id and filename belong together; one of them is missing")
        if self.repo_id is None and self.revision is not None:
            raise ValueError("revision is given without repo_id")
        _require(REPO_ID, self.repo_id, "repo_id", "'organisation/repository'")
        _require(REVISION, self.revision, "revision", "a commit hash of 40 hexadecimal digits, never a branch or tag")
        _require(SHA256, self.sha256, "sha256", "64 lower-case hexadecimal digits")
        for name, digest in self.shard_sha256.items():
            _inside(name, "shard_sha256")
            _require(SHA256, digest, f"shard_sha256[{name!r}]", "64 lower-case hexadecimal digits")
        if self.shard_sha256 and not self.sharded:
            raise ValueError(f"shard_sha256 is given, but filename {self.filename!r} is no index ('*.index.json')")
        for repo_id, names in self.companions.items():
            _require(REPO_ID, repo_id, "companions", "'organisation/repository'")
            for name in names:
                _inside(name, f"companions[{repo_id!r}]")
        _inside(self.filename, "filename")
        _inside(self.package_file, "package_file")
        _inside(self.config_file, "config_file")
        if self.config_file is not None and (self.repo_id is None or self.converter is None):
            raise ValueError(
                "config_file is given without repo_id, where it lies, or converter, whose adapter reads it"
            )
        if self.size is not None and self.size <= 0:
            raise ValueError(f"size is {self.size}; expected a positive number of bytes")
        if self.num_classes is not None and self.num_classes < 0:
            raise ValueError(f"num_classes is {self.num_classes}; expected zero or more")
        if self.where is not None and not self.where.strip():
            raise ValueError("where is empty; expected a sentence with the address of the file")

    @property
    def sharded(self) -> bool:
        """True when ``filename`` is an index that names the files holding the tensors."""
        return (self.filename or self.package_file or "").endswith(".index.json")

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
    aliases: tuple[str, ...] = ()  #: other names, as good as the first ("vim_tiny" for its usual resolution)
    former_names: tuple[str, ...] = ()  #: names of earlier versions; they work, with a warning
    tiny: dict[str, Any] = {}  #: overrides of config that give a small model, for the contract tests
    tiny_input: dict[str, Any] = {}  #: overrides of ``input`` that belong to ``tiny``
    weights: dict[str, WeightsCard] = {}
    notes: str | None = None
    plugin: str = ""  #: distribution that brought the card; filled in by the registry
    package: str = ""  #: import package whose files ``package_file`` and ``labels`` name; filled in by load_cards

    def __post_init__(self) -> None:
        _require(NAME, self.name, "name", "lower case, digits, underscores, beginning with a letter")
        _require(NAME, self.system, "system", "lower case, digits, underscores, beginning with a letter")
        _require(NAME, self.domain, "domain", "lower case, digits, underscores, beginning with a letter")
        _require(TASK, self.task, "task", "lower-case words joined by dashes, as 'image-classification'")
        _require(IMPORT_STRING, self.builder, "builder", "an import string 'package.module:callable'")
        for field in ("aliases", "former_names"):
            for alias in getattr(self, field):
                _require(NAME, alias, field, "lower case, digits, underscores, beginning with a letter")
                if alias == self.name:
                    raise ValueError(f"{field} holds the model's own name {alias!r}")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"aliases and former_names hold a name twice: {', '.join(self.names[1:])}")
        for key, weights in self.weights.items():
            if key != weights.tag:
                raise ValueError(f"weights[{key!r}] has tag {weights.tag!r}; expected the same name in both places")
        if self.default_tag is not None and self.default_tag not in self.weights:
            raise ValueError(
                f"default_tag is {self.default_tag!r}; the model has {', '.join(self.weights) or 'no weights'}"
            )
        if self.params is not None and self.params < 0:
            raise ValueError(f"params is {self.params}; expected zero or more")
        if self.reference_code is None and self.reference_commit is not None:
            raise ValueError("reference_commit is given without reference_code")

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that finds this card, its own first."""
        return (self.name, *self.aliases, *self.former_names)

    @property
    def default_weights(self) -> WeightsCard | None:
        """What the untagged name means: ``default_tag``, else the first weights of the card that can be loaded, else
        the first; None for a model without weights."""
        if self.default_tag is not None:
            return self.weights[self.default_tag]
        every = list(self.weights.values())
        return next((w for w in every if w.loadable), every[0] if every else None)

    def full_name(self, weights: WeightsCard | None = None) -> str:
        """``arch.tag``, or ``arch`` where there are no weights."""
        return f"{self.name}.{weights.tag}" if weights is not None else self.name
