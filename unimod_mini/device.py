"""Where a model computes, and in which precision."""

import torch

from .transformer import PRECISIONS


def find_device(name: str | None = None) -> torch.device:
    """The named device, else CUDA, Apple's MPS or the CPU, whichever is there first.

    ValueError when it is not there.
    """
    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here.insert(0, "cuda")
    try:
        device = torch.device(name or here[0])
    except RuntimeError:                                   # such as "cpu:x"
        device = None
    if device is None or device.type not in here:
        raise ValueError(f"no device {name!r} here: choose from {', '.join(here)}")
    return device


def find_precision(name: str, device: torch.device, trained: str = "bf16") -> str:
    """"float32" or "bf16" as named; "auto": `trained` where the hardware multiplies it.

    CUDA devices multiply bf16, and CPUs with AVX512-BF16; other CPUs compute the same by force,
    only slower, so "auto" is float32 there. ValueError for another name.
    """
    if name in PRECISIONS:
        return name
    if name != "auto":
        raise ValueError(f"no precision {name!r}: choose from auto, {', '.join(PRECISIONS)}")
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
    return trained if fast else "float32"
