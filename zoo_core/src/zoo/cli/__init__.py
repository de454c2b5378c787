"""The command line ``zoo``: a table of verbs, each imported when it is used, and one place for errors and exit codes.

======= =====================================================
0       done
1       the work was done in part, or failed (a wrong input, say)
2       a wrong name, argument or option
3       something is not there (weights, file, repository)
4       the network
5       the bytes are not what they should be
6       a plugin
7       the disk
130     interrupted
======= =====================================================
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

#: verb -> (module:command, line for ``zoo --help``), in the order in which a newcomer needs them.
COMMANDS = {
    "demo": ("zoo.cli.demo:demo", "Run every installed plugin's demo on its sample files."),
    "list": ("zoo.cli.listing:list_", "List models, with wildcards and filters."),
    "info": ("zoo.cli.listing:info", "Everything known about a model and its weights."),
    "predict": ("zoo.cli.predict:predict", "Answer for your own files."),
    "validate": ("zoo.cli.validate:validate", "Measure a model on your labelled data."),
    "load": ("zoo.cli.transfer:load", "Fetch, verify, convert and build a checkpoint; say what came of it."),
    "download": ("zoo.cli.transfer:download", "Fetch a checkpoint, to the cache or to a folder for another machine."),
    "convert": ("zoo.cli.transfer:convert", "Convert a checkpoint from or to an original's format."),
    "export": ("zoo.cli.export:export", "Write a model as ONNX or for torch.export, compared with the original."),
    "bench": ("zoo.cli.bench:bench", "Time a model's forward pass; parameters and peak memory."),
    "doctor": ("zoo.cli.doctor:doctor", "What runs where on this machine, and why."),
    "plugins": ("zoo.cli.plugins:plugins", "List plugins, or write the skeleton of a new one."),
    "cache": ("zoo.cli.cache:cache", "Show, check and remove what is cached."),
}


class _Verbs(click.Group):
    """Commands from the table and from plugins. Help needs neither their modules nor, for our own, the plugins."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *sorted(_plugin_commands())]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        from zoo.catalog import import_object

        target = COMMANDS[name][0] if name in COMMANDS else _plugin_commands().get(name)
        return None if target is None else import_object(target)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from zoo_registry.names import nearest

            near = nearest(args[0], self.list_commands(ctx))
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise click.UsageError(f"there is no command {args[0]!r}{hint}", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])
        if own := _plugin_commands():
            with formatter.section("Commands of plugins"):
                formatter.write_dl([(name, f"from {target.partition('.')[0]}") for name, target in sorted(own.items())])


def _plugin_commands() -> dict[str, str]:
    from zoo_registry import manager

    return {k: v for k, v in manager().commands().items() if k not in COMMANDS}


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ssm-zoo", prog_name="zoo")
@click.option("--debug", is_flag=True, help="Show tracebacks and what is going on.")
def zoo(debug: bool) -> None:
    """The zoo of state-space models.

    Every command takes --json for machines; `zoo COMMAND --help` shows examples.
    """
    _logging("DEBUG" if debug else os.environ.get("ZOO_LOG", "WARNING").upper())


def _logging(level: str) -> None:
    import logging

    names = logging.getLevelNamesMapping()
    if level not in names:
        raise click.UsageError(f"ZOO_LOG is {level!r}; expected one of debug, info, warning, error")
    for name in ("zoo", "zoo_kernels"):
        logger = logging.getLogger(name)
        logger.setLevel(names[level])
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
            logger.addHandler(handler)
            logger.propagate = False


def main(args: list[str] | None = None) -> None:
    """The entry point: runs a command and ends the process with its exit code."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Run a command line; returns the exit code. The one place where errors become messages."""
    import warnings

    from zoo_registry import errors

    words = sys.argv[1:] if args is None else args
    as_json = "--json" in words
    debug = "--debug" in words
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, category, *_: click.echo(f"warning: {message}", err=True)  # type: ignore[assignment]
        try:
            result = zoo.main(args=list(words), prog_name="zoo", standalone_mode=False)
            return result if isinstance(result, int) else 0
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            return 0
        except click.exceptions.Exit as error:
            return error.exit_code
        except (KeyboardInterrupt, click.Abort) as error:
            if isinstance(error.__cause__, EOFError) and str(error.__cause__):  # click takes every one for Ctrl-D
                return _report("EOFError", f"EOFError: {error.__cause__}", 1, as_json)
            click.echo("interrupted", err=True)
            return 130
        except click.ClickException as error:
            return _report("UsageError", error.format_message(), error.exit_code, as_json, _usage(error))
        except errors.ZooError as error:
            if debug:
                raise
            notes = getattr(error, "__notes__", [])
            return _report(type(error).__name__, "\n".join([str(error), *notes]), error.exit_code, as_json)
        except BrokenPipeError:  # the reader of our output (head, less) has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            if not debug and error.errno is None and type(error) is FileNotFoundError:  # a sentence of our own
                return _report("FileNotFoundError", str(error), 3, as_json)
            if debug or error.errno is None:  # libraries' own kinds, which say nothing about a place
                return _unexpected(error, debug, as_json)
            place = f"{error.filename}: " if error.filename is not None else ""
            code = 3 if isinstance(error, FileNotFoundError) else 7
            if isinstance(error, (NotADirectoryError, IsADirectoryError)):
                code = 2
            text = "\n".join([f"{place}{error.strerror or error}", *getattr(error, "__notes__", [])])
            return _report(type(error).__name__, text, code, as_json)
        except Exception as error:
            return _unexpected(error, debug, as_json)


def _unexpected(error: Exception, debug: bool, as_json: bool) -> int:
    if debug:
        raise error
    notes = getattr(error, "__notes__", [])
    if type(error) is ValueError and str(error) and _ours(error):  # a sentence about what was given
        return _report("ValueError", "\n".join([str(error), *notes]), 1, as_json)
    text = "\n".join([f"{type(error).__name__}: {error}", *notes, "`zoo --debug ...` shows where"])
    return _report(type(error).__name__, text, 1, as_json)


def _ours(error: Exception) -> bool:
    """Whether an error was raised by a ``raise`` of the zoo or a plugin, and not below it: by a library, compiled ones
    too, or by an operator, which speaks of tensors that the user did not give."""
    import dis

    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or place.tb_frame.f_code.co_code[place.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return False
    module = str(place.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return module == "zoo" or (module.startswith("zoo_") and module != "zoo_kernels")


def _usage(error: click.ClickException) -> str | None:
    ctx = getattr(error, "ctx", None)
    return f"`{ctx.command_path} --help` shows the options" if ctx is not None else None


def _report(kind: str, message: str, code: int, as_json: bool, hint: str | None = None) -> int:
    if as_json:
        import json

        click.echo(json.dumps({"error": kind, "message": message, "exit_code": code}))
    else:
        click.echo(f"error: {message}" + (f"\n{hint}" if hint else ""), err=True)
    return code
