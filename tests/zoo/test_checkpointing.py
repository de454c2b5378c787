"""Gradient checkpointing: the parts that every model is made of."""

import copy

import pytest
import torch
from torch import nn

from zoo.layers import GradCheckpointing, Mamba, Recomputed, recompute


class Block(Recomputed):
    """Something of all that blocks do: dropout, running statistics, a state, tuples, keyword arguments."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(8) if norm else nn.LayerNorm(8)
        self.calls = 0

    def forward(self, x, parts=(), *, scale=None, state=None):
        if not torch.compiler.is_compiling():  # a count is no part of a graph
            self.calls += 1
        if state is not None:
            x = x + state["seen"]
            state["seen"] = x.detach().clone()
        y = self.drop(self.norm(self.linear(x)).relu())
        y = y if scale is None else y * scale
        return x + sum(parts, start=y), y


class Model(GradCheckpointing, nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(norm) for _ in range(3))

    def forward(self, x, state=None):
        parts = []
        for block in self.blocks:
            x, y = block(x, list(parts), scale=x.mean(), state=state)
            parts.append(y)
        return x


def step(model, x, **how):
    torch.manual_seed(3)
    y = model(x, **how)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


@pytest.fixture
def pair():
    """The same model twice, the second with checkpointing."""
    torch.manual_seed(0)
    one = Model()
    two = copy.deepcopy(one)
    two.set_grad_checkpointing()
    return one, two


def same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_and_statistics_are_the_same(pair, training):
    one, two = (model.train(training) for model in pair)
    x = torch.randn(5, 8)
    same(step(one, x), step(two, x))
    assert [b.calls for b in one.blocks] == [1, 1, 1]
    assert [b.calls for b in two.blocks] == [2, 2, 2]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_norms_count_a_batch_once(pair, momentum):
    for model in pair:
        for block in model.blocks:
            block.norm.momentum = momentum
    for _ in range(2):
        same(*(step(model, torch.ones(5, 8) * torch.arange(5.0)[:, None]) for model in pair))
    assert int(pair[1].blocks[0].norm.num_batches_tracked) == 2
    assert pair[1].blocks[0].norm.momentum == momentum


def test_autocast_holds_in_the_second_run(pair):
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = [step(model, x) for model in pair]
    same(*found)


def test_a_state_moves_on_once(pair):
    x, states = torch.randn(5, 8), [{"seen": torch.ones(5, 8)} for _ in range(2)]
    found = [step(model, x, state=state) for model, state in zip(pair, states, strict=True)]
    same(*found)
    assert torch.equal(states[0]["seen"], states[1]["seen"])
    assert pair[1].blocks[0].calls == 1


def test_nothing_happens_without_gradients_and_after_switching_off(pair):
    _, model = pair
    with torch.no_grad():
        model(torch.randn(5, 8))
    model.set_grad_checkpointing(False)
    step(model, torch.randn(5, 8))
    assert model.blocks[0].calls == 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_recomputes(backend):
    torch.manual_seed(0)
    one = Model(norm=False)
    if backend == "eager":
        one.apply(lambda module: setattr(module, "p", 0.0))  # torch's eager backend draws new numbers in the second run
    two = copy.deepcopy(one)
    two.set_grad_checkpointing()
    x = torch.randn(5, 8)
    expected = step(one, x)
    torch._dynamo.reset()
    found = step(torch.compile(two, backend=backend, fullgraph=True), x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_blocks_inside_blocks_are_recomputed_with_them():
    class Outer(Recomputed):
        def __init__(self):
            super().__init__()
            self.mixer = Mamba(8)

        def forward(self, x):
            return x + self.mixer(x)

    class Whole(GradCheckpointing, nn.Module):
        def __init__(self):
            super().__init__()
            self.outer, self.alone = nn.Sequential(Outer(), Outer()), Mamba(8)

        def forward(self, x):
            return self.alone(self.outer(x))

    model = Whole()
    model.set_grad_checkpointing()
    on = [name for name, module in model.named_modules() if getattr(module, "grad_checkpointing", False)]
    assert on == ["outer.0", "outer.1", "alone"]


def test_models_inside_models_answer_for_themselves():
    class Foreign(nn.Module):
        def set_grad_checkpointing(self, enable=True):
            self.asked = enable

    class Whole(GradCheckpointing, nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.ours = Foreign(), Model()

    model = Whole()
    model.set_grad_checkpointing()
    assert model.backbone.asked is True
    assert model.ours.blocks[2].grad_checkpointing
    model.set_grad_checkpointing(enable=False)
    assert model.backbone.asked is False
    assert not model.ours.blocks[2].grad_checkpointing


def test_a_function_of_another_librarys_module_is_recomputed():
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True), torch.randn(2, 4, 8)
    found = []
    for run in (layer, lambda *args: recompute(layer, *args, norms=layer)):
        layer.zero_grad()
        torch.manual_seed(1)
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    same(*found)
