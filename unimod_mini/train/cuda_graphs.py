"""CUDA graphs: what a host launches operator by operator, recorded once and launched as one.

A step has more than a thousand operators, a routed one more than a dense one. A GPU is done with
most of a small model's before the host has launched the next, so the host sets the pace, and the
FLOPs that a plan saves save no time (docs/speed.md). A recording has no such pace: the same kernels
on the same memory, forward and backward, in one launch.

The routed path can be recorded because K follows from the length: every shape is known beforehand,
and no operator asks the device for a number.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

WARM = 3                           # calls before a recording: libraries allocate at first use


def check_device(device: torch.device) -> None:
    """ValueError unless it is CUDA and in one process: the exchange of DDP is not recorded."""
    if device.type != "cuda" or dist.is_initialized():
        where = "torchrun" if dist.is_initialized() else device.type
        raise ValueError("--graphs is for one process on a CUDA device, started without torchrun, "
                         f"not for {where}: leave it out")


class Recorded:
    """function(*args), a forward and a backward of `model` -> its result, and .grad of the weights.

    args: tensors, floats (float32 in a recording) and plain data, in tuples and dicts. Each
    structure of them (shapes, texts, whole numbers ..) is recorded when it first occurs, and
    replayed with the tensors and floats of every later call. What the function returns must be
    detached. Every call begins without gradients: .grad is written, not added to. The weights must
    stay where they are, as they do with optimizers that update in place. Recordings share their
    memory. ValueError as in check_device, and inside autocast, which belongs into the function.
    """

    def __init__(self, function, model: nn.Module, device: torch.device):
        check_device(device)
        self.function, self.parameters, self.device = function, list(model.parameters()), device
        self.recordings, self.pool = {}, None

    def __call__(self, *args):
        given, structure = tree_flatten(args)
        key = (str(structure), *map(kind_of, given))
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
        return tree_map_only(Tensor, Tensor.clone, output)     # its own memory is written again

    def record(self, given: list, structure) -> tuple:
        """The graph, its input tensors, what the function returned, and gradients."""
        if torch.is_autocast_enabled(self.device.type):
            raise ValueError("CUDA graphs are recorded outside of autocast: enter it inside of the "
                             "function")
        inputs = [self.as_input(x) for x in given]
        args = tree_unflatten(inputs, structure)
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self.forget_gradients()
                self.function(*args)
        here.wait_stream(side)
        self.forget_gradients()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = self.function(*args)
        self.pool = graph.pool()
        return graph, inputs, output, [p.grad for p in self.parameters]

    def as_input(self, x):
        """Memory of the graph's own for a tensor or a float."""
        if isinstance(x, Tensor):
            return x.to(self.device, copy=True)
        if isinstance(x, float):
            return torch.full((), x, device=self.device)
        return x

    def forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def kind_of(x):
    """What must be the same for a recording to serve: all but the values of tensors and floats."""
    if isinstance(x, Tensor):
        return "tensor", x.shape, x.dtype
    return "number" if isinstance(x, float) else x
