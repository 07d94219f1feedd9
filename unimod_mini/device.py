"""Where a model computes, and in which precision."""

import torch

from .transformer import PRECISIONS


def find_device(name: str | None = None) -> torch.device:
    """The named device, else CUDA, Apple's MPS or the CPU, whichever is there.

    ValueError when it is not there.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = name.split(":")[0] if name else next(kind for kind, there in here.items() if there)
    try:
        if here.get(kind):
            return torch.device(name or kind)
    except RuntimeError:                                   # such as "cpu:x"
        pass
    raise ValueError(f"no device {name!r} here: choose from {', '.join(k for k, there in here.items() if there)}")


def find_precision(name: str, device: torch.device, trained: str = "bf16") -> str:
    """"float32" or "bf16" as named; for "auto" `trained`, where the hardware multiplies it, else
    "float32".

    CUDA devices multiply bf16, and CPUs with AVX512-BF16; other CPUs compute the same by force,
    only slower. ValueError for another name.
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
