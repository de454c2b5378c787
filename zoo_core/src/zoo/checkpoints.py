"""Reading what is inside checkpoint files: safetensors mapped, foreign formats opened without running their code.

A pickle is opened by torch with ``weights_only=True`` and a short list of harmless classes that published checkpoints
hold beside their tensors (the training script's arguments, numbers, paths). Anything else is refused by name: the file
is not opened, and there is no other way in.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import io
import logging
import pathlib
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from zoo_registry import errors

logger = logging.getLogger("zoo")

State = dict[str, Tensor]

#: Where training scripts keep the state dict, tried in this order when nobody says so and exactly one fits.
COMMON_SUBKEYS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network_weights",
    "params",
    "base_model",
)


# -- safetensors -----------------------------------------------------------------------------------------------------


def read_safetensors(files: Iterable[Path], *, device: str = "cpu") -> State:
    """Every tensor of the files, mapped: on the CPU no byte is read before it is used, and none is copied.

    ``::complex`` at the end of a key marks a tensor stored as real pairs. Raises BadCheckpoint for a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    state: State = {}
    for path in files:
        try:
            with safe_open(str(path), framework="pt", device=device) as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    tensor = file.get_tensor(key)
                    if key.endswith("::complex"):
                        key, tensor = key.removesuffix("::complex"), torch.view_as_complex(tensor.contiguous())
                    state[key] = tensor
        except SafetensorError as error:
            raise errors.BadCheckpoint(
                f"{path} is not a readable safetensors file ({error}); it may have been cut short: fetch it again",
                path=str(path),
            ) from error
    return state


def metadata(path: Path) -> dict[str, str]:
    """The strings in a safetensors header; {} for other files."""
    from safetensors import SafetensorError, safe_open

    if not is_safetensors(path):
        return {}
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise errors.BadCheckpoint(f"{path} is not a readable safetensors file ({error})", path=str(path)) from error


def is_safetensors(path: Path) -> bool:
    """By content: eight bytes of header length, then JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30


def write_safetensors(state: Mapping[str, Tensor], path: Path, *, meta: Mapping[str, str] | None = None) -> None:
    """Write ``state`` (contiguous copies where needed, complex tensors as real pairs)."""
    from safetensors.torch import save_file

    ready: State = {}
    for key, tensor in state.items():
        tensor = tensor.detach()
        if tensor.is_complex():
            key, tensor = f"{key}::complex", torch.view_as_real(tensor.resolve_conj())
        ready[key] = tensor.to("cpu").contiguous()
    seen: dict[int, str] = {}
    for key, tensor in ready.items():  # views of one storage would be written twice or refused
        pointer = tensor.untyped_storage().data_ptr()
        if tensor.numel() and pointer in seen:
            ready[key] = tensor.clone()
        seen[pointer] = key
    save_file(ready, str(path), metadata={"format": "pt", **(meta or {})})


# -- foreign files ---------------------------------------------------------------------------------------------------


def read_foreign(path: Path, *, format: str | None = None, subkey: str | None = None) -> State:
    """The state dict in a file of any format that the zoo knows, under the file's own keys.

    ``format``: "torch", "safetensors", "numpy", "flax-msgpack"; None looks at the content. ``subkey``: where the state
    dict lies in the file ("model", "state_dict.net"); without it the file is one, or holds one in exactly one of the
    usual places. Raises UnsafeFile for a pickle that holds code, BadCheckpoint for everything else.
    """
    kind = format or sniff(path)
    readers: dict[str, Callable[[Path], Any]] = {
        "safetensors": lambda p: read_safetensors([p]),
        "torch": open_pickle,
        "numpy": _open_numpy,
        "flax-msgpack": _open_msgpack,
    }
    if kind not in readers:
        raise errors.BadCheckpoint(
            f"{path}: the format {kind!r} cannot be read here; convert it to one of {', '.join(readers)} first",
            path=str(path),
        )
    content = readers[kind](path)
    return find_state(content, path, subkey)


def sniff(path: Path) -> str:
    """The format of a file by its content."""
    if path.is_dir():
        return "orbax"
    if path.suffix == ".safetensors" or is_safetensors(path):
        return "safetensors"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        return "numpy" if names and all(n.endswith(".npy") for n in names) else "torch"
    with path.open("rb") as file:
        head = file.read(6)
    if head.startswith(b"\x93NUMPY"):
        return "numpy"
    if head[:1] in (b"\x80", b"(", b"c", b"}", b"]") and path.suffix != ".msgpack":
        return "torch"  # a pickle, as torch wrote them before 1.6
    return "flax-msgpack" if path.suffix == ".msgpack" else "torch"


class _Inert:
    """Stands in for a framework's class that need not be installed; keeps what it is given and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _dictionary(*_: Any) -> dict[Any, Any]:
    return collections.OrderedDict()


