"""The contract of every model of the zoo, one check a function.

Each takes a :class:`~zoo.testing.Case` or the name of a registered model and raises AssertionError with a sentence.
Those that concern an ability which not every model has (steps, features, a classifier) return False when the model
does not have it, so that a suite can skip them visibly; the others return True.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from zoo.building import check_arguments, construct
from zoo.catalog import import_object

from .cases import Case, call, case, tensors
from .compare import assert_close, relative_error
from .fullsize import count

#: For results that two orders of float32 operations give.
CLOSE = 1e-4


def _run(model: nn.Module, inputs: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Outputs as a flat dictionary. Models that draw random numbers in forward draw the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return tensors(call(model, inputs))


def _floats(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in outputs.items() if v.is_floating_point() or v.is_complex()}


def check_forward(what: str | Case) -> bool:
    """Builds tiny; forward gives finite tensors; the same input gives the same output in eval mode."""
    c = case(what)
    model = c.build().eval()
    inputs = c.inputs()
    kept = {k: v.clone() for k, v in inputs.items()}
    with torch.no_grad():
        first, second = _run(model, inputs), _run(model, inputs)
    assert first, f"{c.name}: forward returned no tensor"
    for name, tensor in first.items():
        assert torch.isfinite(tensor).all(), f"{c.name}: {name} has values that are not finite"
        assert_close(second[name], tensor, tolerance=0.0, what=f"{c.name}: {name}, run twice")
    for name, tensor in kept.items():
        assert torch.equal(inputs[name], tensor), f"{c.name}: forward changed its input {name!r}"
    return True


def check_backward(what: str | Case) -> bool:
    """The gradient of a random projection of all outputs reaches every parameter.

    A model may name parameters that its forward does not use in a given configuration in ``unused_parameters``
    (prefixes of names); they are excused, and must be unused.
    """
    c = case(what)
    model = c.build().train()
    excused = tuple(getattr(model, "unused_parameters", ()))
    without: list[str] = []
    # Dropped paths and tokens cut parameters off by chance, so the draw is repeated until all are reached.
    for seed in range(8):
        _project(_floats(_run(model, c.inputs(), seed)), c.name).backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        if all(n.startswith(excused or ("\0",)) for n in without):
            break
    reached = [n for n in excused if n not in without and not any(w.startswith(n) for w in without)]
    without = [n for n in without if not n.startswith(excused or ("\0",))]
    assert not without, f"{c.name}: {len(without)} parameters get no gradient: {without[:5]}"
    assert not reached, f"{c.name}: unused_parameters names {reached[:5]}, which do get a gradient"
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    assert not bad, f"{c.name}: gradients that are not finite: {bad[:5]}"
    return True


def _project(outputs: dict[str, Tensor], name: str) -> Tensor:
    """A random projection of every output onto one number."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(())
    for tensor in outputs.values():
        if tensor.requires_grad:
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            total = total + (real.float() * torch.randn(real.shape, generator=generator)).sum()
    assert total.requires_grad, f"{name}: no output depends on a parameter"
    return total


def check_rows(what: str | Case) -> bool:
    """One sample's output equals its row in a batch of three (eval mode); batches do not mix."""
    c = case(what)
    model = c.build().eval()
    if getattr(model, "mixes_batch", False):
        return False
    specs = c.specifications()
    inputs = c.inputs(3)
    batched = [n for n, s in specs.items() if s.get("batch") is not False]
    if not batched:
        return False
    with torch.no_grad():
        together = _run(model, inputs)
        for row in (0, 2):
            alone = _run(model, {k: v[row : row + 1] if k in batched else v for k, v in inputs.items()})
            for name, tensor in together.items():
                if tensor.dim() == 0 or tensor.shape[0] != 3:
                    continue
                assert_close(
                    alone[name][0],
                    tensor[row],
                    tolerance=CLOSE,
                    what=f"{c.name}: {name}, row {row} alone and in a batch",
                )
    return True


