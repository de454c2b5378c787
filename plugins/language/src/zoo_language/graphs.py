"""Decoding with CUDA graphs: a step of the model is recorded once for each batch size and then replayed.

A step of a small model is hundreds of kernels of a few microseconds; replaying them takes the processor, which would
start each, out of the way. A recorded step reads and writes fixed memory, so the decoder owns its tokens, its state and
its logits, and states go in and out of it by copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import CausalLM
from .state import State

logger = logging.getLogger("zoo")

#: Records a function that works on fixed memory; calling the result does the same work again.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def capture_cuda(function: Callable[[], None]) -> Callable[[], None]:
    """``function`` as a CUDA graph. It must have run before: nothing may be compiled in it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@dataclass
class _Recorded:
    tokens: Tensor
    state: State
    logits: Tensor
    replay: Callable[[], None]


class GraphDecoder:
    """``state = decoder.adopt(state)``, then ``decoder.step(tokens, state)``, in place of ``model.step``.

    The adopted state is the decoder's own memory: it stays valid until another of its batch size is adopted
    (:meth:`State.fork` or ``select`` to keep one). The model's parameters may change in place, not be replaced.
    ``capture``: how a step is recorded. Raises ValueError, with the reason, for models whose step cannot be.
    """

    def __init__(self, model: CausalLM, capture: Capture = capture_cuda) -> None:
        self.model, self.capture = model, capture
        self.recorded: dict[int, _Recorded] = {}

    @torch.no_grad()
    def adopt(self, state: State) -> State:
        """The decoder's state of that batch size, filled with ``state``; records the step where it is the first."""
        own = self.recorded.get(state.batch)
        if own is None:
            own = self.recorded[state.batch] = self._record(state)
        if state is not own.state:
            _copy(state, own.state)
        return own.state

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> Tensor:
        """Read one token of each text, (batch,) ids; returns the next token's logits. ``state`` must be adopted."""
        own = self.recorded.get(state.batch)
        if own is None or own.state is not state:
            raise ValueError("this state is not the decoder's own; use what adopt(state) returned")
        own.tokens.copy_(tokens)
        own.replay()
        return own.logits

    def _record(self, example: State) -> _Recorded:
        if example.logits is None:
            raise ValueError("the state has read nothing yet; prefill it before decoding")
        state = example.fork()
        logits = state.logits
        assert logits is not None
        tokens = torch.zeros(state.batch, dtype=torch.long, device=example.position.device)
        fixed = [dict(layer) for layer in state.layers]

        def step() -> None:
            found = self.model.step(tokens, state)
            # What the model put in place of its tensors goes back into the fixed ones.
            for i, (layer, own) in enumerate(zip(state.layers, fixed, strict=True)):
                for key, tensor in own.items():
                    if layer[key].shape != tensor.shape:
                        raise ValueError(
                            f"a step of {type(self.model).__name__} cannot be recorded: {key} of layer {i} grows with "
                            "the text (attention's cache); decode without CUDA graphs"
                        )
                    if layer[key] is not tensor:
                        tensor.copy_(layer[key])
                layer.update(own)
            logits.copy_(found)
            state.logits = logits

        self._warm_up(step, tokens.device)
        return _Recorded(tokens, state, logits, self.capture(step))

    @staticmethod
    def _warm_up(step: Callable[[], None], device: torch.device) -> None:
        """Run before recording, on a stream of its own, as torch asks: kernels are compiled, memory is found."""
        if device.type != "cuda":
            step()
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)


def graph_decoder_for(model: CausalLM) -> GraphDecoder | None:
    """A decoder for a model on a CUDA device; None, with a message, for others."""
    if model.device.type != "cuda":
        logger.warning("CUDA graphs were asked for, but the model is on %s: decoding step by step", model.device)
        return None
    if getattr(model, "hf_device_map", None) is not None and len(set(model.hf_device_map.values())) > 1:
        logger.warning("CUDA graphs were asked for, but the model is spread by device_map: decoding step by step")
        return None
    return GraphDecoder(model)


def _copy(source: State, target: State) -> None:
    for theirs, ours in zip(source.layers, target.layers, strict=True):
        for key, tensor in ours.items():
            tensor.copy_(theirs[key])
    target.position.copy_(source.position)
    assert source.logits is not None
    assert target.logits is not None
    target.logits.copy_(source.logits)
