"""From top-k to causal: the thresholds of the predictors, and how well they do.

Top-k looks at the whole sequence, and so into the future. At inference a token is kept when its
predictor's logit is above a threshold, which looks at this token alone (routers.TaskRouter). Here the
thresholds are set, and what they decide is compared with top-k.

Legend: B batch, T tokens.
"""

import torch

from .transformer import UnifiedTransformer, inference


def predicted_tokens(batch, task: str) -> torch.Tensor:
    """(B, T) bool: the tokens whose membership the predictor decides at inference (not those of a drawn span)."""
    return batch.is_valid & (batch.spans == 0) if task == "t2i" and batch.spans is not None else batch.is_valid


LOGITS = 2**28                     # a gigabyte of float32


def decisions(model: UnifiedTransformer, batch, task: str, rule: str) -> tuple[list, list]:
    """By layer, membership logits and selected tokens, (B, T) each, None where nothing is routed.

    So many sequences at a time that the model's own logits, (.., T, V), are LOGITS numbers at most.
    """
    rows = max(1, LOGITS // (batch.ids.shape[1] * model.config.vocab_size))
    pieces = []
    for start in range(0, len(batch.ids), rows):
        part = batch.map(lambda t: t[start:start + rows])
        pieces.append(model(**part.inputs(), task=task, routing=rule).routing)
    layers = [None if layer[0] is None else layer for layer in zip(*pieces)]
    return tuple([None if layer is None else torch.cat([getattr(routing, name) for routing in layer])
                  for layer in layers] for name in ("predictor", "selected"))


@inference
def calibrate(model: UnifiedTransformer, batches: dict) -> None:
    """Set every threshold so that, on these batches ({task: Batch}), causal routing keeps as many tokens as top-k.

    Layer after layer, those below already set. A threshold lies midway between two neighbouring scores; neighbours
    within 1e-4 of the whole spread are kept or dropped together, whichever is nearer. Run it in the precision
    that inference will use: another one may flip the few tokens that lie close. ValueError for scores that are not
    finite.
    """
    for task, batch in batches.items():
        asked = predicted_tokens(batch, task)
        _, topk = decisions(model, batch, task, "topk")
        for layer, target in enumerate(topk):
            if target is None or not asked.any():
                continue
            logits = decisions(model, batch, task, "causal")[0][layer][asked].float()
            if not logits.isfinite().all():
                raise ValueError(f"calibrate: membership logits of layer {layer} for {task} are not finite")
            scores, group = logits.unique(return_counts=True)                                # ascending
            edges = torch.cat((scores[:1] - 2, scores, scores[-1:] + 2))     # thresholds lie between neighbours
            kept = logits.numel() - torch.cat((group.new_zeros(1), group.cumsum(0)))
            apart = edges.diff() > 1e-4 * (scores[-1] - scores[0])
            best = (kept - target[asked].sum()).abs().masked_fill(~apart, kept[0] + 1).argmin()
            threshold = model.router(layer, task).get_buffer(f"threshold_{task}")
            threshold.copy_((edges[best] + edges[best + 1]) / 2)
            if threshold >= edges[best + 1]:               # in bf16 the middle may round onto the score above
                threshold.copy_(edges[best])


@inference
def predictor_report(model: UnifiedTransformer, batches: dict) -> dict:
    """How well membership is predicted: means over the routed layers and tasks (None: nothing is routed), and every one
    of them in "by_layer".

    accuracy against top-k membership beside its base rate (always guessing the majority), precision and recall of
    "kept", and the share of tokens kept by top-k (capacity_trained) and by causal routing (capacity_realised).
    """
    rows = []
    for task, batch in batches.items():
        asked = predicted_tokens(batch, task)
        logits, topk = decisions(model, batch, task, "topk")
        _, causal = decisions(model, batch, task, "causal")
        for layer, (target, realised) in enumerate(zip(topk, causal)):
            if target is not None and asked.any():
                kept = target[asked]
                said = model.router(layer, task).over_threshold(logits[layer][asked], task)
                both, share = (kept & said).sum(), kept.float().mean()
                values = {"accuracy": (said == kept).float().mean(), "base_rate": torch.maximum(share, 1 - share),
                          "precision": both / said.sum().clamp(min=1), "recall": both / kept.sum().clamp(min=1),
                          "capacity_trained": share,
                          "capacity_realised": realised[asked].float().mean()}
                rows.append({"task": task, "layer": layer} | {k: round(v.item(), 4) for k, v in values.items()})
    names = ("accuracy", "base_rate", "precision", "recall", "capacity_trained", "capacity_realised")
    means = {name: round(sum(row[name] for row in rows) / len(rows), 4) if rows else None for name in names}
    return means | {"by_layer": rows}
