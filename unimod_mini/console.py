"""How every command behaves in a terminal, in a pipe, and with its output in a file.

A character that the terminal lacks is written as its escape; an error is one line; a closed pipe
(`| head -1`) ends the command silently; pictures and progress come in the form that can be shown.
"""

import io
import os
import sys
from contextlib import contextmanager

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines of progress outside a terminal


@contextmanager
def command(stopped: str = "stopped", errors: tuple = (ValueError, OSError, ImportError)):
    """Around a command: an error among `errors` becomes one line and exit status 1.

    stopped: what is printed after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's stream has none
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # at exit nobody would catch a closed pipe
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # for what is still to be flushed
        sys.exit(141)  # a shell's status for a command ended by SIGPIPE
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(130)
    except errors as error:
        sys.exit(f"error: {error}")


def shows() -> str:
    """How stdout can show a picture: in coloured half "blocks" or "blanks", or in "letters"."""
    no_colors = os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR")
    if no_colors or not sys.stdout.isatty():
        return "letters"
    try:
        "▀".encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return "blanks"
    return "blocks"


class Lines(tqdm):
    """tqdm outside a terminal: a line at the start, one every half minute and one at the end."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"file": io.StringIO(), "mininterval": EVERY})

    def display(self, *_, **__) -> None:
        print(self, file=sys.stderr, flush=True)


def progress_bar(*args, **options) -> tqdm:
    """A tqdm bar on stderr, or Lines outside a terminal; the arguments are tqdm's."""
    kind = tqdm if sys.stderr.isatty() else Lines
    return kind(*args, **options)


def flag(name: str) -> str:
    """A field's name as the command line writes it: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")
