"""Files that are whole or not there: written under a temporary name, read back, then renamed.

What is written can be read: `plain` turns what people have (numpy's numbers, paths, a Plan) into
plain data, or says which entry it cannot turn, before a byte is written; `save_data` loads its file
before the file gets its name.
"""

import contextlib
import errno
import json
import os
import re
from dataclasses import asdict, is_dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)  # full, over a limit, broken


def plain(x, name: str = "data"):
    """x as dicts, lists, tuples, numbers, texts and tensors, which every reader knows.

    ValueError names what is none.
    """
    if x is None or isinstance(x, Tensor):
        return x
    # numpy's float64 and str_ are kinds of Python's own
    for kind in (bool, int, float, str, bytes):
        if isinstance(x, kind):
            return kind(x)
    if isinstance(x, dict):
        return {plain(key, f"a key of {name}"): plain(x[key], f"{name}[{key!r}]") for key in x}
    if isinstance(x, (list, tuple)):
        kind = tuple if type(x) is tuple else list
        return kind(plain(value, f"{name}[{i}]") for i, value in enumerate(x))
    if isinstance(x, np.generic):
        return plain(x.item(), name)
    if isinstance(x, np.ndarray) and x.dtype.kind in "biufc":
        return torch.tensor(x)
    if isinstance(x, Path):
        return str(x)
    if is_dataclass(x) and not isinstance(x, type):        # a Plan, a ModelConfig
        return plain(asdict(x), name)
    raise ValueError(f"{name} is a {type(x).__name__}: only plain data can be stored (numbers, "
                     "texts, tensors, and lists and dicts of them)")


@contextlib.contextmanager
def whole_file(path, mode: str = "w", **options):
    """A file that is opened as `path`.tmp and takes its name when all is written; text is UTF-8.
    options: of open.

    Its folder is made if need be. When writing fails nothing is left; OSError where the disk is the
    reason.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(f"{path}.tmp", mode, **text, **options) as file:
            yield file
        os.replace(f"{path}.tmp", path)
    except BaseException as error:
        Path(f"{path}.tmp").unlink(missing_ok=True)
        if trouble := disk_trouble(error):
            raise OSError(f"{path} was not written: {trouble}") from error
        raise


def disk_trouble(error: BaseException | None) -> str | None:
    """What the disk has to do with an error: torch raises one of its own behind the OSError,
    safetensors writes "(os error 28)", numpy counts what was written.
    """
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno in DISK:
            return os.strerror(error.errno)
        if number := re.search(r"os error (\d+)", text):
            return os.strerror(int(number[1]))
        if re.search(r"\d+ requested and \d+ written", text):
            return f"{text}, is the disk full?"
        error = error.__context__
    return None


def save_data(path, data: dict) -> None:
    """torch.save of plain data and tensors. ValueError names an entry that is neither.

    The file is read back as load_checkpoint reads it (weights_only=True) before it gets its name.
    """
    data = plain(data)
    with whole_file(path, "wb") as file:
        torch.save(data, file)
        file.flush()
        # mmap: the weights' bytes are not copied
        back = torch.load(file.name, "cpu", mmap=True, weights_only=True)
        if outline(back) != outline(data):
            raise OSError(f"{path}: what was written is not what is read back: look at the disk")


def outline(data) -> str:
    """Every name and number, and in place of a tensor its shape and dtype."""
    return str(tree_map_only(Tensor, lambda x: (tuple(x.shape), x.dtype), data))


def json_text(content, indent: int | None = None) -> str:
    """Plain data as JSON, which has no NaN and no infinity: null stands for them."""
    finite = json.loads(json.dumps(plain(content)), parse_constant=lambda name: None)
    return json.dumps(finite, indent=indent, ensure_ascii=False)


def write_text(path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text)


def write_json(path, content) -> None:
    """Plain data as one JSON text."""
    write_text(path, json_text(content, indent=1) + "\n")
