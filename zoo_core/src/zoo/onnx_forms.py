"""What torch's ONNX exporter leaves undone: operators that it does not translate, complex numbers made of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx


def table() -> dict[Any, Callable[..., Any]]:
    """For ``torch.onnx.export(custom_translation_table=)``. Needs onnxscript."""
    import onnxscript

    op: Any = onnxscript.opset20

    def sort(x: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        """TopK of all: ONNX breaks ties by the lower index, as a stable sort does."""
        count = op.Reshape(op.Gather(op.Shape(x), op.Constant(value_int=dim), axis=0), op.Constant(value_ints=[1]))
        return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)

    return {torch.ops.aten.sort.stable: sort}


def has_complex_numbers(program: torch.export.ExportedProgram) -> bool:
    return any(_is_complex(node.meta.get("val")) for node in program.graph.nodes)


def complex_constants(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The module of a program, in which what follows from weights alone, by way of complex numbers, is computed.

    The kernels of the S4 family are such: ONNX knows few operators on complex numbers, and needs none of them then.
    """
    module: Any = program.module()
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # it keeps what it looks at
            module.graph.erase_node(node)
    constants: dict[fx.Node, Any] = {}
    by_complex: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = _attribute(module, str(node.target))
            if isinstance(value, Tensor):
                constants[node] = value
        elif _computable(node) and all(parent in constants for parent in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), constants.__getitem__)
            constants[node] = node.target(*args, **kwargs)
        if node in constants and (
            _is_complex(constants[node]) or any(parent in by_complex for parent in node.all_input_nodes)
        ):
            by_complex.add(node)
    for node in by_complex:
        if node.op == "get_attr" or not isinstance(constants[node], Tensor):
            continue
        if all(user in constants for user in node.users):
            continue
        name = f"constant_{node.name}"
        module.register_buffer(name, constants[node].contiguous())
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(name))
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _computable(node: fx.Node) -> bool:
    """Whether a node has the same value in every run if its inputs have."""
    target: Any = node.target
    if node.op != "call_function":
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", "") == "getitem"
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable


def _is_complex(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_complex()


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module
