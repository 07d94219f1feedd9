"""From top-k to causal: the thresholds of the predictors, and how well they do.

Top-k looks at the whole sequence, and so into the future. At inference a token is kept when its
predictor's logit is above a threshold, which looks at this token alone (routers.TaskRouter). Here
the thresholds are set, and what they decide is compared with top-k.

Legend: B batch, T tokens, V vocabulary, N tokens that a predictor decides about.
"""

import torch
from torch import Tensor

from .inference import inference
from .transformer import UnifiedTransformer

LOGITS = 2**28     # so many numbers of (B, T, V) at once: a gigabyte of float32


def predicted_tokens(batch, task: str) -> Tensor:
    """(B, T) bool: the tokens whose membership the predictor decides, all but a drawn span's."""
    if task == "t2i" and batch.spans is not None:
        return batch.is_valid & (batch.spans == 0)
    return batch.is_valid


def decisions(model: UnifiedTransformer, batch, task: str, rule: str) -> tuple[list, list]:
    """By layer, membership logits and selected tokens, (B, T) each; None where none is routed."""
    rows = max(1, LOGITS // (batch.ids.shape[1] * model.config.vocab_size))
    pieces = []
    for start in range(0, len(batch.ids), rows):
        part = batch.map(lambda t: t[start:start + rows])
        pieces.append(model(**part.inputs(), task=task, routing=rule).routing)
    logits, selected = [], []
    for layer in zip(*pieces):                             # a Routing for each piece, or None
        routed = layer[0] is not None
        logits.append(torch.cat([part.predictor for part in layer]) if routed else None)
        selected.append(torch.cat([part.selected for part in layer]) if routed else None)
    return logits, selected


@inference
def calibrate(model: UnifiedTransformer, batches: dict) -> None:
    """Set every threshold so that causal routing keeps as many tokens as top-k on these batches.

    batches: {task: Batch}. Layer after layer, those below already set. Run it in the precision that
    inference will use: another one may flip the few tokens that lie close to a threshold.
    ValueError for scores that are not finite.
    """
    for task, batch in batches.items():
        asked = predicted_tokens(batch, task)              # (B, T)
        _, topk = decisions(model, batch, task, "topk")
        for layer, kept in enumerate(topk):
            if kept is None or not asked.any():
                continue
            logits, _ = decisions(model, batch, task, "causal")
            logits = logits[layer][asked].float()          # (N,)
            if not logits.isfinite().all():
                raise ValueError(f"calibrate: membership logits of layer {layer} for {task} are "
                                 "not finite")
            below, above = gap_for(logits, int(kept[asked].sum()))
            threshold = model.router(layer, task).get_buffer(f"threshold_{task}")
            threshold.copy_((below + above) / 2)
            if threshold >= above:                         # in bf16 the middle may round up to it
                threshold.copy_(below)


def gap_for(logits: Tensor, n_keep: int) -> tuple[Tensor, Tensor]:
    """The neighbouring scores between which a threshold keeps the most nearly `n_keep` tokens.

    logits (N,). Neighbours within 1e-4 of the whole spread are kept or dropped together, so that
    rounding noise flips no decision.
    """
    scores, count = logits.unique(return_counts=True)      # ascending
    edges = torch.cat((scores[:1] - 2, scores, scores[-1:] + 2))
    n_below = torch.cat((count.new_zeros(1), count.cumsum(0)))
    n_kept = logits.numel() - n_below                      # by a threshold in each gap of the edges
    too_close = edges.diff() <= 1e-4 * (scores[-1] - scores[0])
    miss = (n_kept - n_keep).abs().masked_fill(too_close, logits.numel() + 1)
    best = miss.argmin()
    return edges[best], edges[best + 1]


@inference
def predictor_report(model: UnifiedTransformer, batches: dict) -> dict:
    """How well membership is predicted: means over layers and tasks, each of them in "by_layer".

    accuracy against membership in the top k, beside its base rate (always guessing the majority);
    precision and recall of "kept"; the share of tokens kept by top-k (capacity_trained) and by
    causal routing (capacity_realised). Means are None where nothing is routed.
    """
    rows = []
    for task, batch in batches.items():
        asked = predicted_tokens(batch, task)
        logits, topk = decisions(model, batch, task, "topk")
        _, causal = decisions(model, batch, task, "causal")
        for layer, kept in enumerate(topk):
            if kept is None or not asked.any():
                continue
            said = model.router(layer, task).over_threshold(logits[layer][asked], task)
            agreement = agreement_of(said, kept[asked], causal[layer][asked])
            rows.append({"task": task, "layer": layer} | agreement)
    means = dict.fromkeys(FIGURES)
    for name in FIGURES if rows else ():
        means[name] = round(sum(row[name] for row in rows) / len(rows), 4)
    return means | {"by_layer": rows}


FIGURES = ("accuracy", "base_rate", "precision", "recall", "capacity_trained", "capacity_realised")


def agreement_of(said: Tensor, kept: Tensor, realised: Tensor) -> dict:
    """FIGURES of said, kept, realised (N,) bool: by the predictor, by top-k, by causal routing."""
    both, share = (kept & said).sum(), kept.float().mean()
    values = ((said == kept).float().mean(), torch.maximum(share, 1 - share),
              both / said.sum().clamp(min=1), both / kept.sum().clamp(min=1),
              share, realised.float().mean())
    return {name: round(value.item(), 4) for name, value in zip(FIGURES, values)}
