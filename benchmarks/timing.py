"""Training steps timed in turns: a step, a race of two, and what the pairs of seconds say.

Used by step.py, which says what is compared. Nothing here knows of models or plans.
"""

import statistics
import time
from functools import partial

import numpy as np
import torch

from unimod_mini.train.cuda_graphs import Recorded
from unimod_mini.objectives import Objective, forward_backward, training_rules
from unimod_mini.device import find_precision
from unimod_mini.optim import update

# steps before timing; pairs at least; pairs between two looks at the interval
WARM, FEWEST, CHECK = 3, 12, 4


def synchronize(device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def allocated(device, peak: bool = False) -> int:
    """Bytes that tensors take on a CUDA device, now or at their peak; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device)


def has_sync(step) -> bool:
    """Does one step make the host wait for the CUDA device?"""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


class Step:
    """A model with its optimiser, warmed up: step() is one training step, step.seconds() times it.

    peak: bytes of its own at the peak of a step (weights, optimiser, gradients, activations); None
    without CUDA, and for graphs (graphs.Recorded), whose memory is taken once.
    """

    def __init__(self, build, batches: dict, device, compiled: bool = False, fullgraph: bool = True, graphs=False):
        before = allocated(device)
        with torch.device(device):                         # weights are drawn where they live
            self.model = build().train()
        if compiled:  # static shapes: each plan and length has its own graph
            self.model.compile(fullgraph=fullgraph, dynamic=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.model.precision = find_precision("auto", device)
        passes = partial(forward_backward, Objective(self.model))
        self.passes = Recorded(passes, self.model, device) if graphs else passes
        self.batches, self.device, self.number = batches, device, 0
        for number in range(WARM):
            if number == WARM - 1 and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            self()
        synchronize(device)
        # a recording's is not seen
        self.peak = None if graphs else allocated(device, peak=True) - before or None

    def __call__(self) -> None:
        # changes with every other pair
        self.passes(self.batches, None, training_rules(self.number // 2, self.batches))
        update(self.model, [self.optimizer], 1.0)
        self.number += 1

    def seconds(self) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        self()
        synchronize(self.device)
        return time.perf_counter() - start


def bootstrap(values: list, draws: int = 1000) -> tuple:
    """95 % interval of the median of `values`."""
    values, rng = np.array(values), np.random.default_rng(0)
    medians = np.median(values[rng.integers(len(values), size=(draws, len(values)))], axis=1)
    return tuple(np.quantile(medians, (0.025, 0.975)).tolist())


def summary(pairs: list, flops_saved: float) -> dict:
    """[(seconds dense, seconds UniMoD)] of steps side by side -> time saved and realised share,
    with intervals.

    spread: from the first to the third quartile, over the median.
    """
    out = {"pairs": len(pairs)}
    for name, seconds in zip(("dense", "unimod"), zip(*pairs)):
        first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
        out |= {f"{name}_ms": 1000 * median, f"{name}_spread": (third - first) / median}
    saved = [1 - unimod / dense for dense, unimod in pairs]
    interval = bootstrap(saved)
    return out | {"flops_saved": flops_saved, "time_saved": statistics.median(saved), "time_saved_interval": interval,
                  "realised": statistics.median(saved) / flops_saved,
                  "realised_interval": tuple(end / flops_saved for end in interval)}


def race(dense, unimod, flops_saved: float, limit: float, width: float) -> dict:
    """Pairs of steps, now one and now the other first, until the interval is narrow or the time
    is over -> summary.
    """
    pairs, start = [], time.perf_counter()
    while True:
        if len(pairs) % 2:
            second = unimod.seconds()
            pairs.append((dense.seconds(), second))
        else:
            pairs.append((dense.seconds(), unimod.seconds()))
        over = time.perf_counter() - start >= limit
        if len(pairs) >= FEWEST and (over or len(pairs) % CHECK == 0):
            out = summary(pairs, flops_saved)
            low, high = out["realised_interval"]
            if over or high - low < width:
                return out | {"stopped": "interval" if high - low < width else "time"}
