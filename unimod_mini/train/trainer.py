"""What moves in a run of train_full.py, and the one step that moves it, in one process or in many.

A step is forward and backward over its micro-batches, one exchange of gradients, clipping, one update. Its loss is the
mean over the labelled tokens of all micro-batches and ranks: the hosts add up their counts first (one small all-reduce
between CPUs), every micro-batch weighs its losses with its part of them, and all that follows are sums.

A host never waits for a CUDA device in here. That includes steps whose loss or gradient is not finite: the flag stays
on the device and goes into the optimisers (`found_inf` of torch's fused AdamW, and of optim.Muon), which then change
nothing. The norm of the exchanged gradient and the added losses (a second small all-reduce, between devices) are the
same on every rank, so every rank skips the same steps.

Departure from the usual: the optimiser is not asked whether it may step, and no loss is read to find out.
"""

import gc
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from ..objectives import Objective, token_counts, training_rules
from ..optim import Muon, clip_gradients, hidden_and_rest, learning_rate
from ..transformer import UnifiedTransformer
from .checkpoints import named_tensors
from .cuda_graphs import Recorded
from .distributed import freeze_unused, local, reshard, synchronised, total, whole, wrap


def share_out(batches: list, stop: bool = False) -> tuple[list, bool]:
    """[{task: Batch}] of this rank -> ([{task: (a, b)}], does any rank want to stop?). All ranks call it.

    a and b: the part that this micro-batch has of the labelled and of the valid tokens of the whole step.
    """
    counts = [{task: token_counts(batch) for task, batch in micro.items()} for micro in batches]
    tasks = list(dict.fromkeys(task for micro in batches for task in micro))
    sums = torch.zeros(len(tasks) + 1, 2, dtype=torch.float64)
    for i, task in enumerate(tasks):
        sums[i] = torch.tensor([micro[task] for micro in counts if task in micro]).sum(0)
    sums[-1] = float(stop)
    *rows, (stops, _) = total(sums).tolist()
    whole_step = dict(zip(tasks, rows))
    return [{task: tuple(n / max(1.0, of) for n, of in zip(pair, whole_step[task])) for task, pair in micro.items()}
            for micro in counts], stops > 0


def to_device(micro: dict, device: torch.device) -> dict:
    """{task: Batch} on the device; through pinned memory for CUDA, so that the host does not wait for the copy."""
    if device.type == "cuda":
        micro = {task: batch.map(Tensor.pin_memory) for task, batch in micro.items()}
    return {task: batch.to(device) for task, batch in micro.items()}


