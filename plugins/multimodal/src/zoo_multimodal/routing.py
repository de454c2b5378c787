"""Every token through the linear layer of its modality: one product a modality, over that modality's tokens alone.

Order of reading: which token is whose (:func:`experts_of`, :func:`route`), the product (an operator, so that it can be
compiled and exported although the numbers of tokens are data), the layer (:class:`RoutedLinear`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Linear
from zoo.layers.linear import linear
from zoo_kernels.runtime import exporting


class Routing(NamedTuple):
    """Which tokens are whose, found once and used by every layer.

    order: (tokens,) token numbers, those of modality 0 first, each modality's in the order of the text. bounds:
    (modalities + 1,) on the CPU, where each modality begins in ``order``.
    """

    order: Tensor
    bounds: Tensor

    @property
    def modalities(self) -> int:
        return self.bounds.shape[0] - 1


def experts_of(masks: Tensor) -> Tensor:
    """Modality numbers (tokens,) from masks (modalities, tokens): the lowest whose mask is set, as in the original.

    A token in no mask gets the number of modalities, which :func:`route` refuses.
    """
    return (masks.bool().long().cumsum(0) == 0).sum(0)


def route(modality: Tensor | Routing, n_modalities: int, tokens: int) -> Routing:
    """The routing of ``tokens`` tokens.

    modality: numbers from 0, of any shape with that many entries ((batch, length): token b * length + t); masks
    (n_modalities, tokens) of bool or uint8; or a routing, returned as it is. Raises ValueError for another count and
    for a token of no modality.
    """
    if isinstance(modality, Routing):
        if modality.order.shape[0] != tokens or modality.modalities != n_modalities:
            raise ValueError(
                f"the routing is of {modality.order.shape[0]} tokens and {modality.modalities} modalities; expected "
                f"{tokens} and {n_modalities}"
            )
        return modality
    if modality.dtype in (torch.bool, torch.uint8):
        if modality.shape != (n_modalities, tokens):
            raise ValueError(
                f"the masks have shape {tuple(modality.shape)}; expected (modalities, batch * length) = "
                f"({n_modalities}, {tokens})"
            )
        modality = experts_of(modality)
    if modality.is_floating_point() or modality.numel() != tokens:
        raise ValueError(
            f"modality is {modality.dtype} of shape {tuple(modality.shape)}; expected one integer for each of {tokens} "
            "tokens, or masks of bool"
        )
    expert = modality.reshape(-1)
    if exporting():  # which has no error for a token of no modality
        ends = (expert[:, None] <= torch.arange(n_modalities, device=expert.device)).sum(0)
        return Routing(expert.argsort(stable=True), torch.cat([torch.zeros_like(ends[:1]), ends]))
    order, bounds = _route(expert, n_modalities)
    return Routing(order, bounds)


@torch.library.custom_op("zoo_multimodal::route", mutates_args=())
def _route(expert: Tensor, n_modalities: int) -> tuple[Tensor, Tensor]:
    kinds = torch.arange(n_modalities, device=expert.device)
    counts = (expert == kinds[:, None]).sum(1).cpu()  # the one wait for the device of a forward pass
    if int(counts.sum()) != expert.shape[0]:
        wrong = int(((expert < 0) | (expert >= n_modalities)).nonzero()[0])
        raise ValueError(
            f"token {wrong} belongs to no modality (its number is {int(expert[wrong])}); expected 0 to "
            f"{n_modalities - 1} for every token, or a mask that holds it"
        )
    bounds = torch.zeros(n_modalities + 1, dtype=torch.long)
    torch.cumsum(counts, 0, out=bounds[1:])
    return expert.argsort(stable=True), bounds


@_route.register_fake
def _(expert: Tensor, n_modalities: int) -> tuple[Tensor, Tensor]:
    order = torch.empty_like(expert, dtype=torch.long)
    return order, torch.empty(n_modalities + 1, dtype=torch.long, device="cpu")


# -- the product


def _pieces(order: Tensor, bounds: Tensor) -> Iterator[tuple[int, Tensor | None]]:
    """The modalities that have tokens: (number, its tokens; None: all there are)."""
    where = bounds.tolist()
    for m in range(len(where) - 1):
        if where[m + 1] > where[m]:
            yield m, None if where[m + 1] - where[m] == order.shape[0] else order[where[m] : where[m + 1]]


@torch.library.custom_op("zoo_multimodal::routed_linear", mutates_args=())
def _routed_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor], order: Tensor, bounds: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], weights[0].shape[0])
    with torch.no_grad():
        for m, rows in _pieces(order, bounds):
            bias = biases[m] if biases else None
            if rows is None:
                return linear(x, weights[m], bias)
            y.index_copy_(0, rows, linear(x.index_select(0, rows), weights[m], bias))
    return y


@_routed_linear.register_fake
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor], order: Tensor, bounds: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights[0].shape[0])


@torch.library.custom_op("zoo_multimodal::routed_linear_backward", mutates_args=())
def _routed_linear_backward(
    gradient: Tensor, x: Tensor, weights: list[Tensor], has_bias: bool, order: Tensor, bounds: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    of_x = torch.empty_like(x)
    of_weights = [torch.zeros_like(w) for w in weights]
    of_biases = [w.new_zeros(w.shape[0]) for w in weights] if has_bias else []
    with torch.no_grad():
        for m, rows in _pieces(order, bounds):
            g = gradient if rows is None else gradient.index_select(0, rows)
            own = x if rows is None else x.index_select(0, rows)
            of_weights[m] = linear(g.t(), own.t())
            if has_bias:
                of_biases[m] = g.sum(0)
            back = linear(g, weights[m].t())
            if rows is None:
                of_x = back
            else:
                of_x.index_copy_(0, rows, back)
    return of_x, of_weights, of_biases


@_routed_linear_backward.register_fake
def _(gradient, x, weights, has_bias, order, bounds):
    biases = [w.new_empty(w.shape[0]) for w in weights] if has_bias else []
    return torch.empty_like(x), [torch.empty_like(w) for w in weights], biases


def _save(ctx, inputs, output) -> None:
    x, weights, biases, order, bounds = inputs
    ctx.has_bias, ctx.count = bool(biases), len(weights)
    ctx.save_for_backward(x, *weights, order, bounds)


def _backward(ctx, gradient: Tensor):
    x, *weights, order, bounds = ctx.saved_tensors
    of_x, of_weights, of_biases = _routed_linear_backward(
        gradient.contiguous(), x, list(weights), ctx.has_bias, order, bounds
    )
    return of_x, of_weights, of_biases, None, None


_routed_linear.register_autograd(_backward, setup_context=_save)


# -- the layer


def _plainly(x: Tensor, weights: list[Tensor], biases: list[Tensor], order: Tensor, bounds: Tensor) -> Tensor:
    """The product for exporters: every modality over every token, of which its own are taken."""
    position = torch.arange(order.shape[0], device=order.device)
    expert = torch.zeros_like(order).scatter(0, order, (position[:, None] >= bounds[1:-1]).sum(1))
    products = [F.linear(x, w, biases[m] if biases else None) for m, w in enumerate(weights)]
    y = products[0]
    for m, product in enumerate(products[1:], 1):
        y = torch.where((expert == m)[:, None], product, y)
    return y


class RoutedLinear(nn.ModuleList):
    """One linear layer a modality, ``n_modalities`` of (dim_in) to (dim_out): keys ``0.weight``, ``1.weight`` ...

    A modality without tokens costs nothing, and its gradient is zero.
    """

    def __init__(self, n_modalities: int, dim_in: int, dim_out: int, bias: bool = False, **kind) -> None:
        super().__init__(Linear(dim_in, dim_out, bias=bias, **kind) for _ in range(n_modalities))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (..., dim_in), its tokens in the order of the routing's, to (..., dim_out)."""
        weights: list[Tensor] = [layer.weight for layer in self]  # type: ignore[misc]
        biases: list[Tensor] = [layer.bias for layer in self if layer.bias is not None]  # type: ignore[misc]
        if torch.is_autocast_enabled(x.device.type):  # operators of one's own are not cast by torch
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weights, biases = x.to(dtype), [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
        rows = x.reshape(-1, x.shape[-1])
        product = _plainly if exporting() else _routed_linear
        return product(rows, weights, biases, routing.order, routing.bounds).view(*x.shape[:-1], weights[0].shape[0])