#: Dictionaries by another name; they are read as plain ones.
_DICTIONARIES = (
    "yacs.config.CfgNode",
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
    "easydict.EasyDict",
    "addict.addict.Dict",
)
#: Classes that published checkpoints hold beside tensors and that are not needed to read the weights.
_INERT_NAMES = (
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "typing.Any",  # as which OmegaConf notes the types of a configuration
    "src.util.inv_staged_mu_law",  # EEGDM's Lightning checkpoints: how generated signals are to be rescaled
    "mmengine.logging.history_buffer.HistoryBuffer",
    "timm.utils.metrics.AverageMeter",
)
_NUMPY_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")


def allowed_globals() -> list[Any]:
    """Everything beyond torch's own list that a pickle may name. None of it acts when it is built from plain values."""
    import numpy as np

    core = importlib.import_module("numpy.core.multiarray" if not hasattr(np, "_core") else "numpy._core.multiarray")
    allowed: list[Any] = [
        argparse.Namespace,
        collections.OrderedDict,
        collections.Counter,
        (_dictionary, "collections.defaultdict"),
        dict,
        list,
        int,
        float,
        set,
        pathlib.PurePosixPath,
        (pathlib.PurePosixPath, "pathlib.PosixPath"),
        (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
        (pathlib.PureWindowsPath, "pathlib.WindowsPath"),
        (pathlib.PureWindowsPath, "pathlib._local.WindowsPath"),
        np.dtype,
        np.ndarray,
        *((getattr(core, name), f"{module}.{name}") for name in ("scalar", "_reconstruct") for module in _NUMPY_CORES),
        *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDSU"),
    ]
    allowed += [(collections.OrderedDict, name) for name in _DICTIONARIES]
    allowed += [(_inert(name), name) for name in _INERT_NAMES]
    return allowed


def _inert(name: str) -> type:
    return type(name.rpartition(".")[2], (_Inert,), {"__module__": name.rpartition(".")[0]})


def open_pickle(path: Path) -> Any:
    """A torch checkpoint, with ``weights_only=True`` and :func:`allowed_globals`. Never anything else.

    Raises UnsafeFile naming the objects it will not build, and BadCheckpoint when the file is damaged.
    """
    with torch.serialization.safe_globals(allowed_globals()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")  # it can be read, or an error says so
        try:
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
        except pickle.UnpicklingError as error:
            unsafe = unsafe_globals(path)
            if unsafe or "Unsupported global" in str(error):
                named = ", ".join(unsafe) if unsafe else "objects beyond tensors"
                raise errors.UnsafeFile(
                    f"{path} was not opened: as a pickle it would build {named}, and only tensors and plain values are "
                    "allowed (there is no switch for this). If you trust its author, load it in the author's own code "
                    "and save its state dict alone, best as safetensors",
                    path=str(path),
                    objects=tuple(unsafe),
                ) from None
            if "Unsupported operand" in str(error):
                raise errors.BadCheckpoint(
                    f"{path} was pickled in another protocol than 2, which torch reads only by executing it, or is "
                    "damaged; save it again with torch.save's own protocol, or best as safetensors",
                    path=str(path),
                ) from error
            # torch's own text offers to unpickle whatever it is; nobody should
            raise errors.BadCheckpoint(
                f"{path} is no checkpoint that can be read: it is damaged, or another kind of file; expected a torch "
                "file, safetensors, .npz or flax msgpack",
                path=str(path),
            ) from error
        except (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise errors.BadCheckpoint(
                f"{path} cannot be read as a torch checkpoint ({type(error).__name__}: {_first_line(error)}); it was "
                "cut short (fetch it again), or is another kind of file",
                path=str(path),
            ) from error


def unsafe_globals(path: Path) -> list[str]:
    """Names of the objects in a pickle that are not allowed, found by reading it as text, not by running it."""
    permitted = {_qualified(entry) for entry in allowed_globals()}
    own = {_qualified(entry) for entry in torch.serialization.get_safe_globals()}
    found: list[str] = []
    for stream in _pickle_streams(path):
        strings: list[str] = []
        with contextlib.suppress(ValueError, IndexError, EOFError, UnicodeDecodeError):  # the end, or damage
            while True:  # older files are several pickles in a row, then raw numbers
                for opcode, argument, _ in pickletools.genops(stream):
                    if opcode.name in ("GLOBAL", "INST"):
                        found.append(str(argument).replace(" ", "."))
                    elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                        found.append(f"{strings[-2]}.{strings[-1]}")
                    if isinstance(argument, str):
                        strings.append(argument)
    return [name for name in dict.fromkeys(found) if name not in permitted | own and not _torch_own(name)]


def _pickle_streams(path: Path) -> Iterable[BinaryIO]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    yield io.BytesIO(archive.read(name))
    else:
        with path.open("rb") as file:
            yield file


def _qualified(entry: Any) -> str:
    if isinstance(entry, tuple):
        return entry[1]
    return f"{entry.__module__}.{entry.__qualname__}"


def _torch_own(name: str) -> bool:
    from torch._weights_only_unpickler import _get_allowed_globals

    return name in _get_allowed_globals() or (name.startswith("torch.") and name.endswith("Storage"))


def _open_numpy(path: Path) -> Any:
    import numpy as np

    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise errors.BadCheckpoint(
                f"{path} holds one array without a name; expected an .npz archive", path=str(path)
            )
        return {name: torch.from_numpy(content[name]) for name in content.files}
    except ValueError as error:
        if isinstance(error, errors.ZooError):
            raise
        raise errors.BadCheckpoint(f"{path} cannot be read as numpy arrays: {error}", path=str(path)) from error


def _open_msgpack(path: Path) -> Any:
    """Flax's ``to_bytes``: msgpack with arrays as extension type 1 (shape, dtype name, bytes) and 3 (numpy scalars)."""
    import msgspec
    import numpy as np

    def extension(code: int, data: memoryview) -> Any:
        if code in (1, 3):
            shape, dtype, raw = msgspec.msgpack.decode(data, type=tuple[tuple[int, ...], str, bytes])
            if dtype == "bfloat16":
                return torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).reshape(shape)
            return torch.from_numpy(np.frombuffer(bytearray(raw), dtype=np.dtype(dtype)).reshape(shape))
        if code == 2:
            return complex(*msgspec.msgpack.decode(data, type=tuple[float, float]))
        raise ValueError(f"msgpack extension {code} is not one of flax's")

    try:
        return _flat(msgspec.msgpack.decode(path.read_bytes(), ext_hook=extension))
    except (ValueError, TypeError, msgspec.DecodeError) as error:
        raise errors.BadCheckpoint(f"{path} cannot be read as flax msgpack: {error}", path=str(path)) from error


def _flat(tree: Any, prefix: str = "") -> State:
    """Nested dictionaries to keys with slashes, as flax writes paths."""
    out: State = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out.update(_flat(value, f"{prefix}{key}/"))
        elif isinstance(value, Tensor):
            out[f"{prefix}{key}"] = value
    return out


# -- the state dict in it --------------------------------------------------------------------------------------------


def find_state(content: Any, path: Path, subkey: str | None = None) -> State:
    """The state dict inside what a file held; DataParallel's ``module.`` is taken off when every key has it."""
    if subkey is not None:
        for part in subkey.split("."):
            if not isinstance(content, Mapping) or part not in content:
                raise errors.BadCheckpoint(f"{path} has no {subkey!r} in it; {_describe(content)}", path=str(path))
            content = content[part]
    elif not _is_state(content):
        fitting = [k for k in COMMON_SUBKEYS if isinstance(content, Mapping) and _is_state(content.get(k))]
        if len(fitting) != 1:
            others = [k for k, v in content.items() if _is_state(v)] if isinstance(content, Mapping) else []
            many = f"; state dicts lie under {', '.join(map(str, others))}: choose one with subkey=" if others else ""
            raise errors.BadCheckpoint(f"{path} is no state dict itself; {_describe(content)}{many}", path=str(path))
        logger.info("%s: the state dict is taken from %r", path, fitting[0])
        content = content[fitting[0]]
    if not _is_state(content):
        raise errors.BadCheckpoint(f"{path}: {subkey!r} holds no state dict; {_describe(content)}", path=str(path))
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if state and all(k.startswith("module.") for k in state):
        logger.info("%s: the prefix 'module.' (DataParallel) is taken off every key", path)
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return state


def _is_state(content: Any) -> bool:
    """A mapping of names to tensors; a few plain values beside them (counters, versions) do not disturb."""
    if not isinstance(content, Mapping) or not content or not all(isinstance(k, str) for k in content):
        return False
    tensors = sum(isinstance(v, Tensor) for v in content.values())
    return tensors > 0 and not any(isinstance(v, Mapping) and _is_state(v) for v in content.values())


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        keys = [f"{k} ({type(v).__name__})" for k, v in content.items()]
        return f"found {', '.join(keys[:8])}" + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    return f"found {type(content).__name__}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
