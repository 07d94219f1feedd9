"""From a trained dense model to a Plan: which layers are redundant, for which task, and how much.

ARank (UniMoD, arXiv 2502.06474): the rank of a layer's attention scores, A_h = q_h k_h^T with
queries and keys as attention takes them (biases, QK norm, rotary), before scale and mask; the mean
over heads and samples. Divided by the sequence's length it is rho in (0, 1]. High: little
redundancy. Low: prune here. As in the paper, ARank over length is the keep ratio of a layer. The
paper does not say how a budget is met; the rule here has three stages, each taken as far as needed:

    1. switch layers    from keep 1 to keep rho, in the order of rho / (the mean rho of the task),
                        the most redundant first; the last one stops where the budget is met exactly
    2. scale down       should even rho everywhere cost too much: every switched layer, together
    3. the rest         a first layer that stage 1 left dense

Comparing a layer with its own task's mean keeps one task from paying for all. Departure: a task's
first layer that is less redundant than all its others stays dense until stage 3. Plans that routed
the first layer lost most of their accuracy (docs/results.md).

What counts as rank: with "energy" (the default) the number of singular values that hold 90 % of
sum s^2; with "rank" the number above a tolerance times the largest. A numerical rank is mostly a
choice of tolerance: at float32's own it is the head width for almost any trained layer.

Legend: B batch, T tokens, H heads, d head width, L layers.
"""

import torch
from torch import Tensor

from .config import ModelConfig
from .flops import bisect, flops_ratio
from .inference import inference
from .plan import BASELINES, Plan
from .tokenizer import Batch
from .transformer import UnifiedTransformer

# --- ARank ---

def rank_of(singular: Tensor, measure: str, tolerance: float) -> Tensor:
    """singular values (.., n) descending -> (..) float. ValueError for an unknown measure."""
    if not 0 <= tolerance < 1:
        raise ValueError(f"layer_switch: tolerance must lie in [0, 1), got {tolerance}")
    if measure == "rank":          # how many exceed tolerance x the largest
        return (singular > tolerance * singular[..., :1]).sum(-1).float()
    if measure == "energy":        # how many hold (1 - tolerance) of the energy sum s^2
        energy = singular.square().cumsum(-1)
        return (energy < (1 - tolerance) * energy[..., -1:]).sum(-1).float() + 1
    raise ValueError(f'layer_switch: measure must be "rank" or "energy", got {measure!r}')


def queries_and_keys(model: UnifiedTransformer, batch: Batch, task: str):
    """Yields q and k (B, H, T, d) float32 of every layer, of all its tokens; 0 for padding."""
    model.check_call(batch.ids, task, spans=batch.spans, valid=batch.valid)
    context = model.context(batch.ids, None, batch.spans, batch.valid)
    x = model.embed_tokens(batch.ids, batch.valid)
    valid = batch.is_valid[:, None, :, None]
    for layer, block in enumerate(model.blocks):
        q, k, _ = block.attention.queries_keys_values(block.norm(x), context.rope)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        yield q.float() * valid, k.float() * valid
        x, _ = model.layer(layer, x, task, context, "topk")


@inference
def arank(model: UnifiedTransformer, batch: Batch, task: str, measure: str = "energy",
          tolerance: float = 0.1) -> Tensor:
    """(L,) float: ARank over the number of valid tokens, in (0, 1]; the mean over the samples.

    ValueError for a sample that is all padding, and for attention scores that are not finite.
    """
    rows, length = [], batch.is_valid.sum(1)               # (B,)
    if (length == 0).any():
        raise ValueError(f"layer_switch: sample {int(length.argmin())} of {task} is all padding: "
                         "leave it out")
    for q, k in queries_and_keys(model, batch, task):
        # q k^T = Q_q (R_q R_k^T) Q_k^T: the singular values of a d x d matrix, no T x T is made
        r_q = torch.linalg.qr(q, mode="r").R               # (B, H, d, d)
        r_k = torch.linalg.qr(k, mode="r").R
        scores = r_q @ r_k.mT
        if not scores.isfinite().all():
            raise ValueError(f"layer_switch: the scores of layer {len(rows)} for {task} are not "
                             "finite: look at the model's weights")
        ranks = rank_of(torch.linalg.svdvals(scores), measure, tolerance)      # (B, H)
        rows.append((ranks.mean(1) / length).mean())
    return torch.stack(rows)


def arank_table(model: UnifiedTransformer, batches_by_task: dict, measure: str = "energy",
                tolerance: float = 0.1) -> dict:
    """{task: Batch of samples} -> {task: list of L values in (0, 1]}."""
    table = {}
    for task, batch in batches_by_task.items():
        table[task] = arank(model, batch, task, measure, tolerance).tolist()
    return table


def show_table(table: dict) -> str:
    """What arank_table found, a line a layer."""
    lines = ["layer  " + "".join(f"{task:>8}" for task in table)]
    for layer, row in enumerate(zip(*table.values())):
        lines.append(f"{layer:>5}  " + "".join(f"{rho:>8.3f}" for rho in row))
    return "\n".join(lines)


# --- From ARank to a plan: the three stages, each at x from 0, its beginning, to 1, its end ---

SOFTNESS = 0.02   # how far the threshold of stage 1 rises while one layer goes from keep 1 to rho


def switch_layers(table: dict, x: float) -> Plan:
    """Stage 1: layers go from keep 1 to keep rho, the most redundant first."""
    return lowered(table, x)


def scale_down(table: dict, x: float) -> Plan:
    """Stage 2: the keeps of all switched layers fall together to 0."""
    return lowered(table, 1.0, switched=1.0 - x)


