"""What every command does about the terminal in front of it, or about the pipe or the file in its
place.

A letter that it cannot show is written as its escape; an error is one line; a closed pipe (`| head
-1`) ends without a word; pictures and progress come in what it can show: colours, plain letters, a
bar, or a line now and then.
"""

import io
import os
import sys
from contextlib import contextmanager

from tqdm import tqdm

EVERY = 30.0   # seconds between two lines of progress where there is no terminal


@contextmanager
def command(stopped: str = "stopped", errors: tuple = (ValueError, OSError, ImportError)):
    """Around a command: what of `errors` it raises is one line and exit status 1.

    stopped: what Ctrl-C is told.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, and not at exit, where nobody catches a closed pipe
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())              # what is still to be flushed
        sys.exit(141)  # what a shell says of a command that SIGPIPE ended
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(130)
    except errors as error:
        sys.exit(f"error: {error}")


def shows() -> str:
    """What stdout can show of a picture: "blocks" (colours, two pixels a letter), "blanks"
    (colours) or "letters".
    """
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR"):
        return "letters"
    try:
        "▀".encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return "blanks"
    return "blocks"


class Lines(tqdm):
    """tqdm without a terminal: a line at the beginning, one every half minute and one at the
    end.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"file": io.StringIO(), "mininterval": EVERY})

    def display(self, *_, **__) -> None:
        print(self, file=sys.stderr, flush=True)


def progress_bar(*args, **options) -> tqdm:
    """A tqdm bar on stderr, as `Lines` where that is no terminal."""
    return (tqdm if sys.stderr.isatty() else Lines)(*args, **options)


def flag(name: str) -> str:
    """A field as the command line writes it."""
    return "--" + name.replace("_", "-")
