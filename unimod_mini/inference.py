"""How to call a model that only answers: without gradients, dropout or wrappers."""

import re
from contextlib import contextmanager
from functools import wraps

import torch
from torch import nn

WRAPPERS = re.compile(r"\b(_orig_mod|module)\.")           # of torch.compile, of DDP


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile(model) or DistributedDataParallel(model), else the model."""
    while (inner := getattr(model, "_orig_mod", getattr(model, "module", None))) is not None:
        model = inner
    return model


def without_wrappers(weights: dict) -> dict:
    """{name: tensor} of a wrapped model under the names of the model itself."""
    return {WRAPPERS.sub("", name): weight for name, weight in weights.items()}


@contextmanager
def evaluating(model: nn.Module):
    """Inside, without dropout; afterwards every module is in the mode that it was in before."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def inference(function):
    """Decorates function(model, ..): without gradients, dropout or wrappers."""
    @wraps(function)
    def run(model, *args, **options):
        model = unwrapped(model)
        with torch.no_grad(), evaluating(model):
            return function(model, *args, **options)
    return run
