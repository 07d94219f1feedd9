"""Files that are whole or not there: written under a temporary name, then renamed."""

import contextlib
import json
import os


@contextlib.contextmanager
def whole_file(path, mode: str = "w", **options):
    """A file that is opened as `path`.tmp and takes its name when all is written; text is UTF-8. options: of open."""
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    with open(f"{path}.tmp", mode, **text, **options) as file:
        yield file
    os.replace(f"{path}.tmp", path)


def write_json(path, content) -> None:
    """Plain data as one JSON text."""
    text = json.dumps(content, indent=1) + "\n"            # first: what is no JSON leaves no file
    with whole_file(path) as file:
        file.write(text)
