"""The README.md of a saved model: front matter for the Hub, then what a reader needs, from the cards alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .building import ZooInfo

#: Our tasks that the Hub calls by another name; others are the same, or unknown to it and left out of the front matter.
_HUB_TASKS = {
    "image-classification",
    "image-segmentation",
    "object-detection",
    "image-to-image",
    "text-generation",
    "text-classification",
    "automatic-speech-recognition",
    "audio-classification",
    "image-feature-extraction",
    "time-series-forecasting",
    "reinforcement-learning",
    "graph-ml",
    "unconditional-image-generation",
    "text-to-image",
    "fill-mask",
    "image-text-to-text",
}
_KNOWN_LICENCES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc0-1.0"),
    *("cc-by-nc-sa-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "openrail", "unknown"),
}


def model_card(model: nn.Module, table: Mapping[str, Any], *, notes: str | None = None) -> str:
    """The text of the model card; ``table`` is the content of config.json."""
    from huggingface_hub import ModelCard as HubCard
    from huggingface_hub import ModelCardData

    info = model.zoo_info
    assert isinstance(info, ZooInfo)
    card = info.card
    assert card is not None
    facts = table.get("pretrained_cfg") or {}
    licence = (facts.get("licence") or "").lower() or None
    data: dict[str, Any] = {
        "library_name": "zoo",
        "tags": ["zoo", "state-space-model", card.system, card.domain],
    }
    if licence is not None:
        data["license"] = licence if licence in _KNOWN_LICENCES else "other"
        if data["license"] == "other":
            data["license_name"] = licence
    if card.task in _HUB_TASKS:
        data["pipeline_tag"] = card.task
    if info.weights is not None and info.weights.repo_id is not None:
        data["base_model"] = info.weights.repo_id
    metrics = facts.get("metrics") or []
    if metrics:
        data["datasets"] = sorted({str(m["dataset"]).lower().replace(" ", "-") for m in metrics})
        data["metrics"] = sorted({str(m["name"]).lower().replace(" ", "-") for m in metrics})
        data["model-index"] = [_model_index(card.name, card.task, metrics)]
    front = ModelCardData(**data, ignore_metadata_errors=False)
    return str(HubCard(f"---\n{front.to_yaml()}\n---\n\n{_body(info, table, facts, metrics, notes)}"))


def _model_index(name: str, task: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "results": [
            {
                "task": {"type": task},
                "dataset": {"name": m["dataset"], "type": str(m["dataset"]).lower().replace(" ", "-")},
                "metrics": [{"type": m["name"], "value": m["value"], "name": m["name"]}],
            }
            for m in metrics
        ],
    }


def _body(
    info: ZooInfo, table: Mapping[str, Any], facts: Mapping[str, Any], metrics: list[dict[str, Any]], notes: str | None
) -> str:
    card = info.card
    assert card is not None
    lines = [f"# {info.name}", ""]
    lines += [card.description or f"{card.name}, a model of the system {card.system}.", ""]
    if notes:
        lines += [notes.strip(), ""]
    lines += [
        "## Use",
        "",
        "```python",
        "import zoo",
        "",
        'model = zoo.load("hf-hub:ORGANISATION/REPOSITORY")  # or the path of this folder, as "./folder"',
        "```",
        "",
        f"It needs the plugin `{card.plugin}`: `pip install ssm-zoo {card.plugin}`.",
        "",
        "## Inputs and outputs",
        "",
        f"- task: {card.task}",
        *(f"- input, {k}: {v}" for k, v in card.input.items()),
        *(f"- output, {k}: {v}" for k, v in card.output.items()),
        *(f"- preprocessing, {k}: {_brief(v)}" for k, v in (facts.get("preprocess") or {}).items()),
        "",
        "## Configuration",
        "",
        *(f"- `{k}`: `{v!r}`" for k, v in (table.get("model_args") or {}).items()),
        "",
    ]
    if metrics:
        lines += ["## Results", "", "| metric | value | data | source |", "|---|---|---|---|"]
        for m in metrics:
            data = " ".join(filter(None, (m["dataset"], m.get("split"))))
            lines.append(f"| {m['name']} | {m['value']} | {data} | {m.get('source', '')} |")
        lines.append("")
    lines += ["## Origin", "", f"- weights: {published(info.source)}"]
    lines += [f"- changed: {change}" for change in info.changes]
    lines += [f"- {title}: {value}" for title, value in _origin(card, facts) if value]
    return "\n".join(lines) + "\n"


def _brief(value: Any) -> str:
    """A setting as a reader can take it in; a tokenizer is a megabyte."""
    text = str(value)
    return text if len(text) <= 300 else f"{len(text)} characters, in config.json"


def published(source: str) -> str:
    """Where weights came from, as others may read it: without the folders of the machine that wrote it."""
    if source.startswith("the file "):
        return f"the file {Path(source.removeprefix('the file ')).name}"
    if " files in " in source:
        count, _, folder = source.partition(" files in ")
        return f"{count} files in {Path(folder).name}"
    return "made here, from random ones" if source == "random weights" else source


def _origin(card: Any, facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    commit = f" at {card.reference_commit}" if card.reference_commit else ""
    return [
        ("licence of the weights", facts.get("licence") or "not stated"),
        ("licence of the original code", card.licence_code),
        ("trained on", facts.get("trained_on")),
        ("paper", " ".join(filter(None, (card.paper, card.paper_title)))),
        ("original code", f"{card.reference_code}{commit}" if card.reference_code else None),
        ("notes", facts.get("notes")),
    ]
