"""Task-aware Mixture-of-Depths: which tokens a layer processes, and for which task.

MoD (Raposo et al., arXiv 2404.02258) gives a layer a router, which picks the k tokens that go
through the block; the others take the residual path. UniMoD (Mao, Yang, Shou, arXiv 2502.06474)
gives every *task* a router and a k of its own, and prunes only the layers that are redundant for
that task. Which layers, and how many tokens, is said by the `Plan` (plan.py).

Departures from the usual, each guarded by a test: the gate is 1 at the start (a freshly switched
model equals its dense parent to the bit), the residual is counted once and never gated, ties are
spread evenly over the sequence, padding takes no capacity, and a predictor decides where looking
at the whole sequence would look into the future.

Legend: B batch, T tokens, K slots of a routed layer, D width, L routed layers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plan import capacity

GOLDEN = 2654435769  # 2^32 / golden ratio: its multiples modulo 2^32 are spread as evenly as can be


class Routing(NamedTuple):
    """What one routed layer decided."""
    indices: Tensor | None # (B, K) long, the used slots first, ascending; None behind a cache
    live: Tensor | None    # (B, K) bool, False: a spare slot, writes nothing; None: all are used
    selected: Tensor       # (B, T) bool, the same decision by token
    scores: Tensor         # (B, T) router scores r
    predictor: Tensor      # (B, T) logits of "this token is among the top k", from x_i alone
    topk: Tensor | None    # (B, T) bool, the router's top k, which predictors learn; None: "causal"


# --- Selection: scores -> ranks -> slots. No loop over rows, no device sync, static shapes. ---

def tie_order(batch: int, length: int, valid: Tensor | None, device,
              n_earlier: Tensor | int = 0) -> Tensor:
    """(B, T) long: the order in which equal scores are chosen, padding last.

    The n-th valid token has priority frac(n x golden ratio), so the first k in that order are
    spread evenly over the sequence, for every k. For 8 tokens: 0 5 2 7 4 1 6 3. (All scores are 0
    at the start: choosing the first k would starve the answer, the last k the prompt.)
    n_earlier: (B, 1), the valid tokens of earlier chunks.
    """
    if valid is None:
        rank = torch.arange(length, device=device).expand(batch, length)
        return ((rank * GOLDEN) % 2**32).argsort(1)
    rank = valid.long().cumsum(1) - 1 + n_earlier
    priority = torch.where(valid, (rank * GOLDEN) % 2**32, 2**32)
    return priority.argsort(dim=1, stable=True)


def best_first(scores: Tensor, order: Tensor) -> Tensor:
    """(B, T) long: tokens from the best score to the worst, equal ones as in `order`, NaN last.

    Compared in float32, so that rounding noise between equal tokens of a float64 model is a tie.
    """
    inf = torch.inf
    scores = torch.nan_to_num(scores.detach().float(), nan=-inf, posinf=inf, neginf=-inf)
    ranked = scores.gather(1, order).argsort(dim=1, descending=True, stable=True)
    return order.gather(1, ranked)


def descending_rank(scores: Tensor, order: Tensor, eligible: Tensor) -> Tensor:
    """(B, T) long: 0 for the best score of the eligible tokens, 1 for the next; the others last."""
    ranked = best_first(scores, order)
    ranked = ranked.gather(1, partition(eligible.gather(1, ranked)))
    return ranked.argsort(1)                               # the inverse of a permutation


def row_capacity(keep: float, valid: Tensor, n_elsewhere: Tensor | int = 0) -> Tensor:
    """(B, 1) long: k_b = floor(keep T_b + 1/2) of a row with T_b valid tokens, some elsewhere."""
    dtype = torch.float32 if valid.device.type == "mps" else torch.float64   # MPS has no float64
    length = valid.sum(1, keepdim=True, dtype=dtype) + n_elsewhere
    return (keep * length + 0.5).long()


def span_number(spans: Tensor, valid: Tensor) -> Tensor:
    """(B, T) long: 1 for the tokens of a row's first span, 2 for the second; 0 outside of spans.

    spans 0 7 7 0 3  ->  0 1 1 0 2. A span is a run of one id; padding inside does not end it.
    """
    spans = spans * valid
    index = torch.arange(spans.shape[1], device=spans.device)
    last_valid = torch.where(valid, index, 0).cummax(1).values
    previous = F.pad(spans.gather(1, last_valid)[:, :-1], (1, 0))  # span of the valid token before
    begins = (spans != 0) & (spans != previous)
    return begins.cumsum(1) * (spans != 0)


def partition(mask: Tensor) -> Tensor:
    """mask (B, T) bool -> (B, T) long: the columns that are True, then the others, ascending."""
    return mask.byte().argsort(dim=1, descending=True, stable=True)


def slots(selected: Tensor, n_slot: int) -> tuple[Tensor, Tensor]:
    """Selected tokens (B, T) -> (indices (B, K), live (B, K)): a stable partition.

    selected = 0 1 0 1, K = 3  ->  indices = 1 3 0, live = 1 1 0
    """
    live = torch.arange(n_slot, device=selected.device) < selected.sum(1, keepdim=True)
    return partition(selected)[:, :n_slot], live


def select_topk(scores: Tensor, keep: float, valid: Tensor | None = None,
                order: Tensor | None = None, n_future: int = 0) -> tuple:
    """The k_b best tokens of every row: indices (B, K), live (B, K) or None, selected (B, T).

    Exactly k_b a row, whatever the ties; padding is never selected. scores: (B, T), any float.
    n_future: how many tokens the finished rows will have behind these. k_b counts them, so that
    what the finished row will keep is kept already, as long as no score changes.
    """
    batch, length = scores.shape
    if order is None:
        order = tie_order(batch, length, valid, scores.device)
    n_slot = min(capacity(keep, length + n_future), length)
    if valid is None:                                      # the same K in every row
        best = best_first(scores, order)[:, :n_slot]       # (B, K)
        selected = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
        return best.sort(1).values, None, selected
    k = row_capacity(keep, valid, n_future).clamp(max=n_slot)      # (B, 1); float32 may round up
    if n_future:
        k = torch.minimum(k, valid.sum(1, keepdim=True))
    # padding is the worst, and the last of all ties
    ranked = best_first(scores.detach().masked_fill(~valid, -torch.inf), order)
    live = (torch.arange(length, device=scores.device) < k).expand(batch, length)
    selected = torch.empty_like(live).scatter_(1, ranked, live)
    return partition(selected)[:, :n_slot], live[:, :n_slot], selected


# --- The router of one layer and one task, with its predictor ---

GATES = {  # g(0) = 1 for every one of them
    "linear": lambda r: 1 + r,
    "sigmoid": lambda r: 2 * torch.sigmoid(r),
    "tanh": lambda r: 1 + 0.2 * torch.tanh(r),  # p-MoD (arXiv 2412.04449)
}

# MoD's two ways not to look ahead, and the weight of their loss. "predictor": a small MLP on the
# detached input, whose loss never moves the model. "router": an auxiliary loss on the router's own
# score, which then decides by itself.
MEMBERSHIP_WEIGHT = {"predictor": 1.0, "router": 0.1}


class TaskRouter(nn.Module):
    """Router, predictor and threshold of one layer and one task (or of one layer, when shared).

    predictor_width 0: no predictor, the score itself is the membership logit. A threshold belongs
    to its task even when the router is shared, so it is kept by the task's name.
    """

    def __init__(self, width: int, predictor_width: int, tasks):
        super().__init__()
        self.score = nn.Linear(width, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        self.predictor = None
        if predictor_width:
            self.predictor = nn.Sequential(nn.Linear(width, predictor_width), nn.SiLU(),
                                           nn.Linear(predictor_width, 1))
        for task in tasks:
            self.register_buffer(f"threshold_{task}", torch.zeros(()))

    def router_scores(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> r (B, T) in float32 or better: bf16 scores would tie by the dozen."""
        dtype = torch.promote_types(self.score.weight.dtype, torch.float32)
        weight, bias = self.score.weight.to(dtype), self.score.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), weight, bias).squeeze(-1)

    def forward(self, x: Tensor, task: str, keep: float, context, rule: str,
                earlier: tuple | None = None) -> Routing:
        """x (B, T, D) -> Routing.

        rule: "topk" and "predicted" look at the whole sequence and take the k best by score or by
        predictor, "causal" decides token by token. context: transformer.Context. earlier: behind
        a cache, the (valid tokens (B, 1), tokens kept by this layer, a list) of earlier chunks.
        """
        scores = self.router_scores(x)                     # r = R_t(x)                       (B, T)
        # the stop-gradient: the predictor's loss never moves the model
        logits = scores if self.predictor is None else self.predictor(x.detach()).squeeze(-1)
        if rule == "causal":
            selected = self.causal_selection(scores, logits, task, keep, context, earlier)
            indices = live = None
            if earlier is None:
                indices, live = slots(selected, int(selected.sum(1).max()))
            return Routing(indices, live, selected, scores, logits, None)
        among = (keep, context.valid, context.order, context.n_future)
        indices, live, topk = select_topk(scores, *among)
        selected = topk
        if rule == "predicted":
            indices, live, selected = select_topk(logits, *among)
        return Routing(indices, live, selected, scores, logits, topk)

    def over_threshold(self, logits: Tensor, task: str) -> Tensor:
        """Membership logits -> bool, in the threshold's dtype: bf16 may round one onto another."""
        threshold = self.get_buffer(f"threshold_{task}")
        return logits.to(threshold.dtype) > threshold

    def causal_selection(self, scores: Tensor, logits: Tensor, task: str, keep: float, context,
                         earlier: tuple | None = None) -> Tensor:
        """(B, T) bool: token i is kept when its membership logit is above the threshold.

        Show-o draws all tokens of an image at once, so in t2i a span ranks itself: of its own
        tokens it takes the top K - (tokens kept before it), where K counts all tokens up to its
        end.
        """
        selected = self.over_threshold(logits, task)
        valid = torch.ones_like(selected) if context.valid is None else context.valid
        selected = selected & valid
        if task != "t2i" or context.spans is None:
            return selected
        n_earlier, kept_earlier = earlier or (0, [0] * len(scores))
        kept_earlier = torch.tensor(kept_earlier, device=scores.device)[:, None]       # (B, 1)
        number = span_number(context.spans, valid)
        for n in range(1, int(number.max()) + 1):          # every layout has one span: one round
            image = number == n
            prompt = image.cumsum(1) == 0                  # what stands before it
            kept = kept_earlier + (selected & prompt).sum(1, keepdim=True)
            budget = row_capacity(keep, valid & (prompt | image), n_earlier) - kept    # may be < 0
            rank = descending_rank(scores, context.order, image)
            selected = (selected & ~image) | (image & (rank < budget))
        return selected


