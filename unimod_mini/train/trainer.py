"""What moves in a run of train_full.py, and the one step that moves it, in one process or in many.

A step is forward and backward over its micro-batches, one exchange of gradients, clipping, one
update. Its loss is the mean over the labelled tokens of all micro-batches and ranks: the hosts add
up their counts first (a small all-reduce between CPUs), every micro-batch weighs its losses with
its share of them, and all that follows are sums.

A host never waits for a CUDA device in here, not even in steps whose loss or gradient is not
finite: the flag stays on the device and goes into the optimizers (`found_inf` of torch's fused
AdamW, and of optim.Muon), which then change nothing. The gradient's norm and the added losses are
the same on every rank, so every rank skips the same steps.
"""

import gc
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from ..objectives import IGNORE, Objective, forward_backward, training_rules
from ..optim import clip_gradients, learning_rate, make_optimizers, set_rate
from ..transformer import UnifiedTransformer
from .checkpoints import named_tensors
from .cuda_graphs import Recorded
from .distributed import (freeze_unused, gathered, gradient_sync, local_part, parallelised, reshard,
                          sum_over_ranks, world_size)


def token_counts(batch) -> tuple[int, int]:
    """(labelled tokens, valid tokens) of a batch on the CPU: what its losses are means over."""
    n_valid = batch.ids.numel() if batch.valid is None else int(batch.valid.sum())
    return int((batch.labels != IGNORE).sum()), n_valid


def shares_of_step(batches: list) -> list:
    """[{task: Batch}] of this rank -> [{task: (a, b)}]; all ranks call it.

    a and b: this micro-batch's share of the labelled and of the valid tokens of the whole step.
    """
    counts = []
    for micro in batches:
        counts.append({task: token_counts(batch) for task, batch in micro.items()})
    tasks = list(dict.fromkeys(task for micro in counts for task in micro))
    step = torch.zeros(len(tasks), 2, dtype=torch.float64)
    for micro in counts:
        for task, pair in micro.items():
            step[tasks.index(task)] += torch.tensor(pair)
    of = dict(zip(tasks, sum_over_ranks(step).clamp(min=1.0)))
    shares = []
    for micro in counts:
        shares.append({task: tuple((torch.tensor(pair) / of[task]).tolist())
                       for task, pair in micro.items()})
    return shares


def to_device(micro: dict, device: torch.device) -> dict:
    """{task: Batch} on the device, through pinned memory for CUDA: the host does not wait."""
    if device.type == "cuda":
        micro = {task: batch.map(Tensor.pin_memory) for task, batch in micro.items()}
    return {task: batch.to(device) for task, batch in micro.items()}


