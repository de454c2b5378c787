"""zoo_graph: graph models of the zoo of state-space models: Graph-Mamba and Graph Mamba Networks."""

__version__ = "0.1.0"
