"""The `Plan`: which share of the tokens every layer processes, for every task.

Everything else follows from it: the kind of a layer (dense, T2I-MoD, MMU-MoD, Shared-MoD), which
routers exist, how many tokens they keep, the FLOPs, the size of the cache. Every method of the
comparison is a plan, and none is a class of its own.
"""

import json
from dataclasses import asdict, dataclass

from .atomic_files import write_json

TASKS = ("t2i", "mmu", "lm")


def capacity(keep: float, length: int) -> int:
    """K = floor(keep T + 1/2), the number of slots that a layer computes for a sequence of `length` tokens."""
    return int(keep * length + 0.5)


@dataclass(frozen=True)
class Plan:
    """Which share of the tokens every layer processes, for every task.

    keep[task][layer]: 1 = dense, 0 = the layer is skipped, between = the best-scored share of the tokens.
    shared_router: one router a layer serves all tasks (what basic MoD does) instead of one router a task (UniMoD).
    Raises ValueError for an unknown task, rows of different lengths, or a keep ratio outside [0, 1].
    """

    keep: dict
    shared_router: bool = False

    def __post_init__(self):
        try:
            if any(isinstance(row, (str, bytes, dict)) for row in self.keep.values()):
                raise TypeError
            rows = {task: tuple(float(k) for k in row) for task, row in self.keep.items()}
        except (AttributeError, TypeError, ValueError, OverflowError):
            raise ValueError(f'Plan: keep must be {{task: (a ratio for each layer)}}, such as {{"t2i": (1, .5)}}, got '
                             f"{self.keep!r}") from None
        if not isinstance(self.shared_router, bool):
            raise ValueError(f"Plan: shared_router must be True or False, got {self.shared_router!r}")
        if unknown := set(rows) - set(TASKS):
            raise ValueError(f"Plan: unknown task {sorted(map(str, unknown))}, the tasks are {', '.join(TASKS)}")
        if len({len(row) for row in rows.values()}) != 1 or not next(iter(rows.values())):
            lengths = {task: len(row) for task, row in rows.items()}
            raise ValueError(f"Plan: every task needs one keep ratio a layer, got rows of length {lengths}")
        for task, row in rows.items():
            if bad := [k for k in row if not 0.0 <= k <= 1.0]:
                raise ValueError(f"Plan: keep ratios of {task!r} must lie in [0, 1], got {bad}")
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
        """Tasks that need a router in this layer."""
        return [task for task in self.tasks if 0.0 < self.keep[task][layer] < 1.0]

    @property
    def routes(self) -> bool:
        """Does any layer choose among tokens? A plan of whole and skipped layers does not."""
        return any(map(self.routed, range(self.n_layer)))

    def kind(self, layer: int) -> str:
        """The block kind of the paper: dense, T2I-MoD, MMU-MoD .. (one task prunes) or Shared-MoD (several do)."""
        pruned = [task for task in self.tasks if self.keep[task][layer] < 1.0]
        return "dense" if not pruned else f"{pruned[0].upper()}-MoD" if len(pruned) == 1 else "Shared-MoD"

    @classmethod
    def dense(cls, n_layer: int, tasks=("t2i", "mmu")) -> "Plan":
        return cls({task: (1.0,) * n_layer for task in tasks})

    @classmethod
    def mod(cls, n_layer: int, tasks=("t2i", "mmu"), keep: float = 0.5) -> "Plan":
        """Basic MoD: one router for all tasks, the same keep on every other layer (odd layers, counted from 0)."""
        row = tuple(keep if layer % 2 else 1.0 for layer in range(n_layer))
        return cls({task: row for task in tasks}, shared_router=True)

    @classmethod
    def interleaved(cls, n_layer: int, tasks=("t2i", "mmu")) -> "Plan":
        """Every other layer is skipped by all tokens."""
        return cls({task: tuple(float(layer % 2 == 0) for layer in range(n_layer)) for task in tasks})

    @classmethod
    def early_exit(cls, n_layer: int, tasks=("t2i", "mmu"), exit_layer: int | None = None) -> "Plan":
        """All tokens leave before `exit_layer`, 0 to n_layer (default: three quarters of the depth)."""
        stop = max(1, 3 * n_layer // 4) if exit_layer is None else exit_layer
        if not 0 <= stop <= n_layer:
            raise ValueError(f"Plan.early_exit: exit_layer must lie in 0 to {n_layer}, got {stop}")
        return cls({task: tuple(float(layer < stop) for layer in range(n_layer)) for task in tasks})

    def save(self, path) -> None:
        """Write as JSON, to a temporary name first."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path) -> "Plan":
        """Read what `save` wrote. ValueError names the file when it is not a plan."""
        with open(path) as file:
            try:
                stored = json.load(file)
                return cls(stored["keep"], stored.get("shared_router", False))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is not a plan (expected JSON with keep): {error}") from None

    def __str__(self) -> str:
        header = "layer  " + "".join(f"{task:>7}" for task in self.tasks) + "   kind"
        lines = [f"{layer:>5}  " + "".join(f"{self.keep[task][layer]:>7.3f}" for task in self.tasks)
                 + f"   {self.kind(layer)}" for layer in range(self.n_layer)]
        return "\n".join([header, *lines])


BASELINES = {"mod": Plan.mod, "interleaved": Plan.interleaved, "early_exit": Plan.early_exit, "dense": Plan.dense}
