"""The `Plan`: which share of the tokens every layer processes, for every task.

    keep["t2i"] = (1, 1, .6, .6, 1)      1: dense, every token goes through the block
    keep["mmu"] = (1, .2, .2, 0, 1)      0: the layer is skipped; between: the best-scored share

Everything else follows from it: which kind of block a layer is, which routers exist, how many
tokens they keep, the FLOPs, the size of the cache. Every method of the comparison is a plan, and
none is a class of its own.
"""

import json
from dataclasses import asdict, dataclass

from .atomic_files import write_json

TASKS = ("t2i", "mmu", "lm")       # text to image, questions on images, text alone


def capacity(keep: float, length: int) -> int:
    """K = floor(keep T + 1/2): the tokens that a layer computes of a sequence of `length`."""
    return int(keep * length + 0.5)


@dataclass(frozen=True)
class Plan:
    """Keep ratios by task and layer, and who shares a router.

    ValueError for an unknown task, rows of different lengths, or a keep outside [0, 1].
    """

    keep: dict                     # {task: (keep of layer 0, of layer 1, ..)}
    shared_router: bool = False    # one router a layer for all tasks (basic MoD), not one a task

    def __post_init__(self):
        try:
            rows = {task: tuple(map(float, row)) for task, row in self.keep.items()}
        except (AttributeError, TypeError, ValueError):
            raise ValueError('Plan: keep must be {task: (a ratio for each layer)}, such as '
                             f'{{"t2i": (1, .5)}}, got {self.keep!r}') from None
        if unknown := set(rows) - set(TASKS):
            raise ValueError(f"Plan: unknown task {sorted(map(str, unknown))}, the tasks are "
                             f"{', '.join(TASKS)}")
        lengths = {task: len(row) for task, row in rows.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError("Plan: every task needs one keep ratio a layer, got rows of length "
                             f"{lengths}")
        for task, row in rows.items():
            if not all(0.0 <= keep <= 1.0 for keep in row):
                raise ValueError(f"Plan: keep ratios of {task!r} must lie in [0, 1], got {row}")
        object.__setattr__(self, "keep", rows)

    def __hash__(self) -> int:
        return hash((frozenset(self.keep.items()), self.shared_router))

    @property
    def tasks(self) -> tuple:
        return tuple(self.keep)

    @property
    def n_layer(self) -> int:
        return len(next(iter(self.keep.values())))

    def routed(self, layer: int) -> list:
        """The tasks that need a router in this layer."""
        return [task for task in self.tasks if 0.0 < self.keep[task][layer] < 1.0]

    @property
    def routes(self) -> bool:
        """Does any layer choose among tokens? A plan of whole and skipped layers does not."""
        return any(map(self.routed, range(self.n_layer)))

    def kind(self, layer: int) -> str:
        """The block of the paper: dense, T2I-MoD or MMU-MoD (one task prunes it), Shared-MoD."""
        pruning = [task for task in self.tasks if self.keep[task][layer] < 1.0]
        if not pruning:
            return "dense"
        return f"{pruning[0].upper()}-MoD" if len(pruning) == 1 else "Shared-MoD"

    # --- the methods of the comparison ---

    @classmethod
    def dense(cls, n_layer: int, tasks=("t2i", "mmu")) -> "Plan":
        return cls(dict.fromkeys(tasks, (1.0,) * n_layer))

    @classmethod
    def mod(cls, n_layer: int, tasks=("t2i", "mmu"), keep: float = 0.5) -> "Plan":
        """Basic MoD: one router for all tasks, one keep on the odd layers (1, 3, 5 ..)."""
        row = [keep if layer % 2 else 1.0 for layer in range(n_layer)]
        return cls(dict.fromkeys(tasks, row), shared_router=True)

    @classmethod
    def interleaved(cls, n_layer: int, tasks=("t2i", "mmu")) -> "Plan":
        """All tokens skip the odd layers."""
        return cls(dict.fromkeys(tasks, [1.0 - layer % 2 for layer in range(n_layer)]))

    @classmethod
    def early_exit(cls, n_layer: int, tasks=("t2i", "mmu"),
                   exit_layer: int | None = None) -> "Plan":
        """All tokens leave before `exit_layer` (default: three quarters of the depth)."""
        stop = max(1, 3 * n_layer // 4) if exit_layer is None else exit_layer
        if not 0 <= stop <= n_layer:
            raise ValueError(f"Plan.early_exit: exit_layer must lie in 0 to {n_layer}, got {stop}")
        return cls(dict.fromkeys(tasks, [1.0] * stop + [0.0] * (n_layer - stop)))

    # --- printed, saved, loaded ---

    def save(self, path) -> None:
        """Write as JSON; the file gets its name when it is complete."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path) -> "Plan":
        """Read what `save` wrote. ValueError names the file when it is not a plan."""
        with open(path) as file:
            try:
                return cls(**json.load(file))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} is not a plan (JSON with keep): {error}") from None

    def __str__(self) -> str:
        lines = ["layer  " + "".join(f"{task:>7}" for task in self.tasks) + "   kind"]
        for layer in range(self.n_layer):
            keeps = "".join(f"{self.keep[task][layer]:>7.3f}" for task in self.tasks)
            lines.append(f"{layer:>5}  {keeps}   {self.kind(layer)}")
        return "\n".join(lines)


BASELINES = {"mod": Plan.mod, "interleaved": Plan.interleaved, "early_exit": Plan.early_exit,
             "dense": Plan.dense}
