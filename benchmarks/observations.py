"""The experiments that UniMoD rests on (arXiv 2502.06474), for any model and batch here.

    attention_received      how much text and image tokens are looked at, by layer     (figure 2)
    layer_importance        what a model loses without one of its layers               (table 1)
    layer_switch.arank      how redundant a layer is, by layer and task                (figure 3)
    competition             which task's tokens win when they compete for one router   (figure 4)

The paper gives no formulas for them: each function states its rule. `benchmarks/analysis.py` runs
all of them.

Legend: B batch, T tokens, D width, H heads, d head width, L layers.
"""

from copy import copy

import torch

from unimod_mini.layer_switch import queries_and_keys
from unimod_mini.objectives import cross_entropy
from unimod_mini.plan import Plan, capacity
from unimod_mini.routers import TaskRouter
from unimod_mini.tokenizer import Batch
from unimod_mini.inference import evaluating, inference
from unimod_mini.transformer import UnifiedTransformer, attention_mask

KINDS = ("text", "image")


@inference
def attention_received(model: UnifiedTransformer, batch: Batch, task: str) -> dict:
    """{"text": (L,), "image": (L,)} float: the attention that a token of this kind receives.

        a_ij = softmax_j(q_i k_j / sqrt(d)), mean over heads
        mean of n_i a_ij over all i and all j of the kind that i sees; 1 = an even spread

    Token i sees n_i tokens: the factor lets early tokens, seen by many, and late ones count alike.
    All tokens run through every layer. Special ids are text. NaN where the batch has no token of
    a kind. Holds a few (B, H, T, T) at a time: pass few rows of long sequences.
    """
    positions = model.context(batch.ids, None, batch.spans, batch.valid).positions
    see = attention_mask(positions, batch.spans, batch.valid)  # (B, 1, T, T)
    image = batch.ids >= model.config.image_start
    pairs = [see[:, 0] & batch.is_valid[:, :, None] & kind[:, None, :] for kind in (~image, image)]
    rows = []
    for q, k in queries_and_keys(model, batch, task):
        scores = q @ k.mT / q.shape[-1] ** 0.5                                  # (B, H, T, T)
        attention = scores.masked_fill(~see, -torch.inf).softmax(-1).mean(1)    # (B, T, T)
        received = attention * see[:, 0].sum(-1, keepdim=True)
        rows.append([received[pair].mean() for pair in pairs])
    return {kind: torch.stack(values) for kind, values in zip(KINDS, zip(*rows))}


@inference
def layer_importance(model: UnifiedTransformer, measure) -> tuple:
    """(measure(model), [measure(model without layer l) for every l]), without dropout.

    A layer is left out as a plan does it: keep 0 for every task. No weight is copied or changed.
    """
    whole, without = measure(model), []
    for layer in range(model.config.n_layer):
        keep = {}
        for task, row in model.plan.keep.items():
            keep[task] = (*row[:layer], 0.0, *row[layer + 1:])
        twin = copy(model)  # the same modules under another plan
        twin.plan = Plan(keep, model.plan.shared_router)
        without.append(measure(twin))
    return whole, without


def competition(model: UnifiedTransformer, batches, steps: int, weights: dict, share: float = 0.5,
                lr: float = 0.01, counted: int = 10, progress=iter) -> dict:
    """The tasks' tokens compete for one router in every odd layer of a dense model.

    The routers learn for `steps` steps from the sum of weights[task] x cross-entropy, with the
    model frozen; then the winners of `counted` more batches are counted. batches() -> {task: Batch}
    of fresh samples. Returns {task: [share of its tokens that won; None in an even layer]}.
    """
    config, device = model.config, next(model.parameters()).device
    assert model.plan == Plan.dense(config.n_layer, model.plan.tasks), "a dense model is needed"
    routers = {layer: TaskRouter(config.d_model, 0, ()).to(device)
               for layer in range(1, config.n_layer, 2)}
    parameters = [p for router in routers.values() for p in router.parameters()]
    optimizer = torch.optim.Adam(parameters, lr)
    mean_won = {task: [None] * config.n_layer for task in model.plan.tasks}
    for step in progress(range(steps + counted)):
        with evaluating(model):
            drawn = {task: batch.to(device) for task, batch in batches().items()}
            losses, won = compete(model, routers, drawn, share)
        if step < steps:
            total = sum(weights[task] * loss for task, loss in losses.items())
            for p, gradient in zip(parameters, torch.autograd.grad(total, parameters)):
                p.grad = gradient
            optimizer.step()
        else:
            for (task, layer), value in won.items():
                mean_won[task][layer] = (mean_won[task][layer] or 0.0) + value / counted
    return {task: mean_won[task] for task in losses}


def compete(model: UnifiedTransformer, routers: dict, batches: dict, share: float) -> tuple:
    """One forward of all tasks side by side: {task: loss}, {(task, layer): share that won}.

        s_i = r(x_i) + log(u / (1 - u)),  u ~ U(0, 1)     the noise of a binary Gumbel-softmax
        m_i = 1 for the `share` of all tasks' valid tokens with the largest s, else 0; its gradient
              is that of sigmoid(s_i - the smallest winner)
        x_i <- x_i + m_i u_i, where every token stays a key
    """
    contexts = {task: model.context(batch.ids, None, batch.spans, batch.valid)
                for task, batch in batches.items()}
    x = {task: model.embed_tokens(batch.ids, batch.valid) for task, batch in batches.items()}
    won = {}
    for layer, block in enumerate(model.blocks):
        update = {task: block(x[task], own.rope, own.mask) for task, own in contexts.items()}
        if layer in routers:
            scores = {}
            for task in x:
                r = routers[layer].router_scores(x[task])  # (B, T)
                scores[task] = r + torch.rand_like(r).logit(1e-6)
            pool = [scores[task].detach()[batch.is_valid] for task, batch in batches.items()]
            pool = torch.cat(pool)
            least = pool.topk(max(1, capacity(share, len(pool)))).values[-1]
            for task, s in scores.items():
                hard, soft = (s >= least).to(s.dtype), torch.sigmoid(s - least)
                m = hard + soft - soft.detach()
                update[task] = m[..., None].to(update[task].dtype) * update[task]
                won[task, layer] = hard[batches[task].is_valid].mean().item()
        x = {task: x[task] + update[task] for task in x}
    losses = {}
    for task, batch in batches.items():
        losses[task] = cross_entropy(model.head(model.norm(x[task])), batch.labels)
    return losses, won
