"""Optimizers, the schedule of their rate, clipping: how both training scripts move weights."""

import math

import torch
from torch import Tensor, nn

from .inference import unwrapped


@torch.no_grad()
def orthogonal(matrices: Tensor, rounds: int = 5) -> Tensor:
    """(n, r, c) -> (n, r, c): every matrix with its singular values moved near 1 (0.7 to 1.2).

    Newton-Schulz, X <- a X + (b A + c A^2) X with A = X X^T, from X / |X|, and the coefficients of
    Muon (Jordan et al. 2024, github.com/KellerJordan/Muon). bf16 on CUDA, float32 elsewhere.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.mT                                    # A (n, s, s), s the shorter side
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, times sqrt(max(1, rows / columns)); decoupled decay.

    torch.optim.Muon's rule, with all matrices of one shape taken together, in float32 on a CPU.
    Why not torch's: it orthogonalises in bf16 and has no found_inf. A step of it, on the matrices
    of toy-emu3, takes 14 times as long as this one on a CPU limited to AVX2, 1.3 times limited to
    AVX-512, half as long with AVX512-BF16 (benchmarks/muon.py, ONEDNN_MAX_CPU_ISA=AVX2,
    AVX512_CORE, not set; torch 2.13, one thread).

    found_inf: None, or a scalar on the device; where it is 1 a step changes nothing (as in torch's
    fused AdamW).
    """
    found_inf = None

    def __init__(self, params, lr: float, weight_decay: float = 0.01, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self.step_together(params, group)

    def step_together(self, params: list, group: dict) -> None:
        """One step of matrices of one shape."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta, grads = [self.state[p]["momentum"] for p in params], [p.grad for p in params]
        go = 1.0
        if self.found_inf is not None:                     # a momentum as its own gradient stays
            skip = self.found_inf > 0
            grads = [torch.where(skip, *both) for both in zip(momenta, grads)]
            go = 1 - self.found_inf
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
        updates = orthogonal(torch.stack(nesterov)).to(params[0].dtype) * go
        rows, columns = params[0].shape
        scale = group["lr"] * max(1, rows / columns) ** 0.5
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * go)
        torch._foreach_add_(params, updates.unbind(), alpha=-scale)


def make_optimizers(model: nn.Module, muon_lr: float | None = 0.01, lr: float = 2e-3,
                    weight_decay: float = 0.01, vector_decay: float = 0.01,
                    betas: tuple = (0.9, 0.99), fused: bool = False) -> list:
    """Muon on the matrices of the blocks (muon_lr None: on none), AdamW on everything else.

    weight_decay, vector_decay: AdamW's, of matrices and of norms and biases. ValueError for float16
    weights, in which AdamW's epsilon is 0.
    """
    hidden, matrices, vectors = [], [], []
    for name, p in unwrapped(model).named_parameters():
        if p.dtype == torch.float16:
            raise ValueError("float16 weights cannot be trained: convert them first, "
                             "model.float() or model.bfloat16()")
        if not p.requires_grad:
            continue
        if p.ndim < 2:
            vectors.append(p)
        elif muon_lr is not None and name.startswith("blocks."):
            hidden.append(p)
        else:
            matrices.append(p)
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": vector_decay}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
    return [Muon(hidden, muon_lr), adamw] if hidden else [adamw]


def learning_rate(step: int, steps: int, warmup: int = 20, decay: float = 0.0,
                  shape: str = "linear") -> float:
    """Factor of the peak rate: up over `warmup` steps, flat, down to 0 over the last `decay`.

    decay: a share of the steps; shape of the way down: "linear" or "cosine".
    """
    up = min(1.0, (step + 1) / warmup)
    left = min(1.0, (steps - step) / max(1.0, decay * steps))
    if shape == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return up * left


def set_rate(optimizers: list, factor: float) -> None:
    """Every group's rate: factor x the rate that it was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("peak_lr", group["lr"])


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Clips the gradient to the norm `limit` in place. Returns the norm before.

    It is not finite when any gradient is not. Predictors are left out of it: in one norm with the
    others, their loss would scale the model's gradient.
    """
    predictors, others = [], []
    for name, p in model.named_parameters():
        if p.grad is not None:
            (predictors if ".predictor." in name else others).append(p)
    norm = nn.utils.clip_grad_norm_(others, limit)
    if predictors:
        norm = norm + 0 * nn.utils.get_total_norm([p.grad for p in predictors])
    return norm


def update(model: nn.Module, optimizers: list, factor: float) -> None:
    """Clip the gradient to norm 1, move the weights, forget the gradient."""
    clip_gradients(model, 1.0)
    set_rate(optimizers, factor)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
