"""Does the own Muon pay? A step of it beside torch.optim.Muon's, on the matrices of a toy's blocks.

    python benchmarks/muon.py [--preset toy-emu3] [--device cpu] [--threads 1]

Pairs of steps, in turns: the median seconds of each, and the median of their ratio.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from unimod_mini import ModelConfig, UnifiedTransformer  # noqa: E402
from unimod_mini.optim import Muon  # noqa: E402

PAIRS, WARM = 60, 5


def matrices_of(preset: str, device: str) -> list:
    """The matrices of the blocks of a model, with random gradients."""
    torch.manual_seed(0)
    model = UnifiedTransformer(ModelConfig.preset(preset)).to(device)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    for p in matrices:
        p.grad = torch.randn_like(p)
    return matrices


def seconds(optimizer, device: str) -> float:
    start = time.perf_counter()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(argv=None) -> None:
    cli = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cli.add_argument("--preset", default="toy-emu3", help="of ModelConfig (toy-emu3)")
    cli.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    cli.add_argument("--threads", type=int, default=1, help="of torch (1)")
    args = cli.parse_args(argv)
    torch.set_num_threads(args.threads)
    own = Muon(matrices_of(args.preset, args.device), 0.01)
    theirs = torch.optim.Muon(matrices_of(args.preset, args.device), 0.01)
    pairs = []
    for _ in range(WARM + PAIRS):
        pairs.append((seconds(own, args.device), seconds(theirs, args.device)))
    one, two = zip(*pairs[WARM:])
    ratio = statistics.median(b / a for a, b in pairs[WARM:])
    print(f"{args.preset}, {args.device}, {args.threads} thread(s): own "
          f"{1000 * statistics.median(one):.1f} ms, torch.optim.Muon "
          f"{1000 * statistics.median(two):.1f} ms, {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
