"""Large models over several devices, the CPU and a disk: ``zoo.load(..., device_map=...)``, by accelerate.

The plan (which module goes where) and the moving of inputs and offloaded weights when a module runs are accelerate's
(``infer_auto_device_map``, ``dispatch_model``). Added here: weights go from the mapped shards to their places one
tensor at a time; methods that language models call beside ``forward`` (``step``, ``init_state``) find theirs too.

A model may say ``no_split_modules = ("ClassName", ...)``: classes whose instances stay on one device and are brought
back from a disk whole. By default these are the classes of the members of its outermost
ModuleLists and Sequentials.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_registry import errors, optional

logger = logging.getLogger("zoo")

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
Place: TypeAlias = int | str | torch.device

#: Methods of modules that use their weights without going through ``forward``.
METHODS = ("step", "init_state")
#: Arguments that modules change in place, so they must arrive as they are.
IN_PLACE = ("state",)


def place(
    model: nn.Module,
    device_map: str | Mapping[str, Place],
    *,
    max_memory: Mapping[Place, int | str] | None = None,
    offload_folder: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Move ``model`` (its weights mapped or on the CPU) to the devices of a map, in place; returns it.

    device_map: "auto" (as even as fits: accelerators, then the CPU, then the disk), "balanced", "balanced_low_0",
    "sequential", or module names to devices: {"embedding": 0, "layers": "cpu", "norm_f": "disk"}; "" is the whole
    model. max_memory: the most that a plan may put on each device, {0: "10GB", "cpu": "30GB"}. offload_folder: where
    weights on "disk" are written (by default a temporary folder that goes with the model). dtype: of floating-point
    weights. What was decided is ``model.hf_device_map``. Raises MissingExtra without accelerate, BadArgument for a map
    that names no module, leaves one out or is no plan.
    """
    accelerate = needed()
    plan = _plan(model, device_map, max_memory, dtype)
    folder = None
    if "disk" in plan.values():
        folder = _folder(model, offload_folder)
        logger.info("weights on the disk are written to %s", folder)
    _distribute(model, plan, folder, dtype)
    accelerate.dispatch_model(
        model, device_map=plan, offload_dir=folder, skip_keys=list(IN_PLACE), preload_module_classes=units(model)
    )
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            _hook_methods(module)
    return model