def check_save_load(what: str | Case) -> bool:
    """``zoo.save`` then ``zoo.load`` gives the same tensors and the same outputs."""
    import zoo

    c = case(what)
    model = c.build(seed=3).eval()
    with tempfile.TemporaryDirectory() as folder:
        zoo.save(model, Path(folder) / "model")
        again = zoo.load(Path(folder) / "model")
        before, after = model.state_dict(), again.state_dict()
        assert before.keys() == after.keys(), f"{c.name}: keys changed: {sorted(before.keys() ^ after.keys())[:5]}"
        for key, tensor in before.items():
            if isinstance(tensor, Tensor):
                assert torch.equal(tensor, after[key]), f"{c.name}: {key} changed by saving and loading"
        assert not again.training, f"{c.name}: a loaded model is in eval mode"
        inputs = c.inputs()
        with torch.no_grad():
            first, second = _run(model, inputs), _run(again, inputs)
        for name, tensor in first.items():
            assert_close(second[name], tensor, tolerance=1e-6, what=f"{c.name}: {name} after saving and loading")
    return True


def check_exact_keys(what: str | Case) -> bool:
    """Filling is strict: one key too few, one too many and a wrong shape are errors, and change nothing."""
    from zoo.building import fill, tied_groups
    from zoo_registry import errors

    c = case(what)
    model = c.build()
    state = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    if not state:
        return False
    tied = {n for group in tied_groups(model) for n in group}
    free = next((k for k in state if k not in tied), None)
    if free is None:
        return False
    wrong = torch.zeros([*state[free].shape, 2], dtype=state[free].dtype)
    for label, broken in (
        ("missing", {k: v for k, v in state.items() if k != free}),
        ("unexpected", {**state, "no.such.key": torch.zeros(1)}),
        ("of another shape", {**state, free: wrong}),
    ):
        before = {k: v.clone() for k, v in state.items()}
        refusal = ""
        try:
            fill(model, broken)
        except errors.KeysDoNotMatch as error:
            refusal = str(error)
        assert refusal, f"{c.name}: a state dict with a key {label} was accepted"
        named = "no.such.key" if label == "unexpected" else free
        assert named in refusal, f"{c.name}: the error does not name {named}"
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if k in before), (
            f"{c.name}: a refused state dict changed the model"
        )
    return True


def check_parameters(what: str | Case) -> bool:
    """The card's number of parameters is exact: the full configuration, built on the meta device."""
    c = case(what)
    if c.card.params is None:
        return False
    found = count(construct(c.card, c.card.config, device="meta"))
    assert found == c.card.params, f"{c.name}: the card says {c.card.params:,} parameters, the model has {found:,}"
    return True


def check_card(what: str | Case) -> bool:
    """The card is complete: builder, paper or code, licence, input, output; weights with licence and preprocessing."""
    c = case(what)
    card = c.card
    builder = import_object(card.builder)
    check_arguments(card.name, builder, {**card.config, **card.tiny})
    lacking = [f for f in ("description", "input", "output", "licence_code") if not getattr(card, f)]
    if card.faithful == "paper" and "licence_code" in lacking:
        lacking.remove("licence_code")  # a paper has no licence of code
    if not (card.paper or card.reference_code):
        lacking.append("paper or reference_code")
    if card.faithful == "code" and card.reference_code and not card.reference_commit:
        lacking.append("reference_commit")
    assert not lacking, f"the card of {card.name} lacks {', '.join(lacking)}" + (
        " (write 'none stated' where the original has no licence)" if "licence_code" in lacking else ""
    )
    assert inspect.getdoc(builder), f"{card.builder} has no docstring"
    for tag, weights in card.weights.items():
        what_ = f"{card.name}.{tag}"
        check_arguments(what_, builder, {**card.config, **weights.config})
        if weights.loadable:
            assert weights.licence, f"{what_} has no licence; write 'unknown' where the authors state none"
        tokenizer = weights.preprocess.get("tokenizer", "")
        if weights.on_hub and "/" in tokenizer:
            carried = weights.companions
            assert tokenizer in carried, f"{what_} needs {tokenizer}; name its files as companions, for other machines"
        for metric in weights.metrics:
            assert metric.source, f"{what_}: the figure {metric.name} has no source"
        if weights.format != "safetensors":
            assert weights.converter, f"{what_} is of format {weights.format} and needs converter = (a system)"
    return True


