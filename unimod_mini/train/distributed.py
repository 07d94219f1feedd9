"""One training run in one or in many processes: joining, agreeing, wrapping the model, gathering.

`torchrun` (or whatever sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) starts the
processes; without those variables there is one process and no group, and everything here does
nothing. Two backends serve one group: nccl carries the gradients of CUDA devices, gloo carries what
the hosts tell each other (counts, plans, "stop"), so that a host never waits for a device. On a CPU
gloo carries both.

Departure from the usual: no parameter is searched for at run time. A plan says beforehand which
blocks and routers no task reaches; those are frozen, so that plain DDP works and every rank reduces
the same gradients.
"""

import os
import signal
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..plan import capacity


class Ranks(NamedTuple):
    rank: int                      # number of this process in the whole job
    world: int                     # processes of the whole job
    local: int                     # number of this process on its machine

    @property
    def first(self) -> bool:
        """Is this the process that prints and writes?"""
        return self.rank == 0


@contextmanager
def process_group(device: torch.device, minutes: float):
    """The Ranks of this process, in a group when there are several; it leaves the group at the end.

    minutes: how long a process waits for the others before it ends with an error. ValueError when
    there are more processes on a machine than CUDA devices, and for several on MPS.
    """
    variables = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    ranks = Ranks(*[int(os.environ.get(name, default)) for name, default in variables])
    if device.type == "cuda":
        there = torch.cuda.device_count()
        if device.index is None and ranks.local >= there:
            raise ValueError(f"process {ranks.local} of this machine has no CUDA device, there "
                             f"are {there}: --nproc-per-node {there} at most")
        torch.cuda.set_device(ranks.local if device.index is None else device.index)
    if "WORLD_SIZE" not in os.environ:
        yield ranks
        return
    if device.type == "mps":
        raise ValueError("torch has no backend between processes on MPS: give --device cpu, or "
                         "start one process")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    yield ranks                    # an error just drops the group: the others end on it
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def asked_to_stop():
    """A list that is empty until a SIGTERM or Ctrl-C comes, which then does nothing else.

    A second Ctrl-C does no more: torchrun hands each of them on, so one press comes twice.
    """
    asked, before = [], {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, lambda *_: asked.append(True))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- Agreeing ---

def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(numbers: Tensor) -> Tensor:
    """The sum over all ranks, in place; the host does not wait for a CUDA device."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


def any_rank(flag: bool) -> bool:
    """Is it True on any rank? All of them call it."""
    return sum_over_ranks(torch.tensor(float(flag))).item() > 0


def from_first_rank(make):
    """make() as the first rank returns or raises it, on every rank; the others do not call it.

    Plain data alone.
    """
    if not dist.is_initialized():
        return make()
    box = [None, None]             # what it returned, what it raised
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


# --- The model ---

def freeze_unused(model, lengths: dict) -> None:
    """requires_grad False for blocks and routers that no task reaches. lengths: {task: tokens}.

    A block is reached by a task that keeps K >= 1 tokens there, a predictor by every task that its
    layer routes, a router's score by one that keeps K >= 1 (always, when it is its own predictor).
    """
    keep = model.plan.keep
    for layer, block in enumerate(model.blocks):
        reached = {task for task, length in lengths.items()
                   if capacity(keep[task][layer], length) > 0}
        block.requires_grad_(bool(reached))
        for name, router in model.routers[layer].items():
            served = {task for task in lengths
                      if name in (task, "shared") and 0 < keep[task][layer] < 1}
            router.requires_grad_(bool(served))
            if router.predictor is not None:
                router.score.requires_grad_(bool(served & reached))


def parallelised(objective: nn.Module, parallel: str, device: torch.device) -> nn.Module:
    """The module to call: DDP around `objective`; or itself, as it is or sharded by FSDP2.

    FSDP2 shards block by block, and takes the weights of the first rank; on the others the model
    may lie on the meta device.
    """
    if not dist.is_initialized():
        return objective.to(device)
    if parallel == "ddp":
        return DistributedDataParallel(objective.to(device), broadcast_buffers=False,
                                       gradient_as_bucket_view=True)
    weights = objective.state_dict() if dist.get_rank() == 0 else {}
    objective.to("meta")                                   # no memory but for a rank's own shard
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in objective.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh).to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(objective, weights, options=options)
    return objective


def gradient_sync(wrapped: nn.Module, now: bool):
    """A context for forward and backward: gradients are averaged over ranks `now`, or added up."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(now)
    if isinstance(wrapped, DistributedDataParallel) and not now:
        return wrapped.no_sync()
    return nullcontext()


def reshard(objective: nn.Module) -> None:
    """After a forward without backward: FSDP2 would leave the outermost weights gathered."""
    if isinstance(objective, FSDPModule):
        objective.reshard()


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, the same memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: dict, here: bool = True) -> dict:
    """{name: a whole copy on the CPU}; every rank must call it, `here` says who keeps them."""
    out = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        if here:
            out[name] = full.to("cpu", copy=True)
    return out
