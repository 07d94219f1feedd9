"""Floating-point operations of a forward or a training step, from (config, plan, task, length) alone.

Convention: a multiply-add counts 2; only matrix products count; attention is counted over the full n x n square
(not the live half of a causal mask); a routed layer costs its K = floor(keep T + 1/2) slots. The backward pass costs
twice the forward, except that the predictor's first layer needs no gradient of its (detached) input.

Legend: T tokens, K slots, D width, F hidden width of the MLP, V vocabulary.
"""

from typing import NamedTuple

from .routers import Plan, capacity
from .transformer import ModelConfig

PARTS = ("projections", "scores", "mlp", "router", "predictor", "head")


class Flops(NamedTuple):
    total: int
    by_layer: list     # one int a layer, head apart
    by_part: dict      # PARTS -> int


def block_flops(config: ModelConfig, n: int) -> dict:
    """Forward of one block over n tokens."""
    D, d = config.d_model, config.head_width
    qkv, matrices = (config.n_head + 2 * config.n_kv_head) * d, 3 if config.backbone == "emu3" else 2
    return {"projections": 2 * n * D * (qkv + D), "scores": 4 * n * n * D, "mlp": 2 * n * D * config.d_ff * matrices}


def layer_flops(config: ModelConfig, keep: float, length: int, mode: str) -> dict:
    """One layer: block over K tokens, router and predictor over all T when 0 < keep < 1."""
    passes = 3 if mode == "train" else 1
    parts = dict.fromkeys(PARTS, 0)
    if keep == 0.0:
        return parts
    slots = length if keep == 1.0 else capacity(keep, length)
    parts.update({part: passes * count for part, count in block_flops(config, slots).items()})
    if keep < 1.0:
        D, hidden = config.d_model, config.predictor_hidden
        parts["router"] = passes * 2 * length * D
        first = 2 if mode == "train" else 1
        parts["predictor"] = first * 2 * length * D * hidden + passes * 2 * length * hidden
    return parts


def count_flops(config: ModelConfig, plan: Plan | None, task: str, length: int, mode: str = "forward") -> Flops:
    """FLOPs of one sequence of `length` tokens. mode "forward" or "train" (forward and backward, optimiser apart).

    ValueError for an unknown mode, a task that the plan lacks, a plan of another depth, a length below 1.
    """
    if mode not in ("forward", "train") or length < 1:
        raise ValueError(f'count_flops: mode must be "forward" or "train" and length >= 1, got {mode!r}, {length}')
    plan = Plan.dense(config.n_layer, (task,)) if plan is None else plan
    if task not in plan.tasks or plan.n_layer != config.n_layer:
        raise ValueError(f"count_flops: the plan has tasks {plan.tasks} and {plan.n_layer} layers, asked for {task!r} "
                         f"and {config.n_layer}")
    layers = [layer_flops(config, keep, length, mode) for keep in plan.keep[task]]
    by_part = {part: sum(layer[part] for layer in layers) for part in PARTS}
    by_part["head"] = (3 if mode == "train" else 1) * 2 * length * config.d_model * config.vocab_size
    return Flops(sum(by_part.values()), [sum(layer.values()) for layer in layers], by_part)


def flops_ratio(config: ModelConfig, plan: Plan, lengths: dict, mode: str = "train") -> float:
    """FLOPs of the plan over FLOPs of dense, one sample of each task in `lengths` (task -> tokens)."""
    routed = sum(count_flops(config, plan, task, n, mode).total for task, n in lengths.items())
    return routed / sum(count_flops(config, None, task, n, mode).total for task, n in lengths.items())
