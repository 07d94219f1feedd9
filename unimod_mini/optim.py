"""Optimisers, the schedule of their rate, clipping: what both training scripts move the weights with."""

import math

import torch
from torch import nn

from .inference import unwrapped


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


def update(model, optimizers, factor: float) -> None:
    """Clip the gradient to norm 1, move the weights, forget the gradient."""
    clip_gradients(model, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("peak_lr", group["lr"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