def forward_backward(wrapped, micro: dict, part: dict, rules: dict) -> dict:
    """One pass of an Objective, wrapped or not; adds to the gradient. Returns {task: its losses}."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    loss, shown = wrapped(micro, part, rules)
    (world * loss).backward()                              # DDP and FSDP divide by the number of ranks
    return shown


class Run:
    """A model with its wrapper, optimisers, average and counters. config: of train_full.py; lengths: {task: tokens}.

    stage "dense" or "unimod"; step: how many are done, which is the data position too; since: where the stage began.
    """

    def __init__(self, model, config, device: torch.device, lengths: dict, stage: str, step: int = 0, since: int = 0):
        self.config, self.device, self.lengths, self.tasks, self.step = config, device, lengths, tuple(lengths), step
        self.skipped = torch.zeros(2, device=device)                         # steps: in a row up to now, in all
        self.enter(stage, model, since)

    def enter(self, stage: str, model, since: int) -> None:
        """Begin a stage with this model, its own optimisers and average. Those of the stage before are freed first."""
        self.model = self.objective = self.wrapped = self.passes = self.optimizers = self.average = None
        gc.collect()                                       # FSDP's modules hold each other in cycles
        self.stage, self.model, self.since = stage, model, since
        model.precision = self.config.precision
        freeze_unused(model, self.lengths)
        prepare(model, self.config)
        self.objective = Objective(model)
        self.wrapped = wrap(self.objective, self.config.parallel, self.device)
        passes = partial(forward_backward, self.wrapped)
        self.passes = Recorded(passes, model, self.device) if self.config.graphs else passes
        self.optimizers = build_optimizers(model, self.config)
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()} if self.config.ema else {}

    def rate(self) -> float:
        """Factor of the peak rate. A dense stage that a switch will end stays at the peak: what UniMoD takes out has to
        be learnt anew."""
        last, since = self.stage == "unimod" or self.config.dense >= 1, self.since
        return learning_rate(self.step - since, self.config.steps - since, self.config.warmup, last, self.config.decay)

    def advance(self, batches: list, parts: list) -> tuple[Tensor, Tensor]:
        """One step -> losses (tasks, 2), of the task and of its predictors, and the gradient's norm: on the device."""
        self.objective.train()
        losses = torch.zeros(len(self.tasks), 2, device=self.device)
        for number, (micro, part) in enumerate(zip(batches, parts, strict=True), start=1):
            with synchronised(self.wrapped, now=number == len(batches)):
                rules = training_rules(self.step, micro) if self.model.plan.routes else {}
                shown = self.passes(to_device(micro, self.device), part, rules)
            losses += torch.stack([shown[task] for task in self.tasks])
        norm = clip_gradients(self.model, self.config.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.update(1.0 - (total(losses).isfinite().all() & norm.isfinite()).float())
        return losses, norm

    def update(self, bad: Tensor) -> None:
        """Optimisers and average; bad () float: 1 leaves the weights, the optimisers' state and the average as they are."""
        factor = self.rate()
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = factor * peak
            optimizer.found_inf = bad
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.skipped = torch.stack(((self.skipped[0] + 1) * bad, self.skipped[1] + bad))
        if self.average:                                   # at first a mean over few steps, so that it starts near
            n = self.step - self.since
            decay = min(self.config.ema, (1 + n) / (10 + n))
            pairs = [(local(self.average[name]), local(p.detach())) for name, p in self.model.named_parameters()]
            torch._foreach_lerp_(*map(list, zip(*pairs)), [(1 - decay) * (1 - bad)] * len(pairs))
        self.step += 1

    @torch.no_grad()
    def evaluate(self, batches: list, parts: list) -> dict:
        """{task: mean loss over all micro-batches and ranks} of the (averaged) model; all ranks call it."""
        self.objective.eval()
        sums = {task: torch.zeros(2, device=self.device) for micro in batches for task in micro}
        with self.averaged():
            for micro, part in zip(batches, parts, strict=True):
                _, losses = self.objective(to_device(micro, self.device), part)
                for task, pair in losses.items():
                    sums[task] += pair
            reshard(self.objective)
        return {task: total(pair)[0].item() for task, pair in sums.items()}

    @contextmanager
    def averaged(self):
        """Inside, the model has the averaged weights (if there is an average); afterwards its own, to the bit."""
        def swap():
            for name, parameter in self.model.named_parameters():
                if name in self.average:
                    a, b = local(parameter.detach()), local(self.average[name])
                    kept = a.clone()
                    a.copy_(b), b.copy_(kept)
        swap()
        try:
            yield
        finally:
            swap()

    def tensors(self) -> dict:
        """{name: tensor}, all of a checkpoint; loading writes into them."""
        return named_tensors(self.model, self.optimizers, average=self.average, count={"skipped": self.skipped})

    def bare(self, average: bool, here: bool = True) -> UnifiedTransformer | None:
        """A copy of the (averaged) model without wrappers, on the CPU. All ranks call it, those with `here` get it."""
        with self.averaged() if average else nullcontext():
            weights = whole(self.model.state_dict(), here)
        if not here:
            return None
        with torch.device("meta"):                         # takes no memory and no random number
            model = UnifiedTransformer(self.model.config, self.model.plan)
        model.load_state_dict(weights, assign=True)
        model.precision = self.model.precision
        return model


def prepare(model, config) -> None:
    """What the settings change about how a model computes, not what it computes."""
    if config.activation_checkpointing:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                    preserve_rng_state=model.config.attention_dropout > 0)
    if config.compile:
        # a graph for each task, block kind and length, with and without gradients; FSDP's blocks share one limit
        limits, graphs = torch._dynamo.config, 64 + 8 * len(model.blocks)
        limits.recompile_limit = graphs
        limits.accumulated_recompile_limit = max(graphs, limits.accumulated_recompile_limit)
        for module in model.blocks if config.parallel == "fsdp" else [model]:
            module.compile(dynamic=False)


def build_optimizers(model, config) -> list:
    """Fused AdamW, norms and biases without decay; or Muon on the matrices of the blocks, that AdamW on the rest."""
    hidden, rest = hidden_and_rest(model) if config.optimizer == "muon" else ([], model.parameters())
    moved = [p for p in rest if p.requires_grad]
    groups = [{"params": [p for p in moved if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in moved if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    return [Muon(hidden, config.muon_lr), adamw] if hidden else [adamw]