def checked_device(device: torch.device | str | None) -> torch.device | None:
    """``device`` as torch has it; None stays. Raises BadArgument for one that is none, or not on this machine."""
    if device is None:
        return None
    try:
        found = torch.device(device)
        if found.type != "meta":
            torch.empty(0, device=found)  # finds out what is missing: a driver, a second GPU, support in this build
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).partition("\n")[0].partition(". ")[0]
        why = "" if said.startswith("Expected one of") else f" ({said})"  # a list of all that torch has ever known
        raise errors.BadArgument(
            f"device is {str(device)!r}, which this machine cannot compute on{why}; expected cpu, cuda, cuda:1, mps "
            "... (`zoo doctor` shows what there is)",
            argument="device",
            accepted=[],
        ) from error
    return found


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A type of floating-point numbers, by its name too; None stays. Raises BadArgument for another."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise errors.BadArgument(
        f"dtype is {str(dtype)!r}; expected a type of floating-point numbers, as float32, bfloat16 or float16",
        argument="dtype",
        accepted=["float32", "bfloat16", "float16"],
    )


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: its hook's device, else that of its first parameter."""
    hook = getattr(module, "_hf_hook", None)
    found = getattr(hook, "execution_device", None)
    if found is not None:
        return torch.device(found)
    return next((p.device for p in module.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def at_hand(module: nn.Module) -> Iterator[nn.Module]:
    """Inside, the module's weights are where it computes, although its ``forward`` is not called."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield module
        return
    hook.pre_forward(module)
    try:
        yield module
    finally:
        hook.post_forward(module, None)


def linear(x: Tensor, module: nn.Module) -> Tensor:
    """``x @ module.weight.T`` for a weight that another module may own and a disk may hold (tied output layers)."""
    if not hasattr(module, "_hf_hook"):
        return F.linear(x, module.weight)  # type: ignore[arg-type]
    with at_hand(module):
        return F.linear(x.to(module.weight.device), module.weight)  # type: ignore[arg-type]


def units(model: nn.Module) -> list[str]:
    """Names of the classes that are not split."""
    declared = getattr(model, "no_split_modules", None)
    if declared is not None:
        return list(declared)
    containers = (nn.ModuleList, nn.Sequential)
    found: dict[str, None] = {}
    pending = [model]
    while pending:
        module = pending.pop()
        for child in module.children():
            if isinstance(module, containers) and not isinstance(child, containers):
                found[type(child).__name__] = None
            else:
                pending.append(child)
    return list(found)


# -- the plan --------------------------------------------------------------------------------------------------------


def needed() -> Any:
    """accelerate, or MissingExtra."""
    otherwise = "or give device= to put the whole model on one device"
    return optional("accelerate", "device_map", "ssm-zoo[accelerate]", otherwise=otherwise)


def _plan(
    model: nn.Module,
    device_map: str | Mapping[str, Place],
    max_memory: Mapping[Place, int | str] | None,
    dtype: torch.dtype | None,
) -> dict[str, Place]:
    from accelerate.utils import check_device_map, get_balanced_memory, infer_auto_device_map

    if isinstance(device_map, str) and device_map not in PLANS:
        raise errors.BadArgument(
            f"device_map is {device_map!r}; expected {', '.join(map(repr, PLANS))} or a mapping of module names to "
            f"devices (all on one device: device={device_map!r})",
            argument="device_map",
            accepted=list(PLANS),
        )
    if isinstance(device_map, str):
        memory: Any = None if max_memory is None else dict(max_memory)
        if device_map != "sequential":
            memory = get_balanced_memory(
                model, max_memory=memory, no_split_module_classes=units(model), dtype=dtype,
                low_zero=device_map == "balanced_low_0",
            )  # fmt: skip
        return infer_auto_device_map(model, max_memory=memory, no_split_module_classes=units(model), dtype=dtype)
    if max_memory is not None:
        raise errors.BadArgument(
            "max_memory limits the plans that are made ('auto' and so on); a device_map that names modules is taken as "
            "it is",
            argument="max_memory",
            accepted=[],
        )
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    unknown = [name for name in device_map if name not in names]
    if unknown:
        tops = [name for name, _ in model.named_children()]
        raise errors.BadArgument(
            f"device_map names {', '.join(unknown)}, which {type(model).__name__} does not have; its parts are "
            f"{', '.join(tops)}",
            argument="device_map",
            accepted=tops,
        )
    try:
        check_device_map(model, dict(device_map))
    except ValueError as error:
        raise errors.BadArgument(
            f"device_map does not cover the model: {error}", argument="device_map", accepted=[]
        ) from error
    return dict(device_map)


def _folder(model: nn.Module, wanted: str | Path | None) -> str:
    if wanted is not None:
        Path(wanted).mkdir(parents=True, exist_ok=True)
        return str(wanted)
    made = tempfile.mkdtemp(prefix="zoo-offload-")
    weakref.finalize(model, shutil.rmtree, made, ignore_errors=True)
    return made


# -- moving ----------------------------------------------------------------------------------------------------------


def _distribute(model: nn.Module, plan: Mapping[str, Place], folder: str | None, dtype: torch.dtype | None) -> None:
    """Each tensor to its place, one at a time, so that no more than one is held twice."""
    from accelerate.utils import offload_weight

    index: dict[str, Any] = {}
    moved: dict[int, Tensor] = {}  # tied tensors move once and stay tied
    for name, where in plan.items():
        for key, tensor in _tensors_under(model, name):
            if id(tensor) in moved:
                _assign(model, key, moved[id(tensor)])
                continue
            ready = tensor.detach()
            if dtype is not None and ready.is_floating_point():
                ready = ready.to(dtype)
            if where == "disk" and isinstance(tensor, nn.Parameter):
                assert folder is not None
                index = offload_weight(ready, key, folder, index)
                ready = ready.to("meta")
            elif where not in ("disk", "cpu"):
                ready = ready.to(torch.device(where))
            if isinstance(tensor, nn.Parameter):
                ready = nn.Parameter(ready, requires_grad=tensor.requires_grad)
            moved[id(tensor)] = ready
            moved[id(ready)] = ready
            _assign(model, key, ready)
    if folder is not None:
        (Path(folder) / "index.json").write_text(json.dumps(index, indent=1))


def _tensors_under(model: nn.Module, name: str) -> list[tuple[str, Tensor]]:
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(k, t) for k, t in pairs if not name or k == name or k.startswith(name + ".")]


def _assign(model: nn.Module, key: str, tensor: Tensor) -> None:
    path, _, leaf = key.rpartition(".")
    owner = model.get_submodule(path) if path else model
    (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = tensor  # type: ignore[assignment]


def _hook_methods(module: nn.Module) -> None:
    """Let accelerate's hook serve :data:`METHODS` as it serves ``forward``."""
    for name in METHODS:
        method = getattr(module, name, None)
        if callable(method):
            object.__setattr__(module, name, _through(module, method))


def _through(module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        device = device_of(module)
        args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)
        with at_hand(module):
            return method(*args, **options)

    return call
