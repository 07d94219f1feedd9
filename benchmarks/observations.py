"""The experiments that UniMoD rests on (arXiv 2502.06474), for any model and batch here.

    attention_received              how much text and image tokens are looked at, by layer     (its figure 2)
    layer_importance                what a model loses without one of its layers               (its table 1)
    layer_switch.arank              how redundant a layer is, by layer and task                (its figure 3)
    competition                     which task's tokens win when they compete for one router   (its figure 4)

The paper gives no formulas for them: each rule stands in its function. `benchmarks/analysis.py`
runs all of them.

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
    """{"text": (L,), "image": (L,)} float: attention that a token of this kind receives, 1 = what
    an even spread gives.

        a_ij = softmax_j(q_i k_j / sqrt(d)), mean over heads
        mean of n_i a_ij over all i and all j of the kind that i sees

    n_i tokens are seen by i: so early tokens, seen by many, and late ones count alike. Of all
    tokens, as if every layer were dense. Special ids are text. NaN where a batch has no token of a
    kind. A few (B, H, T, T) at a time: with long sequences, pass a few rows.
    """
    positions = model.context(batch.ids, None, batch.spans, batch.valid).positions
    see = attention_mask(positions, batch.spans, batch.valid)                # (B, 1, T, T)
    image = batch.ids >= model.config.image_start
    pairs = [see[:, 0] & batch.is_valid[:, :, None] & kind[:, None, :] for kind in (~image, image)]
    rows = []
    for q, k in queries_and_keys(model, batch, task):
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~see, -torch.inf)  # (B, H, T, T)
        received = scores.softmax(-1).mean(1) * see[:, 0].sum(-1, keepdim=True)  # (B, T, T)
        rows.append([received[pair].mean() for pair in pairs])
    return {kind: torch.stack(values) for kind, values in zip(KINDS, zip(*rows))}


@inference
def layer_importance(model: UnifiedTransformer, measure) -> tuple:
    """(what measure(model) returns, [what it returns without layer l, for every l]), without
    gradients or dropout.

    A layer is left out as a plan does it: keep 0 for every task. No weight is copied or changed.
    """
    def without(layer: int) -> UnifiedTransformer:
        twin = copy(model)                                 # the same modules under another plan
        twin.plan = Plan({task: (*row[:layer], 0.0, *row[layer + 1:]) for task, row in model.plan.keep.items()},
                         model.plan.shared_router)
        return twin
    return measure(model), [measure(without(layer)) for layer in range(model.config.n_layer)]


def competition(model: UnifiedTransformer, batches, steps: int, weights: dict, share: float = 0.5, lr: float = 0.01,
                counted: int = 10, progress=iter) -> dict:
    """Both tasks' tokens compete for one router in every odd layer of a dense model: {task: [share
    that won or None]}.

    The routers learn for `steps` steps from the sum of weights[task] x cross-entropy, the model is
    frozen; then the shares of `counted` more batches are counted. batches() -> {task: Batch} of
    fresh samples. None: an even layer. ValueError for a model that is not dense, or of one layer.
    """
    if any(keep < 1 for row in model.plan.keep.values() for keep in row) or model.config.n_layer < 2:
        raise ValueError(f"competition: a dense model of two layers or more is needed, this one has\n{model.plan}")
    if steps < 0 or counted < 1 or not 0 < share <= 1:
        raise ValueError("competition: steps must be at least 0, counted at least 1 and share in (0, 1], got "
                         f"{steps}, {counted}, {share}")
    device = next(model.parameters()).device
    routers = {layer: TaskRouter(model.config.d_model, 0, ()).to(device) for layer in range(1, model.config.n_layer, 2)}
    parameters = [p for router in routers.values() for p in router.parameters()]
    optimizer, won = torch.optim.Adam(parameters, lr), []
    for step in progress(range(steps + counted)):
        with evaluating(model):
            drawn = {task: batch.to(device) for task, batch in batches().items()}
            losses, shares = compete(model, routers, drawn, share)
        if step < steps:
            total = sum(weights[task] * loss for task, loss in losses.items())
            for p, gradient in zip(parameters, torch.autograd.grad(total, parameters)):
                p.grad = gradient
            optimizer.step()
        else:
            won.append(shares)
    mean = lambda task, layer: sum(shares[task, layer] for shares in won) / counted if layer in routers else None
    return {task: [mean(task, layer) for layer in range(model.config.n_layer)] for task in losses}


def compete(model: UnifiedTransformer, routers: dict, batches: dict, share: float) -> tuple[dict, dict]:
    """One forward of all tasks side by side: {task: cross-entropy}, {(task, layer): share of its
    tokens that won}.

        s_i = r(x_i) + log(u / (1 - u)),  u ~ U(0, 1)            the noise of a binary Gumbel-softmax
        m_i = 1 for the `share` of all tasks' valid tokens with the largest s, else 0; its gradient: that of
              sigmoid(s_i - the smallest winner)
        x_i <- x_i + m_i u_i, where every token stays a key
    """
    for task, batch in batches.items():
        model.check_call(batch.ids, task, spans=batch.spans, valid=batch.valid)
    contexts = {task: model.context(batch.ids, None, batch.spans, batch.valid) for task, batch in batches.items()}
    x = {task: model.embed_tokens(batch.ids, batch.valid) for task, batch in batches.items()}
    shares = {}
    for layer, block in enumerate(model.blocks):
        update = {task: block(x[task], own.rope, own.mask) for task, own in contexts.items()}
        if layer in routers:
            scores = {task: routers[layer].router_scores(x[task]) for task in x}  # (B, T)
            scores = {task: r + torch.rand_like(r).logit(1e-6) for task, r in scores.items()}
            pool = torch.cat([scores[task].detach()[batch.is_valid] for task, batch in batches.items()])
            least = pool.topk(max(1, capacity(share, len(pool)))).values[-1]
            for task, s in scores.items():
                m, soft = (s >= least).to(s.dtype), torch.sigmoid(s - least)
                update[task] = (m + soft - soft.detach())[..., None].to(update[task].dtype) * update[task]
                shares[task, layer] = m[batches[task].is_valid].mean().item()
        x = {task: x[task] + update[task] for task in x}
    logits = {task: model.head(model.norm(x[task])) for task in x}
    return {task: cross_entropy(logits[task], batch.labels) for task, batch in batches.items()}, shares