def predictor_loss(routings: list, valid: Tensor | None) -> Tensor:
    """Binary cross-entropy of membership logits against membership in the top k, a scalar.

    The mean over the valid tokens of every Routing (at least one), then over these.
    """
    logits = torch.stack([routing.predictor for routing in routings]).float()  # (L, B, T)
    topk = torch.stack([routing.topk for routing in routings]).float()
    loss = F.binary_cross_entropy_with_logits(logits, topk, reduction="none")
    if valid is None:
        by_layer = loss.mean((1, 2))
    else:
        by_layer = (loss * valid).sum((1, 2)) / valid.sum().clamp(min=1)
    return by_layer.mean()


# --- Gather the kept tokens, add their updates ---

def flat(indices: Tensor, length: int) -> Tensor:
    """(B, K) token indices -> (B, K), their places in the (B T, ..) view."""
    return indices + length * torch.arange(indices.shape[0], device=indices.device)[:, None]


def gather_tokens(x: Tensor, places: Tensor) -> Tensor:
    """x (B, T, ..), places (B, K) of flat -> (B, K, ..): the picked tokens of every row."""
    picked = x.flatten(0, 1).index_select(0, places.flatten())
    return picked.view(*places.shape, *x.shape[2:])


def add_tokens(x: Tensor, places: Tensor, update: Tensor) -> Tensor:
    """x_i <- x_i + update_i for the picked tokens, x_i <- x_i for the others.

    x (B, T, D), places (B, K), update (B, K, D) -> (B, T, D). scatter_add keeps the places alone
    for the backward pass, one number a row (index_add would keep the update too).
    """
    width = x.shape[-1]
    rows = places.reshape(-1, 1).expand(-1, width)         # (B K, D), a view of (B K,)
    update = update.reshape(-1, width).to(x.dtype)
    return x.reshape(-1, width).scatter_add(0, rows, update).view(x.shape)
