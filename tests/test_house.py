"""The house: the method imports nothing from the rooms beside it, and no arrows go in a circle."""
import ast
from pathlib import Path

import unimod_mini

HOME = Path(unimod_mini.__file__).parent
ROOMS = ("data", "train", "weights")
DOORS = ("__init__", "prepare")    # public names, and the command of data/prepare.py


def imports() -> dict:
    """{module: the modules of this package that it imports}, lazy imports too.

    Without the doors, and without what a module does only when it is run as a command.
    """
    found = {}
    for path in HOME.rglob("*.py"):
        name = ".".join(path.relative_to(HOME).with_suffix("").parts)
        if path.stem == "__init__" or name in DOORS:
            continue
        found[name] = set()
        statements = ast.parse(path.read_text()).body
        as_command = {s for s in statements if isinstance(s, ast.If) and "__name__" in ast.dump(s.test)}
        nodes = [node for s in statements if s not in as_command for node in ast.walk(s)]
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.level:
                room = name.split(".")[:-node.level]
                found[name].add(".".join([*room, node.module or ""]))
    return found


def test_the_method_imports_nothing_from_the_rooms():
    """The top of the package is what the pages teach: readers of files, runs and folders are
    built on it.
    """
    for name, used in imports().items():
        if "." not in name:
            assert not any(other.split(".")[0] in ROOMS for other in used), name


def test_imports_go_in_no_circle():
    """Every module can be read before those that import it."""
    left = imports()
    assert len(left) > 25 and "plan" in left["routers"]
    while left:
        ready = [name for name, used in left.items() if not used & left.keys()]
        assert ready, f"in a circle: {', '.join(left)}"
        for name in ready:
            del left[name]
