"""``zoo export``: a model as one file for other runtimes, compared with the model before it appears."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from . import output


@click.command()
@click.argument("name")
@click.argument("out", type=click.Path())
@click.option("--fixed", is_flag=True, help="Fix every size (default: open what the model's computation leaves open).")
@click.option(
    "--dynamic", multiple=True, type=click.Choice(["batch", "length"]), help="Must stay open; an error otherwise."
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Samples in the example (default: 2).")
@click.option("--size", metavar="HxW", help="Sides of the example's image or volume (default: the card's).")
@click.option("--length", type=click.IntRange(min=1), help="Length of the example's sequences (default: the card's).")
@click.option("--operators", type=click.Choice(["plain", "kernels"]), default="plain", show_default=True)
@click.option("--opset", type=int, help="ONNX operator set (default: 20).")
@click.option("--tolerance", type=float, help="Largest relative difference that is taken (default: 1e-4).")
@output.loading_options
@output.as_json
def export(
    name: str,
    out: str,
    fixed: bool,
    dynamic: tuple[str, ...],
    batch_size: int | None,
    size: str | None,
    length: int | None,
    operators: str,
    opset: int | None,
    tolerance: float | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Write NAME to OUT: model.onnx for onnxruntime, or model.pt2 for torch.export.load.

    The file holds the forward pass. It is loaded again and compared with the model before it appears.

    \b
        zoo export vim_micro.digits digits.onnx
        zoo export vim_tiny.in1k vim.onnx --size 384x384 --fixed --batch-size 1
        zoo export mamba_130m mamba.pt2 --dynamic length
    """
    import zoo
    from zoo.example_inputs import shaped
    from zoo.exporting import TOLERANCE, check
    from zoo.loading import card_of

    if fixed and dynamic:
        raise click.UsageError(f"--fixed and --dynamic {dynamic[0]} were given; expected one of them")
    sides = None if size is None else _sides(size)
    allowed = TOLERANCE if tolerance is None else tolerance
    check(Path(out).expanduser(), operators=operators, opset=opset, tolerance=allowed)
    inputs = None
    if not (batch_size is None and sides is None and length is None):
        inputs = shaped(card_of(name), batch_size or 2, sides=sides, length=length)
    options["device"] = options["device"] or "cpu"
    model = zoo.load(name, **output.loading(options))
    made = zoo.export(
        model,
        out,
        inputs=inputs,
        dynamic=() if fixed else dynamic or None,
        operators=operators,
        opset=opset,
        tolerance=allowed,
    )
    if as_json:
        output.emit(made.to_dict())
    else:
        click.echo(str(made))
    return 0


def _sides(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(x\d+)*", text) or "0" in text.split("x"):
        raise click.UsageError(f"--size is {text!r}; expected sides as 384x384, or 96x96x96 for a volume")
    return [int(side) for side in text.split("x")]
