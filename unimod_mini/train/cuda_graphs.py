"""CUDA graphs: what a host launches operator by operator, recorded once and then launched as one.

A step has more than a thousand operators, a routed one more than a dense one. A GPU is done with most of a small
model's before the host has launched the next, so the host sets the pace, and the FLOPs that a plan saves save no time
(docs/speed.md). A recording has no such pace: the same kernels on the same memory, forward and backward, one launch.

That the routed path can be recorded is a property of it: K follows from the length, so every shape is known
beforehand, and no operator asks the device for a number.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

WARM = 3                           # calls before a recording: libraries allocate at first use


def check(device: torch.device) -> None:
    """ValueError for a device that is not CUDA, and in a process of several: DDP's exchange is not recorded."""
    if device.type != "cuda" or dist.is_initialized():
        where = "torchrun" if dist.is_initialized() else device.type
        raise ValueError(f"--graphs is for one process on a CUDA device, started without torchrun, not for {where}: "
                         "leave it out")


class Recorded:
    """function(*args), a forward and a backward pass of `model` -> what it returns, and .grad of the parameters.

    args: tensors, floats (float32 in a recording) and plain data in tuples and dicts. Each structure of them (shapes,
    texts, whole numbers, ..) is recorded when it first occurs, and replayed with the tensors and floats of every later
    call. What the function returns must be detached. Every call begins without gradients: .grad is written, not added
    to. The weights must stay where they are, as they do with optimisers that update in place. Recordings share their
    memory, and each is made after WARM calls that draw their own dropout. ValueError as in check, and inside autocast,
    whose casts would be recorded once for all (autocast belongs into the function).
    """

    def __init__(self, function, model: nn.Module, device: torch.device):
        check(device)
        self.function, self.parameters, self.device = function, list(model.parameters()), device
        self.recordings, self.pool = {}, None

    def __call__(self, *args):
        given, structure = tree_flatten(args)
        key = (str(structure), *(("tensor", x.shape, x.dtype) if isinstance(x, Tensor) else
                                 "number" if isinstance(x, float) else x for x in given))
        if key not in self.recordings:
            self.recordings[key] = self.record(given, structure)
        graph, inputs, output, gradients = self.recordings[key]
        for mine, theirs in zip(inputs, given):
            if isinstance(theirs, Tensor):
                mine.copy_(theirs, non_blocking=True)
            elif isinstance(theirs, float):
                mine.fill_(theirs)
        graph.replay()
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient
        return tree_map_only(Tensor, Tensor.clone, output)                   # its own memory is written again

    def record(self, given: list, structure) -> tuple:
        """(graph, its input tensors, what the function returned, gradients), all of them the graph's own memory."""
        if torch.is_autocast_enabled(self.device.type):
            raise ValueError("CUDA graphs are recorded outside of autocast: enter it inside of the function")
        inputs = [x.to(self.device, copy=True) if isinstance(x, Tensor) else
                  torch.full((), x, device=self.device) if isinstance(x, float) else x for x in given]
        args, here, side = tree_unflatten(inputs, structure), torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self.forget()
                self.function(*args)
        here.wait_stream(side)
        self.forget()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = self.function(*args)
        self.pool = graph.pool()
        return graph, inputs, output, [p.grad for p in self.parameters]

    def forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
