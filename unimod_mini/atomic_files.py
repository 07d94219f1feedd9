"""Files that are whole or not there: written under a temporary name, read back, then renamed.

Only plain data is written, since every reader knows it: numbers, texts, tensors, and lists and
dicts of them.
"""

import json
import os
import re
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from errno import EDQUOT, EFBIG, EIO, ENOSPC
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def as_plain_data(x, name: str = "data"):
    """x with numpy's numbers and arrays, paths and dataclasses (a Plan, say) made plain data.

    ValueError, which says where in `name` it stands, for anything else.
    """
    if isinstance(x, np.generic):
        x = x.item()
    if x is None or isinstance(x, Tensor):
        return x
    for kind in (bool, int, float, str, bytes):
        if isinstance(x, kind):
            return kind(x)  # of a subclass, such as torch's version
    if isinstance(x, dict):
        return {as_plain_data(key, f"a key of {name}"): as_plain_data(value, f"{name}[{key!r}]")
                for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        kind = tuple if type(x) is tuple else list
        return kind(as_plain_data(value, f"{name}[{i}]") for i, value in enumerate(x))
    if isinstance(x, np.ndarray) and x.dtype.kind in "biufc":
        return torch.tensor(x)
    if isinstance(x, Path):
        return str(x)
    if is_dataclass(x) and not isinstance(x, type):
        return as_plain_data(asdict(x), name)
    raise ValueError(f"{name} is a {type(x).__name__}: only plain data can be stored (numbers, "
                     "texts, tensors, and lists and dicts of them)")


@contextmanager
def whole_file(path, mode: str = "w", **options):
    """A file opened as `path`.tmp that gets its name when the block ends well; text is UTF-8.

    Makes the folder. If the block fails, nothing is left of the new file and an older one stays;
    OSError if the disk is the reason. options: of open.
    """
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    if "b" not in mode:
        options |= {"encoding": "utf-8", "errors": "backslashreplace"}
    try:
        with open(temporary, mode, **options) as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if trouble := disk_trouble(error):
            raise OSError(f"{path} was not written: {trouble}") from error
        raise


def disk_trouble(error: BaseException | None) -> str | None:
    """What the disk has to do with an error (torch raises its own after the OSError), or None."""
    while error is not None:
        text = str(error)
        number = getattr(error, "errno", None)
        if number in (ENOSPC, EFBIG, EDQUOT, EIO):  # full, over a limit, broken
            return os.strerror(number)
        if match := re.search(r"os error (\d+)", text):  # safetensors
            return os.strerror(int(match[1]))
        if re.search(r"\d+ requested and \d+ written", text):  # numpy
            return f"{text}, is the disk full?"
        error = error.__context__
    return None


def save_data(path, data: dict) -> None:
    """torch.save of plain data, which is read back before the file gets its name."""
    data = as_plain_data(data)
    with whole_file(path, "wb") as file:
        torch.save(data, file)
        file.flush()
        back = torch.load(file.name, "cpu", mmap=True, weights_only=True)
        if outline(back) != outline(data):
            raise OSError(f"{path}: what was written is not what is read back: look at the disk")


def outline(data) -> str:
    """Every name and number, and in place of a tensor its shape and dtype."""
    return str(tree_map_only(Tensor, lambda x: (tuple(x.shape), x.dtype), data))


def json_text(content, indent: int | None = None) -> str:
    """Plain data as JSON, which has no NaN and no infinity: null stands for them."""
    finite = json.loads(json.dumps(as_plain_data(content)), parse_constant=lambda name: None)
    return json.dumps(finite, indent=indent, ensure_ascii=False)


def write_text(path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text)


def write_json(path, content) -> None:
    write_text(path, json_text(content, indent=1) + "\n")
