"""Files with graphs in, an answer for every node, graph or pair of nodes out."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.files import refused, whole
from zoo.pipelines import Pipeline, Result
from zoo.runs import seeded
from zoo_registry import errors

from .batching import join
from .encodings import checked_encoding
from .files import EXTENSIONS, Graph, read_graphs, read_links
from .training import settings_for


@dataclass(kw_only=True)
class GraphAnswers(Result):
    """One row for each node, graph or pair of nodes of a file, in its order.

    A row has ``graph``, then ``node`` or ``source`` and ``target``, then ``label`` and ``confidence`` (classes), a
    chance a label (multilabel) or a number an output (regression).
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    level: str = "node"

    def summary(self) -> str:
        what = f"{len(self.rows)} {self.level}s"
        if self.rows and "label" in self.rows[0]:
            counts = Counter(row["label"] for row in self.rows)
            return f"{what}: " + ", ".join(f"{n} {label}" for label, n in counts.most_common(6))
        return what

    @property
    def confidence(self) -> float | None:
        """The mean of the rows' confidence, where they have one."""
        sure = [row["confidence"] for row in self.rows if "confidence" in row]
        return sum(sure) / len(sure) if sure else None

    def save_csv(self, path: str | Path) -> Path:
        """One line a row, with the rows' names as columns."""
        path = Path(path)
        with whole(path) as work, work.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.rows[0]) if self.rows else ["graph"])
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in self.rows)
        return path


class Sample(NamedTuple):
    graphs: list[Graph]
    links: Tensor | None


class GraphPredictions(Pipeline):
    """Graphs from files (see :mod:`zoo_graph.files`) to answers; all graphs of a file go through the model together.

    labels: names of the classes or outputs, for weights whose card has none. links: a table of pairs (source, target)
    for link models. directed: edges count in their own direction only. encoding: "laplacian" or "random-walk", for
    models with ``pe_dim``. Both as in training (``zoo train-graphs``) unless given. seed: of orders and walks that are
    drawn at random, so that an answer can be had again.
    """

    task = "node-classification"
    extensions = EXTENSIONS

    def __init__(
        self,
        model: nn.Module,
        labels: Sequence[str] | None = None,
        links: str | Path | None = None,
        directed: bool | None = None,
        encoding: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model)
        if not hasattr(model, "level"):
            raise errors.BadArgument(f"{type(model).__name__} reads no graphs", argument="model", accepted=[])
        self.level, self.kind = str(model.level), str(model.kind)
        if self.level == "link" and links is None:
            raise ValueError("the model scores pairs of nodes; give links=, a table with the columns source and target")
        if self.level != "link" and links is not None:
            raise errors.BadArgument(
                f"links are for models that score pairs of nodes; {self.name} answers for each {self.level}",
                argument="links",
                accepted=[],
            )
        self.pe_dim = int(model.pe_dim)  # type: ignore[arg-type]
        encoding = checked_encoding(self.pe_dim, encoding, self.preprocess.get("encoding"))
        directed = bool(self.preprocess.get("directed", False)) if directed is None else directed
        self.links, self.directed, self.encoding, self.seed = links, directed, encoding, seed
        count = int(model.out_dim)  # type: ignore[arg-type]
        word = "class" if self.kind == "classification" else "output"
        self.names = list(labels or self.labels() or [f"{word} {i}" for i in range(count)])
        if len(self.names) != count:
            raise ValueError(f"there are {len(self.names)} labels, and the model has {count} outputs; give labels=")
        if len(set(self.names)) != count:
            raise ValueError(f"labels are {', '.join(self.names)}; expected a name of its own for each output")

    def expand(self, inputs: Any) -> tuple[list[Any], bool]:
        """A folder with edges.csv is one sample; other folders are searched, for files and for such folders."""
        if isinstance(inputs, (str, Path)) and (folder := Path(inputs).expanduser()).is_dir():
            if (folder / "edges.csv").is_file():
                return [folder], True
            if tables := {file.parent for file in folder.rglob("edges.csv")}:
                files = [f for f in folder.rglob("*") if self._wanted(f) and f.parent not in tables]
                return sorted([*tables, *files]), False
        if isinstance(inputs, list) and inputs and all(isinstance(g, Graph) for g in inputs):
            return [inputs], True
        if isinstance(inputs, list):
            return [one for entry in inputs for one in self.expand(entry)[0]], False
        return super().expand(inputs)

    def read(self, source: Any) -> Sample:
        """A file, a folder, a :class:`~zoo_graph.files.Graph` or a list of them."""
        if isinstance(source, Graph):
            graphs = [source]
        else:
            graphs = list(source) if isinstance(source, (list, tuple)) else read_graphs(source, directed=self.directed)
        pairs = None
        if self.level == "link" and self.links is not None:
            if len(graphs) != 1:
                raise ValueError(f"{source} holds {len(graphs)} graphs; pairs of nodes are scored in one")
            pairs = torch.from_numpy(read_links(self.links, graphs[0]))
        return Sample(graphs, pairs)

    def prepare(self, sample: Sample) -> dict[str, Tensor]:
        with refused(", ".join(graph.name for graph in sample.graphs[:3])):
            return self._prepared(sample)

    def _prepared(self, sample: Sample) -> dict[str, Tensor]:
        settings = settings_for(self.model)
        batch = join(sample.graphs, **settings, encoding=self.encoding, encoding_size=self.pe_dim)
        for what, found, encoder in (
            ("node", batch.x, self.model.node_encoder),
            ("edge", batch.edge_attr, getattr(self.model, "edge_encoder", None)),
        ):
            wanted = int(encoder.features) if encoder is not None else 0  # type: ignore[union-attr, arg-type]
            have = 0 if found is None else found.shape[1]
            if wanted and have != wanted:
                raise ValueError(f"the file has {have} numbers for every {what}; {self.name} reads {wanted}")
        inputs = {k: v for k, v in batch.inputs().items() if v is not None}
        return inputs if sample.links is None else inputs | {"links": sample.links}

    def collate(self, samples: Sequence[Any]) -> Any:
        """One file at a time: its graphs are a batch already."""
        return list(samples)

    def forward(self, batch: Any) -> list[Tensor]:
        found = []
        for inputs in batch:
            with seeded(self.seed, self.device):
                given = {"x": None, **inputs}
                found.append(self.model(**given))
        return found

    def split(self, output: Any, count: int) -> list[Any]:
        return list(output)

    def finish(self, output: Tensor, sample: Sample) -> GraphAnswers:
        if self.level == "graph":
            keys = [{"graph": g.name} for g in sample.graphs]
        elif sample.links is not None:
            names = sample.graphs[0].nodes
            keys = [{"graph": sample.graphs[0].name, "source": names[a], "target": names[b]} for a, b in sample.links.T]
        else:
            keys = [{"graph": g.name, "node": n} for g in sample.graphs for n in g.nodes]
        rows = [key | self._answer(row) for key, row in zip(keys, output, strict=True)]
        return GraphAnswers(rows=rows, level=self.level)

    def _answer(self, row: Tensor) -> dict[str, Any]:
        if self.kind == "classification":
            share = row.softmax(0)
            best = int(share.argmax())
            return {"label": self.names[best], "confidence": float(share[best])}
        values = row.sigmoid() if self.kind == "multilabel" else row
        return dict(zip(self.names, values.tolist(), strict=True))


class GraphClassification(GraphPredictions):
    task = "graph-classification"


class GraphRegression(GraphPredictions):
    task = "graph-regression"


class NodeRegression(GraphPredictions):
    task = "node-regression"


class LinkPrediction(GraphPredictions):
    task = "link-prediction"
