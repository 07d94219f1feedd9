"""`--key value` overrides of a frozen dataclass: typed by its fields, nothing guessed, nothing ignored.

Departures from the usual: no argparse (its prefixes and type=bool take what was not meant) and no exec. A key is a
field with - or _; a bool takes true or false, or stands alone for true; a misspelt key is an error with the nearest.
"""

import difflib
import inspect
from dataclasses import fields

from ..console import flag

WORDS = {"true": True, "false": False}


def nearest(name: str, names) -> str:
    """", did you mean ..?" when something is near, else the list."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f": did you mean {near[0]}?" if near else f": choose from {', '.join(names)}"


def typed(name: str, kind: type, text: str):
    """One value. ValueError names the key, what was given and what is expected."""
    try:
        return WORDS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{flag(name)} {text}: expected {expected}") from None


def overrides(config: type, argv: list) -> dict:
    """["--steps", "5", "--compile", "--seed=1"] -> {"steps": 5, "compile": True, "seed": 1}, else a ValueError."""
    kinds, out, left = {field.name: field.type for field in fields(config)}, {}, list(argv)
    while left:
        key, given, value = left.pop(0).partition("=")
        name = key.removeprefix("--").replace("-", "_")
        if not key.startswith("--"):
            raise ValueError(f"{key!r} is no --key: every setting is written --key value")
        if name not in kinds:
            raise ValueError(f"unknown setting {key}" + nearest(key, [flag(n) for n in kinds]))
        if name in out:
            raise ValueError(f"{key} is given twice")
        if not given:
            alone = not left or left[0].startswith("--")
            if alone and kinds[name] is not bool:
                raise ValueError(f"{key} needs a value")
            value = "true" if alone else left.pop(0)
        out[name] = typed(name, kinds[name], value)
    return out


def listing(config) -> str:
    """A configuration, one `--key value` a line."""
    return "\n".join(f"  {flag(field.name):<28}{getattr(config, field.name)}" for field in fields(config))


def help_of(config: type) -> str:
    """The fields of a dataclass as its source has them: name, type, default and comment."""
    lines = [line.strip().partition(":") for line in inspect.getsource(config).split("\n\n")[0].splitlines()[2:]]
    return "\n".join(f"  {flag(name)}:{rest}" for name, _, rest in lines)
