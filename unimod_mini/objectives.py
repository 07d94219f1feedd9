"""The training losses: next token, masked token, membership; and the one step on them.

Show-o (arXiv 2408.12528) predicts masked image codes where they stand and text one token ahead;
Emu3 (arXiv 2409.18869) predicts everything one token ahead. tokenizer.py has written the difference
into `labels`, so one cross-entropy serves both. The membership loss teaches the predictors
(routers.predictor_loss).

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

TASK_WEIGHTS = {"t2i": 1.0, "mmu": 1.0, "lm": 0.1}         # those of Show-o


class Losses(NamedTuple):
    task: Tensor           # cross-entropy, mean over the labelled tokens: a scalar
    predictor: Tensor      # of membership, weighted, mean over the routed layers: a scalar


# --- What is random in a batch ---

def drop_prompts(captions: list, rate: float, rng: Random) -> list:
    """Empties a caption with probability `rate`, so that guidance can draw without one."""
    return ["" if rng.random() < rate else caption for caption in captions]


def mask_image_tokens(batch: Batch, tokenizer: Tokenizer, generator) -> Batch:
    """Masked diffusion: hides round(N cos(pi u / 2)) codes of a picture, at least 1; u ~ U(0, 1).

    The hidden codes are replaced by the mask id and are the only labels left. generator: a
    torch.Generator, or a list of them, one a row: then a row is independent of its batch.
    """
    is_code = batch.labels != IGNORE                       # (B, T)
    u = uniform(len(is_code), 1, generator)
    n_mask = (tokenizer.n_image * torch.cos(math.pi * u / 2)).round().clamp(min=1)
    noise = uniform(*is_code.shape, generator).masked_fill(~is_code, 2.0)
    rank = noise.argsort(dim=1, stable=True).argsort(1)
    hidden = rank < n_mask                                 # the n_mask smallest of each row
    return batch._replace(ids=batch.ids.masked_fill(hidden, tokenizer.mask_id),
                          labels=batch.labels.masked_fill(~hidden, IGNORE))


def uniform(rows: int, columns: int, generator) -> Tensor:
    """(rows, columns) of U(0, 1), from one generator or from a list of one a row."""
    if isinstance(generator, torch.Generator):
        return torch.rand(rows, columns, generator=generator)
    return torch.cat([torch.rand(1, columns, generator=own) for own in generator])


# --- The losses ---

def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (B, T, V), labels (B, T) -> the mean over labels != IGNORE; 0 if there is none."""
    logits, labels = logits.flatten(0, 1).float(), labels.flatten()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return loss / (labels != IGNORE).sum().clamp(min=1)


def training_rule(step: int, batch: Batch, task: str) -> str:
    """Who ranks the tokens in this step of training: "topk", the router, or "predicted".

    Every other step, a picture that is drawn token by token (t2i without spans) is learnt with the
    k tokens that the predictors put first, as it will be drawn. Departure from the paper, which
    trains with the router's k alone.
    """
    return "predicted" if step % 2 and task == "t2i" and batch.spans is None else "topk"


def training_rules(step: int, batches: dict) -> dict:
    """{task: training_rule} of {task: Batch}."""
    return {task: training_rule(step, batch, task) for task, batch in batches.items()}


def task_losses(model, batch: Batch, task: str, rule: str = "topk") -> Losses:
    """One forward. rule: routing of the model."""
    out = model(**batch.inputs(), task=task, routing=rule)
    routed = [routing for routing in out.routing if routing is not None]
    if not routed:
        return Losses(cross_entropy(out.logits, batch.labels), out.logits.new_zeros(()))
    membership = MEMBERSHIP_WEIGHT[model.config.membership] * predictor_loss(routed, batch.valid)
    return Losses(cross_entropy(out.logits, batch.labels), membership)


class Objective(nn.Module):
    """The losses of all tasks in one forward, for one backward and one exchange of gradients.

    forward({task: Batch}, {task: (a, b)}, {task: rule}) -> the loss, a scalar, and {task: (a x task
    loss, b x predictor loss)} without gradient.

        loss = sum over tasks of  weight a (task loss) + b (predictor loss)

    a and b: this batch's share of the labelled and of the valid tokens of a whole step, so that
    the means over the step are sums over micro-batches and ranks; None: the batch is the step.
    rules None: top-k.
    """

    def __init__(self, model: nn.Module, weights: dict = TASK_WEIGHTS):
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, batches: dict, shares: dict | None = None,
                rules: dict | None = None) -> tuple:
        loss, shown = 0.0, {}
        for task, batch in batches.items():
            losses = task_losses(self.model, batch, task, rules[task] if rules else "topk")
            a, b = shares[task] if shares else (1.0, 1.0)
            task_loss, predictor = a * losses.task, b * losses.predictor
            loss = loss + self.weights[task] * task_loss + predictor
            shown[task] = torch.stack((task_loss, predictor)).detach()
        return loss, shown


# --- The step ---

def forward_backward(objective: nn.Module, batches: dict, shares: dict | None, rules: dict | None,
                     scale: float = 1.0) -> dict:
    """Adds the gradient of scale x the loss. Returns {task: (task loss, predictor loss)}."""
    loss, shown = objective(batches, shares, rules)
    (scale * loss).backward()
    return shown


def train_step(model, optimizers: list, batches: dict, step: int, factor: float,
               weights: dict = TASK_WEIGHTS) -> dict:
    """One step on one batch of every task: forward, backward, clip, update. Returns {task: loss}.

    step: its number, for training_rule; factor: of the peak rates; weights: {task: its loss's}.
    """
    rules = training_rules(step, batches)
    shown = forward_backward(Objective(model, weights), batches, None, rules)
    update(model, optimizers, factor)
    return {task: losses[0] for task, losses in shown.items()}
