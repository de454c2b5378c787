"""``zoo doctor``: versions, devices, kernels and why each runs where it does, plugins, cache."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import click

from . import output

_VARIABLES = (
    *("ZOO_KERNELS", "ZOO_PLUGINS", "ZOO_DISABLE_PLUGINS", "ZOO_LOG"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
)
_DISTRIBUTIONS = (
    *("ssm-zoo", "ssm-zoo-kernels", "ssm-zoo-registry", "torch", "triton", "timm", "huggingface-hub", "safetensors"),
    *("pluggy", "numpy"),
)


@click.command()
@click.option("--kernels", is_flag=True, help="Compare every kernel with the float64 reference on this machine.")
@click.option("--device", default=None, help="Device of --kernels (default: cuda if there is one).")
@output.as_json
def doctor(kernels: bool, device: str | None, as_json: bool) -> int:
    """What runs where on this machine, and why; versions; plugins with errors.

    Ends with 1 when a kernel disagrees with its reference or a plugin is broken.
    """
    facts = gather()
    checked = _self_check(device) if kernels else []
    if kernels:
        facts["self_check"] = checked
    broken = bool(facts["plugins"]["broken"]) or any(r["ok"] is False for r in checked)
    if as_json:
        output.emit(facts)
    else:
        _show(facts, checked)
    return 1 if broken else 0


def gather() -> dict[str, Any]:
    """Everything that ``zoo doctor --json`` prints."""
    import torch

    import zoo_kernels
    from zoo_registry import manager
    from zoo_registry._disk import hub_cache

    plugins = manager()
    return {
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in _DISTRIBUTIONS},
        "devices": _devices(torch),
        "threads": torch.get_num_threads(),
        "kernels": zoo_kernels.status(),
        "plugins": {
            "loaded": [
                {"name": p.name, "distribution": p.distribution, "version": p.version, "models": len(p.models)}
                for p in plugins.plugins
            ],
            "broken": [str(b) for b in plugins.broken],
            "disabled": [e.name for e in plugins.disabled],
        },
        "cache": str(hub_cache()),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices(torch: Any) -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _self_check(device: str | None) -> list[dict[str, Any]]:
    import torch

    import zoo_kernels

    return zoo_kernels.self_check(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _show(facts: dict[str, Any], checked: list[dict[str, Any]]) -> None:
    def line(title: str, text: Any) -> None:
        click.echo(f"{click.style(f'{title:<10}', bold=True)}{text}")

    line("python", f"{facts['python']} on {facts['system']}")
    line("versions", ", ".join(f"{k} {v}" if v else f"{k} not installed" for k, v in facts["versions"].items()))
    line("devices", ", ".join(facts["devices"]) + f"; {facts['threads']} threads")
    kernels = facts["kernels"]
    line("native", _words(kernels["native"]))
    line("triton", _words(kernels["triton"]))
    if kernels["forced"]:
        line("forced", f"the back end {kernels['forced']} (ZOO_KERNELS or zoo_kernels.backend)")
    backs = list(dict.fromkeys(b for back in kernels["operators"].values() for b in back))
    output.table(
        ("kernel", *backs),
        [
            (name, *("runs" if b in back and back[b] is None else "-" if b not in back else "no" for b in backs))
            for name, back in kernels["operators"].items()
        ],
    )
    reasons: dict[str, list[str]] = {}
    for name, back in kernels["operators"].items():
        for b, reason in back.items():
            if reason is not None:
                reasons.setdefault(f"{b}: {reason}", []).append(name)
    for reason, names in reasons.items():
        click.echo(f"{reason}" + (f" ({', '.join(names)})" if len(names) < len(kernels["operators"]) else ""))
    for module, error in kernels["broken"].items():
        click.echo(f"the operators of {module} do not import: {error}")
    if checked:
        output.table(
            ("self check", "back end", "result", "error"),
            [
                (
                    r["operator"],
                    r["backend"],
                    {True: "ok", False: "WRONG", None: "left out"}[r["ok"]]
                    + (f": {r['detail']}" if r["detail"] else ""),
                    "" if r["error"] is None else f"{r['error']:.1e}",
                )
                for r in checked
            ],
            right=(3,),
        )
    plugins = facts["plugins"]
    line(
        "plugins", ", ".join(f"{p['name']} {p['version']} ({p['models']} models)" for p in plugins["loaded"]) or "none"
    )
    for text in plugins["broken"]:
        click.echo(f"broken: {text}")
    if plugins["disabled"]:
        line("disabled", ", ".join(plugins["disabled"]))
    line("cache", facts["cache"])
    if facts["variables"]:
        line("variables", ", ".join(f"{k}={v}" for k, v in facts["variables"].items()))


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
    return str(value)
