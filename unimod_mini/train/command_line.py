"""A frozen dataclass of settings and its command line: what a setting is stands in one place.

    steps: int = setting(2000, "of both stages together", low=1)

becomes --steps, of its type, with its help text and default; a value outside of its range or its
choices is an error that names it. Built on argparse, without its abbreviations.
"""

import argparse
import difflib
from dataclasses import asdict, field, fields

from ..console import flag


def setting(default, help: str, low: float | None = None, high: float | None = None,
            choices: tuple = ()):
    """A field of a settings dataclass."""
    about = {"help": help, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=about)


def check_settings(config) -> None:
    """ValueError for a value outside of its choices or its range, naming the setting."""
    for one in fields(config):
        value, about = getattr(config, one.name), one.metadata
        if about["choices"] and value not in about["choices"]:
            raise ValueError(f"{flag(one.name)} {value}{suggestion(value, about['choices'])}")
        low, high = about["low"], about["high"]
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            wanted = f"{low} or more" if high is None else f"{low} to {high}"
            raise ValueError(f"{flag(one.name)} {value}: expected {wanted}")


def suggestion(name: str, names) -> str:
    """", did you mean ..?" when something is near, else the list."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f": did you mean {near[0]}?" if near else f": choose from {', '.join(names)}"


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text}")
    return text.lower() == "true"


class SettingsParser(argparse.ArgumentParser):
    """The command line of a settings dataclass; its errors are ValueErrors of one line."""

    def __init__(self, config: type, description: str):
        super().__init__(description=description, allow_abbrev=False,
                         argument_default=argparse.SUPPRESS,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        for one in fields(config):
            given = {"type": one.type, "metavar": one.type.__name__.upper()}
            if one.type is bool:                           # --compile alone is true
                given = {"type": true_or_false, "metavar": "true|false", "nargs": "?",
                         "const": True}
            text = one.metadata["help"].replace("%", "%%")
            self.add_argument(flag(one.name), help=f"{text} ({one.default})", **given)

    def parse_given(self, argv: list) -> dict:
        """["--steps", "5"] -> {"steps": 5}: what was given, without defaults."""
        given, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            raise ValueError(f"unknown setting {unknown[0]}"
                             + suggestion(unknown[0].partition("=")[0], flags))
        return vars(given)

    def error(self, message: str):
        raise ValueError(message)


def listing(config) -> str:
    """A configuration, one `--key value` a line."""
    return "\n".join(f"  {flag(name):<28}{value}" for name, value in asdict(config).items())
