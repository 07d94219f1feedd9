"""From a trained dense model to a Plan: which layers are redundant, for which task, and how much.

ARank (UniMoD, arXiv 2502.06474): the rank of a layer's attention scores, A_h = q_h k_h^T with queries and keys as
attention takes them (biases, QK norm, rotary), before scale and mask; mean over heads and samples. Divided by the
sequence length it is rho in (0, 1]. High: little redundancy. Low: prune here. The rule:

    layers switch from keep 1 to keep rho, in the order of rho / (the task's mean rho), the most redundant first,
    until the counted FLOPs meet the budget; the last one stops half-way, where the budget is met exactly.

So ARank decides which layers become which kind and, as in the paper, ARank over length is the keep ratio. Comparing a
layer with its own task's mean keeps one task from paying for all. Should even rho everywhere cost too much, every keep
is scaled down together. One number u moves through all of it, and bisection finds the largest plan within the budget.
Departure: a task's first layer that is less redundant than all its others stays dense; they are scaled down instead.
Plans that routed the first layer lost most of their accuracy (docs/results.md).

What counts as rank: with "energy" (the default) the number of singular values that hold 90 % of sum s^2; with "rank"
the number above a tolerance times the largest. A numerical rank is mostly a choice of tolerance: at float32's own it is
the head width for almost any trained layer. q k^T = Q_q (R_q R_k^T) Q_k^T, so its singular values are those of a d x d
matrix, and no T x T one is made.

Legend: B batch, T tokens, H heads, d head width, L layers.
"""

import torch
from torch import Tensor

from .config import ModelConfig
from .flops import bisect, flops_ratio
from .plan import BASELINES, Plan
from .tokenizer import Batch
from .transformer import UnifiedTransformer, inference


def rank_of(singular: Tensor, measure: str, tolerance: float) -> Tensor:
    """singular values (.., n) descending -> (..) float. ValueError for another measure, a tolerance outside [0, 1)."""
    if not 0 <= tolerance < 1:
        raise ValueError(f"layer_switch: tolerance must lie in [0, 1), got {tolerance}")
    if measure == "rank":          # how many exceed tolerance x the largest
        return (singular > tolerance * singular[..., :1]).sum(-1).float()
    if measure == "energy":        # how many hold (1 - tolerance) of the energy sum s^2
        energy = singular.square().cumsum(-1)
        return (energy < (1 - tolerance) * energy[..., -1:]).sum(-1).float() + 1
    raise ValueError(f'layer_switch: measure must be "rank" or "energy", got {measure!r}')


def queries_and_keys(model: UnifiedTransformer, batch: Batch, task: str):
    """Yields q and k of every layer in turn, (B, H, T, d) float32 each, of all tokens, routed or not; 0 for padding."""
    model.check(batch.ids, task, None, batch.spans, batch.valid, "topk", None)
    context = model.context(batch.ids, None, batch.spans, batch.valid)
    valid, x = batch.is_valid, model.embed_tokens(batch.ids, batch.valid)
    for layer, block in enumerate(model.blocks):
        q, k, _ = block.attention.queries_keys_values(block.norm(x), context.rope)
        q, k = (t.float() * valid[:, None, :, None] for t in (q, k))
        yield q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        x, _ = model.layer(layer, x, task, context, "topk")


@inference
def arank(model: UnifiedTransformer, batch: Batch, task: str, measure: str = "energy",
          tolerance: float = 0.1) -> Tensor:
    """(L,) float: ARank of every layer divided by the sequence's valid tokens, in (0, 1]; the mean over the samples.

    ValueError for a sample without a valid token, and for attention scores that are not finite.
    """
    rows, count = [], batch.is_valid.sum(1)
    if (count == 0).any():
        raise ValueError(f"layer_switch: sample {int(count.argmin())} of {task} is all padding: leave it out")
    for q, k in queries_and_keys(model, batch, task):
        r_q, r_k = (torch.linalg.qr(t, mode="r").R for t in (q, k))          # (B, H, d, d): q = Q_q R_q
        scores = r_q @ r_k.mT                                                # same singular values as q k^T
        if not scores.isfinite().all():
            raise ValueError(f"layer_switch: the scores of layer {len(rows)} for {task} are not finite: look at the "
                             "model's weights")
        ranks = rank_of(torch.linalg.svdvals(scores), measure, tolerance)    # (B, H)
        rows.append((ranks.mean(1) / count).mean())
    return torch.stack(rows)


def arank_table(model, batches_by_task: dict, measure: str = "energy", tolerance: float = 0.1) -> dict:
    """{task: Batch of samples} -> {task: list of L values in (0, 1]}."""
    return {task: arank(model, batch, task, measure, tolerance).tolist() for task, batch in batches_by_task.items()}


def show_table(table: dict) -> str:
    """What arank_table found, a line a layer."""
    lines = ["layer  " + "".join(f"{task:>8}" for task in table)]
    for layer, row in enumerate(zip(*table.values())):
        lines.append(f"{layer:>5}  " + "".join(f"{rank:>8.3f}" for rank in row))
    return "\n".join(lines)


