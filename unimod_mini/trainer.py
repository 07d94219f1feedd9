"""What both training scripts share: devices, optimisers, schedule, one training step, thresholds, checkpoints.

Legend: B batch, T tokens.
"""

import math

import torch
from torch import nn

from .config import ModelConfig
from .files import save_data
from .objectives import TASK_WEIGHTS, task_losses, training_rules
from .routers import Plan
from .transformer import PRECISIONS, UnifiedTransformer, inference, unwrapped, without_wrappers


def find_device(name: str | None = None) -> torch.device:
    """The named device, else CUDA, Apple's MPS or the CPU, whichever is there. ValueError when it is not there."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = name.split(":")[0] if name else next(kind for kind, there in here.items() if there)
    try:
        if here.get(kind):
            return torch.device(name or kind)
    except RuntimeError:                                   # such as "cpu:x"
        pass
    raise ValueError(f"no device {name!r} here: choose from {', '.join(k for k, there in here.items() if there)}")


def find_precision(name: str, device: torch.device, trained: str = "bf16") -> str:
    """"float32" or "bf16" as named; for "auto" `trained`, where the hardware multiplies it, else "float32".

    CUDA devices multiply bf16, and CPUs with AVX512-BF16; other CPUs compute the same by force, only slower.
    ValueError for another name.
    """
    if name in PRECISIONS:
        return name
    if name != "auto":
        raise ValueError(f"no precision {name!r}: choose from auto, {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return trained if fast else "float32"


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)


@torch.no_grad()
def orthogonal(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """(n, r, c) -> (n, r, c): every matrix with its singular values moved near 1 (between 0.7 and 1.2).

    Newton-Schulz, X <- a X + (b A + c A^2) X with A = X X^T, from X / |X|, and the coefficients of Muon (Jordan et al.
    2024, github.com/KellerJordan/Muon). bf16 on CUDA, float32 elsewhere: CPUs without bf16 take 30 times as long.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.mT                                                      # (n, s, s), s the shorter side
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon's rule (Nesterov momentum, orthogonalised, times sqrt(max(1, rows / columns)), decoupled decay),
    with matrices of one shape taken together: on a CPU a step of the toy costs a tenth of its forward and backward.

    found_inf: None, or a scalar on the device; where it is 1 a step changes nothing (as in torch's fused AdamW).
    """
    found_inf = None

    def __init__(self, params, lr: float, weight_decay: float = 0.01, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
            for (rows, columns), params in shapes.items():
                buffers, grads, go = [self.state[p]["momentum"] for p in params], [p.grad for p in params], 1.0
                if self.found_inf is not None:             # the buffer as its own gradient leaves the buffer as it is
                    grads = [torch.where(self.found_inf > 0, *both) for both in zip(buffers, grads)]
                    go = 1 - self.found_inf
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
                updates = (orthogonal(torch.stack(nesterov)).to(params[0].dtype) * go).unbind()
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * go)
                torch._foreach_add_(params, updates, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def hidden_and_rest(model: nn.Module) -> tuple[list, list]:
    """The weights that Muon is for, the matrices of the blocks, and all others."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        (hidden if name.startswith("blocks.") and p.ndim == 2 else rest).append(p)
    return hidden, rest


def make_optimizers(model: nn.Module, muon_lr: float = 0.01, lr: float = 2e-3) -> list:
    """Muon on the matrices of the blocks, AdamW on everything else (embeddings, head, norms, routers).

    ValueError for float16 weights, in which AdamW's epsilon is 0.
    """
    model = unwrapped(model)
    if any(p.dtype == torch.float16 for p in model.parameters()):
        raise ValueError("float16 weights cannot be trained: convert them first, model.float() or model.bfloat16()")
    hidden, rest = hidden_and_rest(model)
    return [Muon(hidden, muon_lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)]


def learning_rate(step: int, steps: int, warmup: int = 20, decay: float = 0.0, shape: str = "linear") -> float:
    """Factor of the peak rate: up over `warmup` steps, flat, down to zero over the last `decay` share of the steps, in a
    line or by "cosine"."""
    up, left = min(1.0, (step + 1) / warmup), min(1.0, (steps - step) / max(1.0, decay * steps))
    return up * (left if shape == "linear" else (1 - math.cos(math.pi * left)) / 2)


def clip_gradients(model: nn.Module, limit: float) -> torch.Tensor:
    """Clips the gradient to the norm `limit` in place. Returns the norm before, not finite when any gradient is not.

    Predictors are left out of it: in one norm with the others, their loss would scale the model's gradient.
    """
    apart, together = [], []
    for name, p in model.named_parameters():
        if p.grad is not None:
            (apart if ".predictor." in name else together).append(p)
    norm = nn.utils.clip_grad_norm_(together, limit)
    return norm + 0 * nn.utils.get_total_norm([p.grad for p in apart]) if apart else norm


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


def update(model, optimizers, factor: float) -> None:
    """Clip the gradient to norm 1, move the weights, forget the gradient."""
    clip_gradients(model, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("peak_lr", group["lr"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------------------------------
# From top-k to causal: thresholds, and how well they do
# --------------------------------------------------------------------------------------------------------------

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


# --------------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------------

def save_checkpoint(path, model: UnifiedTransformer, **extra) -> None:
    """Weights, config, plan, precision and plain `extra` data, for load_checkpoint.

    ValueError, before anything is written, for extra data that is not plain (files.plain) or takes one of these names.
    """
    model = unwrapped(model)
    own = {"model": model.state_dict(), "config": model.config, "plan": model.plan, "precision": model.precision}
    if taken := own.keys() & extra.keys():
        raise ValueError(f"save_checkpoint: {', '.join(sorted(taken))} is stored from the model: take another name")
    save_data(path, own | extra)


def load_checkpoint(path, device="cpu", precision: str = "auto") -> tuple[UnifiedTransformer, dict]:
    """What save_checkpoint wrote -> (model, everything else), in evaluation mode (model.train() trains on).

    precision: as find_precision takes it; "auto" is the one that the model was trained in. ValueError names the file
    when it is something else.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:                             # torch's own text advises to load it unsafely
        raise ValueError(f"{path} is not a checkpoint of unimod_mini: not a file of plain tensors and data") from error
    try:
        with torch.device("meta"):                         # the file's tensors become the model's, dtype and all
            model = UnifiedTransformer(ModelConfig(**stored.pop("config")), Plan(**stored.pop("plan")))
        model.load_state_dict(without_wrappers(stored.pop("model")), assign=True)
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of unimod_mini: {error}") from error
    trained = stored.pop("precision", "float32")           # absent from older checkpoints
    model.precision = find_precision(precision, torch.device(device), trained)
    return model.to(device).eval(), stored
