"""How a command is run: `prune` where none is named, errors in one line, exit codes, where options come from."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from onnxprune.errors import OnnxPruneError
from onnxprune.helptext import Grouped
from onnxprune.terminal import complain, warnings_told

INTERRUPTED = 130
NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())  # from click 8.2 on


class Commands(click.Group):
    """A group whose default command is `prune`, and which says errors in one line."""

    command_class = Grouped

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            if not ctx.resilient_parsing and not args[0].startswith("-") and not args[0].endswith(".onnx") and not Path(args[0]).exists():
                raise OnnxPruneError(f"'{args[0]}' is neither a file nor a command ({', '.join(self.commands)}); see `onnxprune --help`")
            args = ["prune", *args]
        if args and not ctx.resilient_parsing and not _silent(args):
            _say_configuration(ctx.obj, ctx.default_map or {}, self.commands.get(args[0]))
        return super().parse_args(ctx, args)

    def make_context(self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any) -> click.Context:
        if not extra.get("resilient_parsing") and not {"--help", "-h", "--version"}.intersection(args):
            from onnxprune.configuration import read_configuration

            extra["obj"], extra["default_map"] = read_configuration(self.commands)
        return super().make_context(info_name, args, parent, **extra)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands, and files, as a model may be the first word."""
        found = super().shell_complete(ctx, incomplete)
        return found if incomplete and found else [*found, CompletionItem(incomplete, type="file")]

    def main(self, *args: Any, **extra: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # an arrow that an encoding lacks is no reason to fail
        try:
            with warnings_told():
                code = super().main(*args, **{**extra, "standalone_mode": False})
        except OnnxPruneError as error:
            complain(str(error))
            if {"-v", "--verbose"}.intersection(sys.argv[1:]):
                click.echo(_cause(error), err=True, nl=False)
            sys.exit(error.exit_code)
        except click.exceptions.Abort:
            complain("interrupted; no half-written file is left")
            sys.exit(INTERRUPTED)
        except NO_ARGUMENTS as error:
            click.echo(error.format_message())
            sys.exit(2)
        except click.ClickException as error:
            hint = f"; see `{error.ctx.command_path} --help`" if isinstance(error, click.UsageError) and error.ctx else ""
            complain(error.format_message().rstrip(".") + hint)
            sys.exit(2)
        except MemoryError:
            complain("out of memory; use a smaller batch (--input-shape) or more memory")
            sys.exit(2)
        except BrokenPipeError:
            sys.exit(0)
        except Exception as error:
            if os.environ.get("ONNXPRUNE_DEBUG"):
                raise
            if isinstance(error, OSError | UnicodeError):  # standard output that cannot be written to
                complain(f"cannot print the result ({error}); use --quiet, or another terminal or encoding")
                sys.exit(2)
            complain(f"unexpected {type(error).__name__} ({error}); ONNXPRUNE_DEBUG=1 shows where, please report it")
            sys.exit(4)
        sys.exit(code if isinstance(code, int) else 0)


def _cause(error: BaseException) -> str:
    """All that onnx or onnxruntime said, where an error cites it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return "" if isinstance(error, OnnxPruneError) else f"{error}\n"


def _silent(args: list[str]) -> bool:
    """Whether nothing is to be said but the result, if that."""
    return any(arg in ("-q", "--quiet") or arg.startswith("--json") for arg in args)


def _say_configuration(file: Path | None, defaults: Mapping[str, Any], command: click.Command | None) -> None:
    """The file that options come from, once, so that nobody wonders where from."""
    given = defaults.get(command.name or "", {}) if command else {}
    if file and command and given and not given.get("quiet"):
        flags = [max(option.opts, key=len) for option in command.params if option.name in given]
        click.echo(f"{file}: {', '.join(flags)}; flags on the command line win", err=True)