class Trainer:
    """A model with its wrapper, optimizers, average and counters.

    config: that of train_full.py; lengths: {task: tokens}; stage: "dense" or "unimod"; step: how
    many are done, which is the data position too; since: the step at which the stage began.
    """

    def __init__(self, model, config, device: torch.device, lengths: dict, stage: str,
                 step: int = 0, since: int = 0):
        self.config, self.device, self.lengths, self.step = config, device, lengths, step
        self.tasks = tuple(lengths)
        self.skipped = torch.zeros(2, device=device)       # steps: in a row up to now, in all
        self.enter(stage, model, since)

    def enter(self, stage: str, model, since: int) -> None:
        """Begin a stage with this model, fresh optimizers and average; the old ones are freed."""
        self.release()
        self.stage, self.model, self.since = stage, model, since
        config = self.config
        model.precision = config.precision
        freeze_unused(model, self.lengths)
        prepare_blocks(model, config)
        self.objective = Objective(model)
        self.wrapped = parallelised(self.objective, config.parallel, self.device)
        # DDP and FSDP divide the gradient by the number of ranks
        self.passes = partial(forward_backward, self.wrapped, scale=world_size())
        if config.graphs:
            self.passes = Recorded(self.passes, model, self.device)
        self.optimizers = make_optimizers(
            model, config.muon_lr if config.optimizer == "muon" else None, config.lr,
            config.weight_decay, vector_decay=0.0, betas=(0.9, 0.95), fused=True)
        self.average = {}
        if config.ema:
            for name, p in model.named_parameters():
                self.average[name] = p.detach().clone()

    def release(self) -> None:
        """Free model, wrapper, optimizers and average.

        DDP must not outlive its process group: as the group's last owner, its destructor waits for
        a thread that waits for Python's lock.
        """
        self.model = self.objective = self.wrapped = self.passes = None
        self.optimizers = self.average = None
        gc.collect()                                       # FSDP's modules lie in cycles

    def rate(self) -> float:
        """Factor of the peak rate.

        A dense stage that a switch will end stays at the peak: what UniMoD takes out has to be
        learnt anew.
        """
        last = self.stage == "unimod" or self.config.dense >= 1
        done, steps = self.step - self.since, self.config.steps - self.since
        return learning_rate(done, steps, self.config.warmup, float(last), self.config.decay)

    def train_step(self, batches: list, shares: list) -> tuple[Tensor, Tensor]:
        """One step -> losses (tasks, 2), of task and predictors, and the gradient's norm."""
        self.objective.train()
        losses = torch.zeros(len(self.tasks), 2, device=self.device)
        for number, (micro, share) in enumerate(zip(batches, shares, strict=True), start=1):
            rules = training_rules(self.step, micro) if self.model.plan.routes else None
            with gradient_sync(self.wrapped, now=number == len(batches)):
                shown = self.passes(to_device(micro, self.device), share, rules)
            losses += torch.stack([shown[task] for task in self.tasks])
        norm = clip_gradients(self.model, self.config.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = sum_over_ranks(losses).isfinite().all() & norm.isfinite()
        self.update(bad=1.0 - finite.float())
        return losses, norm

    def update(self, bad: Tensor) -> None:
        """Optimizers and average. bad () float: where it is 1, all stays as it is."""
        set_rate(self.optimizers, self.rate())
        for optimizer in self.optimizers:
            optimizer.found_inf = bad
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        in_a_row, in_all = self.skipped
        self.skipped = torch.stack(((in_a_row + 1) * bad, in_all + bad))
        if self.average:
            self.update_average(bad)
        self.step += 1

    def update_average(self, bad: Tensor) -> None:
        """average <- decay average + (1 - decay) weights; at first a mean over few steps."""
        n = self.step - self.since
        decay = min(self.config.ema, (1 + n) / (10 + n))
        averages, weights = [], []
        for name, p in self.model.named_parameters():
            averages.append(local_part(self.average[name]))
            weights.append(local_part(p.detach()))
        torch._foreach_lerp_(averages, weights, [(1 - decay) * (1 - bad)] * len(weights))

    @torch.no_grad()
    def evaluate(self, batches: list, shares: list) -> dict:
        """{task: mean loss over all micro-batches and ranks} of the (averaged) model; all ranks."""
        self.objective.eval()
        sums = {}
        with self.averaged():
            for micro, share in zip(batches, shares, strict=True):
                _, losses = self.objective(to_device(micro, self.device), share)
                for task, pair in losses.items():
                    sums[task] = sums.get(task, 0) + pair
            reshard(self.objective)
        return {task: sum_over_ranks(pair)[0].item() for task, pair in sums.items()}

    @contextmanager
    def averaged(self):
        """Inside, the model has the averaged weights (if there are any); afterwards its own."""
        self.swap_average()
        try:
            yield
        finally:
            self.swap_average()

    def swap_average(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self.average:
                weight, average = local_part(parameter.detach()), local_part(self.average[name])
                kept = weight.clone()
                weight.copy_(average)
                average.copy_(kept)

    def tensors(self) -> dict:
        """{name: tensor}, all of a checkpoint; loading writes into them."""
        counters = {"skipped": self.skipped}
        return named_tensors(self.model, self.optimizers, average=self.average, count=counters)

    def bare_model(self, average: bool, here: bool = True) -> UnifiedTransformer | None:
        """A copy of the (averaged) model without wrappers, on the CPU.

        All ranks call it, those with `here` get it.
        """
        with self.averaged() if average else nullcontext():
            weights = gathered(self.model.state_dict(), here)
        if not here:
            return None
        with torch.device("meta"):                         # takes no memory and no random number
            model = UnifiedTransformer(self.model.config, self.model.plan)
        model.load_state_dict(weights, assign=True)
        model.precision = self.model.precision
        return model


def prepare_blocks(model, config) -> None:
    """What the settings change about how a model computes, not what it computes."""
    if config.activation_checkpointing:
        keep_rng = model.config.attention_dropout > 0
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                    preserve_rng_state=keep_rng)
    if config.compile:
        # a graph for each task, block kind and length, with and without gradients
        limits, graphs = torch._dynamo.config, 64 + 8 * len(model.blocks)
        limits.recompile_limit = graphs
        limits.accumulated_recompile_limit = max(graphs, limits.accumulated_recompile_limit)
        for module in model.blocks if config.parallel == "fsdp" else [model]:
            module.compile(dynamic=False)