def scale_rest(table: dict, x: float) -> Plan:
    """Stage 3: what stage 1 left dense falls to 0."""
    return lowered(table, 1.0, switched=0.0, rest=1.0 - x)


STAGES = (switch_layers, scale_down, scale_rest)


def lowered(table: dict, rise: float, switched: float = 1.0, rest: float = 1.0) -> Plan:
    """keep = rest (1 - s (1 - switched rho)), in thousandths, rounded down.

    s: how far the layer is switched, 0 to 1. It rises as a threshold passes the layer's place,
    rho / (the task's mean rho); rise: where the threshold is, 0: below all places, 1: above them.
    """
    places = {task: [rho * len(row) / sum(row) for rho in row] for task, row in table.items()}
    low = min(map(min, places.values()))
    others = [place for row in places.values() for place in row[1:]]
    high = max(others, default=low) + SOFTNESS
    for row in places.values():                            # a first layer that stands out
        if row[0] > max(row[1:], default=row[0]) + SOFTNESS:
            row[0] = max(row[0], high)                     # stays above the threshold
    threshold = low + rise * (high - low)
    keeps = {}
    for task, row in table.items():
        keeps[task] = []
        for rho, place in zip(row, places[task]):
            s = min(1.0, max(0.0, (threshold - place) / SOFTNESS))
            keep = rest * (1 - s * (1 - switched * rho))
            keeps[task].append(int(1000 * keep) / 1000)
    return Plan(keeps)


def least_cost(config: ModelConfig, lengths: dict, counts: dict | None = None) -> float:
    """Training FLOPs over dense when every layer is skipped: the head alone, no plan costs less."""
    nothing = Plan(dict.fromkeys(lengths, (0.0,) * config.n_layer))
    return flops_ratio(config, nothing, lengths, "train", counts)


def plan_from_arank(table: dict, config: ModelConfig, lengths: dict, budget: float,
                    counts: dict | None = None) -> Plan:
    """{task: L values rho} -> the largest Plan of the rule above within the budget.

    budget: training FLOPs of the plan over those of dense, with counts[task] samples (None: one) of
    lengths[task] tokens each. ValueError for a budget or values outside (0, 1], and for a budget
    below what the head alone costs.
    """
    if set(table) != set(lengths):
        raise ValueError(f"plan_from_arank: ARank of {', '.join(table)}, lengths of "
                         f"{', '.join(lengths)}: give both for every task")
    values = [rho for row in table.values() for rho in row]
    if not 0.0 < budget <= 1.0 or not all(0.0 < rho <= 1.0 for rho in values):
        raise ValueError("plan_from_arank: budget and ARank over length must lie in (0, 1], got "
                         f"{budget}, {values}")
    if least_cost(config, lengths, counts) > budget:
        raise ValueError(f"plan_from_arank: no plan reaches {budget} of the dense FLOPs, the head "
                         "alone costs more")
    for stage in STAGES:
        def cost(y: float) -> float:                       # falls with x, rises with y = 1 - x
            return flops_ratio(config, stage(table, 1.0 - y), lengths, "train", counts)

        if cost(1.0) <= budget:                            # met without this stage
            return stage(table, 0.0)
        if cost(0.0) <= budget:
            return stage(table, 1.0 - bisect(cost, budget, 0.0, 1.0))
    raise AssertionError("the last stage ends at least_cost")


def layer_switch(model: UnifiedTransformer, batches_by_task: dict, budget: float = 0.85,
                 measure: str = "energy", tolerance: float = 0.1,
                 counts: dict | None = None) -> Plan:
    """A dense model and samples of each task, {task: Batch} -> a Plan within the budget.

    The paper takes 50 MMU samples and 20 T2I prompts. counts: {task: sequences in a training
    step}, whose FLOPs the budget is of; None: one of each task.
    """
    table = arank_table(model, batches_by_task, measure, tolerance)
    lengths = {task: batch.ids.shape[1] for task, batch in batches_by_task.items()}
    return plan_from_arank(table, model.config, lengths, budget, counts)


# --- The methods of the comparison ---

BY_ARANK = ("unimod", "one_router", "one_plan")            # ARank makes their plans
METHODS = (*BY_ARANK, *BASELINES)


def plan_for_budget(method: str, table: dict, config: ModelConfig, lengths: dict, budget: float,
                    counts: dict | None = None) -> Plan:
    """The plan of a method. Those by ARank and mod meet the budget, the others save what they save.

    one_router: UniMoD's plan with one router for all tasks (the paper's ablation). one_plan: the
    tasks share keep ratios as well, by ARank's mean over them, and nothing knows the task. mod: one
    router for all tasks, one keep for all on the odd layers (0 where even that is over the budget).
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, the methods are {', '.join(METHODS)}")
    tasks = tuple(table)
    if method == "mod":
        return mod_for_budget(config, tasks, lengths, budget, counts)
    if method in BASELINES:
        return BASELINES[method](config.n_layer, tasks)
    if method == "one_plan":
        mean = [sum(column) / len(column) for column in zip(*table.values())]
        table = dict.fromkeys(table, mean)
    plan = plan_from_arank(table, config, lengths, budget, counts)
    return Plan(plan.keep, shared_router=method != "unimod")


def mod_for_budget(config: ModelConfig, tasks: tuple, lengths: dict, budget: float,
                   counts: dict | None) -> Plan:
    """Basic MoD with the largest keep, in thousandths, that meets the budget.

    All are tried: near keep 1 a router costs more than it saves, so the cost is not monotone.
    """
    for thousandths in range(1000, 0, -1):
        plan = Plan.mod(config.n_layer, tasks, thousandths / 1000)
        if flops_ratio(config, plan, lengths, "train", counts) <= budget:
            return plan
    return Plan.mod(config.n_layer, tasks, 0.0)