SOFTNESS = 0.02   # a layer goes from keep 1 to keep rho while the threshold rises by this much of its task's mean rho


def switched(table: dict, u: float) -> Plan:
    """The plan at u: 0 = dense, 1 = every layer at keep rho, a first one that stands out apart, 2 = that one alone,
    3 = nothing left. Keeps in thousandths, rounded down."""
    relative = {task: [rho * len(row) / sum(row) for rho in row] for task, row in table.items()}
    low = min(map(min, relative.values()))
    high = max((place for row in relative.values() for place in row[1:]), default=low) + SOFTNESS
    for row in relative.values():                          # a first layer stands out among those of its task
        if row[0] > max(row[1:], default=row[0]) + SOFTNESS:
            row[0] = max(row[0], high)
    threshold, scale, last = low + min(u, 1.0) * (high - low), min(1.0, max(0.0, 2.0 - u)), min(1.0, 3.0 - u)

    def keep(rho: float, place: float) -> float:
        depth = min(1.0, max(0.0, (threshold - place) / SOFTNESS))          # 0 = not switched, 1 = switched
        return int(1000 * last * (1 - depth * (1 - scale * rho))) / 1000

    return Plan({task: tuple(map(keep, row, relative[task])) for task, row in table.items()})


def least_cost(config: ModelConfig, lengths: dict, counts: dict | None = None) -> float:
    """Training FLOPs over dense when every layer is skipped: what the head alone costs, below which no plan gets."""
    return flops_ratio(config, Plan(dict.fromkeys(lengths, (0.0,) * config.n_layer)), lengths, "train", counts)


def plan_from_arank(table: dict, config: ModelConfig, lengths: dict, budget: float, counts: dict | None = None) -> Plan:
    """{task: L values rho} -> the largest Plan of the rule above whose training FLOPs meet the budget.

    budget: FLOPs of the plan over FLOPs of dense, with counts[task] samples (None: one) of lengths[task] tokens each.
    ValueError for a budget that is not in (0, 1], values outside (0, 1], or a budget below what the head alone costs.
    """
    if set(table) != set(lengths):
        raise ValueError(f"plan_from_arank: ARank of {', '.join(table)}, lengths of {', '.join(lengths)}: give both for "
                         "every task")
    values = [value for row in table.values() for value in row]
    if not 0.0 < budget <= 1.0 or not values or not all(0.0 < float(value) <= 1.0 for value in values):
        raise ValueError(f"plan_from_arank: budget and ARank over length must lie in (0, 1], got {budget}, {values}")
    if least_cost(config, lengths, counts) > budget:
        raise ValueError(f"plan_from_arank: no plan reaches {budget} of the dense FLOPs, the head alone costs more")
    if budget == 1.0:
        return switched(table, 0.0)
    cost = lambda x: flops_ratio(config, switched(table, 3.0 - x), lengths, "train", counts)
    return switched(table, 3.0 - bisect(cost, budget, 0.0, 3.0))


def layer_switch(model: UnifiedTransformer, batches_by_task: dict, budget: float = 0.85, measure: str = "energy",
                 tolerance: float = 0.1, counts: dict | None = None) -> Plan:
    """A dense model and one Batch of samples for each task (the paper: 50 MMU, 20 T2I) -> a Plan within the budget.

    counts: {task: sequences in a training step}, whose FLOPs the budget is of; None: one of each task.
    """
    table = arank_table(model, batches_by_task, measure, tolerance)
    lengths = {task: batch.ids.shape[1] for task, batch in batches_by_task.items()}
    return plan_from_arank(table, model.config, lengths, budget, counts)


BY_ARANK = ("unimod", "one_router", "one_plan")            # ARank makes their plans
METHODS = (*BY_ARANK, *BASELINES)


def plan_for_budget(method: str, table: dict, config: ModelConfig, lengths: dict, budget: float,
                    counts: dict | None = None) -> Plan:
    """The plan of a method of the comparison; those that ARank decides and mod meet the budget, the others save what
    they save.

    one_router: UniMoD's plan with one router for all tasks (the paper's ablation). one_plan: ARank's mean over the
    tasks decides, so that keep ratios are shared as well as routers, and nothing knows the task. mod: one shared
    router, one keep for all tasks on the odd layers (0 where even that is over the budget).
    """
    depth, tasks = config.n_layer, tuple(table)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, the methods are {', '.join(METHODS)}")
    if method in BY_ARANK:
        if method == "one_plan":
            table = dict.fromkeys(table, [sum(column) / len(column) for column in zip(*table.values())])
        return Plan(plan_from_arank(table, config, lengths, budget, counts).keep, shared_router=method != "unimod")
    if method == "mod":                                    # near keep 1 a router costs more than it saves: try all
        cost = lambda k: flops_ratio(config, Plan.mod(depth, tasks, k / 1000), lengths, "train", counts)
        return Plan.mod(depth, tasks, max((k for k in range(1001) if cost(k) <= budget), default=0) / 1000)
    return BASELINES[method](depth, tasks)