def check_reset_head(what: str | Case) -> bool:
    """Models with ``reset_classifier``: the new head has the new width, and 0 removes it."""
    c = case(what)
    model = c.build().eval()
    if not hasattr(model, "reset_classifier"):
        return False
    model.reset_classifier(5)
    with torch.no_grad():
        outputs = list(_run(model, c.inputs()).values())
    assert outputs[0].shape[-1] == 5, f"{c.name}: after reset_classifier(5) the output is {tuple(outputs[0].shape)}"
    assert model.num_classes == 5, f"{c.name}: num_classes is {model.num_classes} after reset_classifier(5)"
    model.reset_classifier(0)
    with torch.no_grad():
        width = next(iter(_run(model, c.inputs()).values())).shape[-1]
    if hasattr(model, "num_features"):
        widths = {model.num_features, getattr(model, "head_hidden_size", None)}  # timm's heads with a hidden layer
        assert width in widths, f"{c.name}: without a head the output has {width} features, expected {widths}"
    return True


def check_features(what: str | Case) -> bool:
    """Models with ``features_only``: the maps have the channels and strides that ``feature_info`` promises."""
    c = case(what)
    parameters = inspect.signature(import_object(c.card.builder)).parameters
    probe = c.build()
    if "features_only" not in parameters and not hasattr(probe, "forward_intermediates"):
        return False
    if "features_only" in parameters:
        model = c.build(features_only=True).eval()
        with torch.no_grad():
            maps = call(model, c.inputs())
        channels, reduction = model.feature_info.channels(), model.feature_info.reduction()
        image = next(iter(c.inputs().values()))
        assert len(maps) == len(channels), f"{c.name}: {len(maps)} maps, feature_info has {len(channels)}"
        for i, found in enumerate(maps):
            assert channels[i] in (found.shape[1], found.shape[-1]), (
                f"{c.name}: map {i} is {tuple(found.shape)}, feature_info says {channels[i]} channels"
            )
            size = -(-image.shape[-1] // reduction[i])
            assert size in found.shape[1:], f"{c.name}: map {i} is {tuple(found.shape)}, expected stride {reduction[i]}"
    if hasattr(probe, "forward_intermediates"):
        with torch.no_grad():
            last, maps = probe.eval().forward_intermediates(next(iter(c.inputs().values())))
            whole = probe.forward_features(next(iter(c.inputs().values())))
        assert len(maps) > 0, f"{c.name}: forward_intermediates gave no map"
        sizes = [[t.numel() for t in tensors(output).values()] for output in (last, whole)]
        assert sizes[0] == sizes[1], f"{c.name}: forward_intermediates ends elsewhere than forward_features"
    return True


def check_adapt(what: str | Case) -> bool:
    """``zoo.load(..., num_classes=, in_chans=)`` keeps all other weights and reports what it changed."""
    import zoo
    from zoo.adapting import ends_of

    c = case(what)
    model = c.build()
    arguments = set(ends_of(model)) & {"num_classes", "in_chans"}
    if hasattr(model, "adapt_state"):
        arguments |= {"num_classes", "in_chans"} & set(inspect.signature(import_object(c.card.builder)).parameters)
    if not arguments:
        return False
    with tempfile.TemporaryDirectory() as folder:
        zoo.save(model, Path(folder) / "model")
        for argument in sorted(arguments):
            wanted = 5 if argument == "num_classes" else 2
            overrides: dict[str, Any] = {argument: wanted}
            other = zoo.load(Path(folder) / "model", **overrides)
            info = other.zoo_info
            assert info.changes, f"{c.name}: {argument}={wanted} changed nothing, or did not say so"
            own, was = other.state_dict(), model.state_dict()
            changed = {text.partition(":")[0] for text in info.changes}
            for key, tensor in was.items():
                if key in own and key not in changed:
                    assert torch.equal(own[key], tensor), f"{c.name}: {argument}={wanted} also changed {key}"
            if argument == "num_classes":
                with torch.no_grad():
                    shapes = [tuple(found.shape) for found in _run(other, c.inputs()).values()]
                assert any(wanted in shape for shape in shapes), (
                    f"{c.name}: with num_classes=5 the outputs are {shapes}"
                )
    return True


def check_odd_sizes(what: str | Case) -> bool:
    """The shapes that the card lists as ``odd`` work, and give finite outputs."""
    c = case(what)
    shapes: list[dict[str, Any]] = []
    for name, spec in c.specifications().items():
        odd = spec.get("odd") or []
        for shape in odd if odd and isinstance(odd[0], (list, tuple)) else ([odd] if odd else []):
            shapes.append({name: shape})
    if not shapes:
        return False
    model = c.build().eval()
    for shape in shapes:
        with torch.no_grad():
            for name, tensor in _run(model, c.inputs(shapes=shape)).items():
                assert torch.isfinite(tensor).all(), f"{c.name}: {name} is not finite for an input of shape {shape}"
    return True


def check_step(what: str | Case) -> bool:
    """Sequence models: feeding one element at a time through ``step`` equals the whole sequence at once.

    Protocol: ``state = model.init_state(batch)``, then ``y = model.step(x[:, t], state)`` with the state updated in
    place, or ``y, state = model.step(...)``; forward gives (batch, length, ...).
    """
    c = case(what)
    model = c.build().eval()
    if not (hasattr(model, "step") and hasattr(model, "init_state")):
        return False
    inputs = c.inputs(2)
    sequence = next(iter(inputs.values()))
    with torch.no_grad():
        whole = next(iter(_run(model, inputs).values()))
        state = model.init_state(2)
        parts = []
        for t in range(sequence.shape[1]):
            answer = model.step(sequence[:, t], state)
            if isinstance(answer, tuple):
                answer, state = answer
            parts.append(next(iter(tensors(answer).values())))
    steps = torch.stack([p[:, 0] if p.dim() == whole.dim() else p for p in parts], dim=1)
    assert_close(steps, whole, tolerance=CLOSE, what=f"{c.name}: step by step and whole")
    return True


def check_padding(what: str | Case) -> bool:
    """Sequence models that take ``lengths``: what lies behind a sequence's end changes nothing before it."""
    c = case(what)
    model = c.build().eval()
    if "lengths" not in inspect.signature(model.forward).parameters or len(c.specifications()) > 2:
        return False
    inputs = c.inputs(2)
    name = next(n for n in inputs if n != "lengths")
    sequence = inputs[name]
    length = sequence.shape[1]
    if length < 3:
        return False
    short = length - 2
    lengths = torch.tensor([short, length])
    other = sequence.clone()
    other[0, short:] = sequence[1, :2] if sequence.dim() > 2 else sequence[0, :2]
    with torch.no_grad():
        first = tensors(model(sequence, lengths=lengths))
        second = tensors(model(other, lengths=lengths))
        alone = tensors(model(sequence[:1, :short], lengths=lengths[:1]))
    for key, tensor in first.items():
        if tensor.shape[:2] == sequence.shape[:2]:
            a, b, o = tensor[0, :short], second[key][0, :short], alone[key][0, :short]
        else:
            a, b, o = tensor[0], second[key][0], alone[key][0]
        assert_close(b, a, tolerance=1e-6, what=f"{c.name}: {key} with other padding")
        assert_close(o, a, tolerance=CLOSE, what=f"{c.name}: {key} unpadded")
    return True


def check_bfloat16(what: str | Case) -> bool:
    """In bfloat16 the outputs are finite and near those in float32."""
    c = case(what)
    model = c.build().eval()
    inputs = c.inputs()
    with torch.no_grad():
        exact = _floats(_run(model, inputs))
        half = model.to(torch.bfloat16)
        cast = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
        rough = _floats(_run(half, cast))
    for name, tensor in exact.items():
        found = rough[name].to(tensor.dtype)
        assert torch.isfinite(found).all(), f"{c.name}: {name} is not finite in bfloat16"
        if found.shape == tensor.shape:
            error = relative_error(found, tensor)
            assert error < 0.25, f"{c.name}: {name} in bfloat16 is {error:.2g} away from float32"
    return True


def check_device(what: str | Case) -> bool:
    """Nothing is made on the CPU while a model runs elsewhere: a forward pass and a step on a GPU.

    Where there is none, on tensors that only say that they are on one (torch's FakeTensorMode). Such a run cannot
    follow what depends on values: a forward pass that does is not checked, nor is such a step.
    """
    c = case(what)
    model = c.build().eval()
    if torch.cuda.is_available():
        inputs = {k: v.to("cuda") for k, v in c.inputs().items()}
        with torch.no_grad():
            call(model.to("cuda"), inputs)
            _one_step(model, inputs)
        return True
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )

    def moved(tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cuda:0")

    # The last: cuDNN's recurrent layers ask the driver.
    unknown = (DataDependentOutputException, DynamicOutputShapeException, torch.AcceleratorError)
    current = mock.patch.object(torch.cuda, "current_device", return_value=0)
    started = mock.patch.object(torch.cuda, "is_initialized", return_value=True)
    with current, started, FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(moved(parameter), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = moved(buffer)
        inputs = {k: moved(v) for k, v in c.inputs().items()}
        try:
            call(model, inputs)
        except unknown:
            return False
        except RuntimeError as error:
            raise AssertionError(f"{c.name}: on another device than the CPU, {error}") from error
        with contextlib.suppress(*unknown):
            _one_step(model, inputs)
    return True


def _one_step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    if hasattr(model, "step") and hasattr(model, "init_state"):
        sequence = next(iter(inputs.values()))
        model.step(sequence[:, 0], model.init_state(sequence.shape[0]))  # type: ignore[operator]


def check_compile(what: str | Case, *, backend: str = "eager") -> bool:
    """``torch.compile(fullgraph=True)`` captures the model in one graph, which gives the same outputs.

    ``backend``: "eager" runs the captured graph as it is; "aot_eager" and "inductor" cost more time and test more of
    torch than of the model.
    """
    c = case(what)
    model = c.build().eval()
    if getattr(model, "not_compilable", None):
        return False
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    inputs = c.inputs()
    with torch.no_grad():
        expected, found = _run(model, inputs), _run(compiled, inputs)
    for name, tensor in expected.items():
        assert_close(found[name], tensor, tolerance=CLOSE, what=f"{c.name}: {name} compiled")
    return True


def check_export(what: str | Case) -> bool:
    """``torch.export`` (strict=False) captures the model, and the exported program gives the same outputs."""
    c = case(what)
    model = c.build().eval()
    if getattr(model, "not_exportable", None):
        return False
    inputs = c.inputs()
    args, kwargs = ((inputs[""],), {}) if "" in inputs else ((), dict(inputs))
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, strict=False).module()
        expected = _run(model, inputs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = tensors(program(*args, **kwargs))
    for name, tensor in expected.items():
        assert_close(found[name], tensor, tolerance=CLOSE, what=f"{c.name}: {name} exported")
    return True
