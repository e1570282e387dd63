"""Options from a file: `onnxprune.toml`, or the table `[tool.onnxprune]` of a `pyproject.toml`, by the names of the flags.

    ratio = 0.4
    calibration = "samples.npz"
    exclude = ["*/head/*"]
    verify = true

    [groups]
    allow-io = ["embedding"]

A name at the top is for every command that has such a flag, one in a command's own table for that command; flags on the command
line win.  The file is looked for in the working directory, then in the folders above it.  ONNXPRUNE_CONFIG names another one, and
where that is empty none is read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from onnxprune.errors import OnnxPruneError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE, PROJECT, VARIABLE = "onnxprune.toml", "pyproject.toml", "ONNXPRUNE_CONFIG"
Defaults = dict[str, dict[str, Any]]


def read_configuration(commands: Mapping[str, click.Command], folder: Path | None = None) -> tuple[Path | None, Defaults]:
    """The file that counts in a folder, the working directory if not given, None where there is none; its {command: {parameter: value}}.

    Raises OnnxPruneError for a file that is no TOML, a name that is no flag, and a value that is not of the flag's type.
    """
    found = _table(folder or Path.cwd())
    if found is None:
        return None, {}
    path, table = found
    flags = {name: _flags(command) for name, command in commands.items()}
    defaults: Defaults = {name: {} for name in commands}
    for key, value in table.items():
        if isinstance(value, dict) and key in flags:
            for inner, given in value.items():
                if inner not in flags[key]:
                    raise OnnxPruneError(f"{path}: '{key}' has no option '{inner}'; it has {', '.join(sorted(flags[key]))}")
                defaults[key][flags[key][inner].name or ""] = _checked(path, inner, flags[key][inner], given)
            continue
        takers = [name for name in commands if key in flags[name]]
        if not takers:
            known = sorted(set().union(*flags.values()))
            raise OnnxPruneError(f"{path}: there is no option '{key}'; there are {', '.join(known)}")
        for name in takers:
            defaults[name].setdefault(flags[name][key].name or "", _checked(path, key, flags[name][key], value))
    return path, defaults


def _table(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    named = os.environ.get(VARIABLE)
    if named is not None:
        return (Path(named), _read(Path(named))) if named else None
    for place in (folder, *folder.parents):
        if (place / FILE).is_file():
            return place / FILE, _read(place / FILE)
        if (place / PROJECT).is_file() and "[tool.onnxprune" in (place / PROJECT).read_text(encoding="utf-8", errors="replace"):
            return place / PROJECT, _read(place / PROJECT)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OnnxPruneError(f"{path}: cannot be read ({error.strerror}); {VARIABLE} names it") from error
    except ValueError as error:
        raise OnnxPruneError(f"{path}: is not TOML ({error})") from error
    return dict(content.get("tool", {}).get("onnxprune", {})) if path.name == PROJECT else content


def _flags(command: click.Command) -> dict[str, click.Option]:
    """A command's options by their long names without the dashes."""
    options = [one for one in command.params if isinstance(one, click.Option)]
    return {flag.removeprefix("--"): one for one in options for flag in one.opts if flag.startswith("--")}


def _checked(path: Path, key: str, option: click.Option, value: Any) -> Any:
    """The value, as click takes it."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise OnnxPruneError(f"{path}: '{key}' is {value!r}; it must be true or false")
        return value
    if option.multiple:
        value = value if isinstance(value, list) else [value]
    if isinstance(value, dict | bool) or (isinstance(value, list) and not option.multiple):
        raise OnnxPruneError(f"{path}: '{key}' is {value!r}; give it as after --{key}")
    try:
        option.type.convert(value, option, None) if not option.multiple else [option.type.convert(one, option, None) for one in value]
    except click.BadParameter as error:
        raise OnnxPruneError(f"{path}: '{key}' is {value!r}: {error.message}") from error
    return value
