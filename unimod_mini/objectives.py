"""The training losses: next-token, masked-token, predictor.

Show-o (arXiv 2408.12528) predicts masked image codes where they stand and text one token ahead; Emu3 (arXiv
2409.18869) predicts everything one token ahead. tokenizer.py has written the difference into `labels`, so one
cross-entropy serves both. Weights: t2i 1, mmu 1, lm 0.1 (Show-o).

Legend: B batch, T tokens, N image tokens, V vocabulary.
"""

import math
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .optim import update
from .routers import MEMBERSHIP_WEIGHT, predictor_loss
from .tokenizer import IGNORE, Batch, Tokenizer

TASK_WEIGHTS = {"t2i": 1.0, "mmu": 1.0, "lm": 0.1}


class Losses(NamedTuple):
    task: Tensor           # cross-entropy, mean over the labelled tokens: a scalar
    predictor: Tensor      # binary cross-entropy of membership, weighted, mean over the routed layers: a scalar


def drop_prompts(captions: list, rate: float, rng: Random) -> list:
    """Empties a caption with probability `rate`, so that the model also learns to draw without one (guidance)."""
    return ["" if rng.random() < rate else caption for caption in captions]


def mask_image_tokens(batch: Batch, tokenizer: Tokenizer, generator) -> Batch:
    """Masked diffusion: hides round(N cos(pi u / 2)) codes of every picture, u ~ U(0, 1), at least one.

    The hidden codes are replaced by the mask id and are the only labels left. generator: a torch.Generator, or a list
    of them, one a row, which makes every row independent of the batch that it is in.
    """
    is_code = batch.labels != IGNORE                                          # (B, T)
    u = uniform(len(is_code), 1, generator)
    n_mask = (tokenizer.n_image * torch.cos(math.pi * u / 2)).round().clamp(min=1)
    noise = uniform(*is_code.shape, generator).masked_fill(~is_code, 2.0)
    rank = noise.argsort(dim=1, stable=True).argsort(1)                       # stable: ties, too, whatever the batch
    hidden = rank < n_mask                                                    # the n_mask smallest of each row
    return batch._replace(ids=batch.ids.masked_fill(hidden, tokenizer.mask_id),
                          labels=batch.labels.masked_fill(~hidden, IGNORE))


def uniform(rows: int, columns: int, generator) -> Tensor:
    """(rows, columns) of U(0, 1), from one generator or from a list of one a row."""
    if isinstance(generator, torch.Generator):
        return torch.rand(rows, columns, generator=generator)
    return torch.cat([torch.rand(1, columns, generator=own) for own in generator])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (B, T, V) float, labels (B, T) long -> mean over labels != IGNORE, a scalar; 0 when there is none."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss / (labels != IGNORE).sum().clamp(min=1)


def training_rule(step: int, batch: Batch, task: str) -> str:
    """Who ranks the tokens in this step of training: "topk", the router, or "predicted", the predictors.

    Every other step a picture that is drawn token by token (t2i without spans) is learnt with the k tokens that the
    predictors put first, as it will be drawn. Departure from the paper, which trains with the router's k alone.
    """
    return "predicted" if step % 2 and task == "t2i" and batch.spans is None else "topk"


def training_rules(step: int, batches: dict) -> dict:
    """{task: training_rule} of {task: Batch}."""
    return {task: training_rule(step, batch, task) for task, batch in batches.items()}


def task_losses(model, batch: Batch, task: str, rule: str = "topk") -> Losses:
    """One forward. rule: routing of the model."""
    out = model(**batch.inputs(), task=task, routing=rule)
    routed = [routing for routing in out.routing if routing is not None]
    weight = MEMBERSHIP_WEIGHT[model.config.membership]
    membership = weight * predictor_loss(routed, batch.valid) if routed else out.logits.new_zeros(())
    return Losses(cross_entropy(out.logits, batch.labels), membership)


def forward_backward(model, batches: dict, rules: dict, weights: dict = TASK_WEIGHTS) -> dict:
    """The gradient of the weighted losses of {task: Batch}, routed by {task: rule}. Returns {task: loss} as tensors."""
    losses = {task: task_losses(model, batch, task, rules[task]) for task, batch in batches.items()}
    total = sum(weights[task] * loss.task + loss.predictor for task, loss in losses.items())
    total.backward()
    return {task: loss.task.detach() for task, loss in losses.items()}


def train_step(model, optimizers, batches: dict, step: int, factor: float, weights: dict = TASK_WEIGHTS) -> dict:
    """One step on one batch of every task: forward, backward, clip, update. Returns {task: loss} as tensors.

    step: its number, for objectives.training_rule; factor: of the peak rates; weights: {task: its loss's}.
    """
    losses = forward_backward(model, batches, training_rules(step, batches), weights)
    update(model, optimizers, factor)
    return losses


# --------------------------------------------------------------------------------------------------------------
# Several micro-batches, several ranks: one loss
# --------------------------------------------------------------------------------------------------------------

def token_counts(batch: Batch) -> tuple[int, int]:
    """(labelled tokens, valid tokens) of a batch on the CPU: what its two losses are means over."""
    return int((batch.labels != IGNORE).sum()), int(batch.ids.numel() if batch.valid is None else batch.valid.sum())


class Objective(nn.Module):
    """The losses of every task in one forward, so that one backward (and one exchange of gradients) holds all tasks.

    forward({task: Batch}, {task: (a, b)}, {task: rule}) -> loss, a scalar, and {task: (a x task loss, b x predictor
    loss)} without gradient. a and b: this batch's part of the labelled and of the valid tokens of a whole step. The
    means over the step are then plain sums over micro-batches and ranks, however the tokens are spread. rule: top-k
    where none is given.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batches: dict, parts: dict, rules: dict | None = None) -> tuple[Tensor, dict]:
        loss, shown = 0.0, {}
        with self.model.autocast():                        # the tasks share the casts of the weights
            losses = {task: task_losses(self.model, batch, task, (rules or {}).get(task, "topk"))
                      for task, batch in batches.items()}
        for task, (task_loss, predictor) in losses.items():
            a, b = parts[task]
            loss = loss + TASK_WEIGHTS[task] * a * task_loss + b * predictor
            shown[task] = torch.stack((a * task_loss, b * predictor)).detach()
        return loss, shown
