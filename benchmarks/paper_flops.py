"""The paper's FLOPs beside ours, for the true sizes of Show-o and Emu3.

    python benchmarks/paper_flops.py

UniMoD (arXiv 2502.06474) gives TFLOPs of full computation and of its plans, but neither the batch
nor the convention: a forward pass or a training step, all of the n x n attention or the live part
of its mask? So each is counted here, for the batches that Show-o's training and Emu3's picture
sizes suggest. What comes near proves none of them. The ratio, plan over full computation, depends
little on the convention: that is the number to compare.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from unimod_mini.config import ModelConfig  # noqa: E402
from unimod_mini.flops import batch_flops, bisect, flops_ratio  # noqa: E402
from unimod_mini.plan import Plan  # noqa: E402

# {preset: (TFLOPs of full computation, ratio, batches that the paper may have counted)}; a batch:
# what it is, tokens of a sequence, {task: (sequences, tokens in a bidirectional span)}
PAPER = {
    "showo-1.3b": (51.1, 0.847, (
        ("one GPU, 512 px: 5 t2i, 2 lm, 5 mmu", 1408,
         {"t2i": (5, 1026), "lm": (2, 0), "mmu": (5, 1027)}),
        ("one GPU, 256 px: 10 t2i, 4 lm, 10 mmu", 387,
         {"t2i": (10, 258), "lm": (4, 0), "mmu": (10, 259)}))),
    "emu3-8b": (89.0, 0.601, (
        ("one image of 512 px, no text", 4170, {"t2i": (1, 0)}),
        ("the same and 950 ids of text", 5120, {"t2i": (1, 0)}),
        ("one image of 720 px, no text", 8200, {"t2i": (1, 0)})))}
CONVENTIONS = [("forward", "full"), ("forward", "live"), ("train", "full"), ("train", "live")]
TRAIN_FULL = 2  # the convention of flops_ratio


def by_convention(count, config: ModelConfig, plan: Plan | None, length: int, batch: dict) -> list:
    """count(..) of a batch {task: (sequences, span)} in each of CONVENTIONS.

    count: batch_flops or flops_ratio.
    """
    lengths = dict.fromkeys(batch, length)
    counts = {task: n for task, (n, _) in batch.items()}
    spans = {task: span for task, (_, span) in batch.items()}
    return [count(config, plan, lengths, mode, counts, spans if kind == "live" else None)
            for mode, kind in CONVENTIONS]


def comparison(name: str) -> str:
    """Full computation in the paper and here; a plan at the paper's ratio, and its ratio here."""
    config, (paper, ratio, batches) = ModelConfig.preset(name), PAPER[name]
    titles = "".join(f"{f'{mode} {kind}':>14} " for mode, kind in CONVENTIONS)
    lines = [f"{name}: {paper} TFLOPs in the paper, ratio {ratio}; full computation here, * within "
             "5 % of the paper's", f"{'batch':<40}{'tokens':>7}{titles}"]
    for label, n, batch in batches:
        cells = []
        for count in by_convention(batch_flops, config, None, n, batch):
            near = abs(count / 1e12 / paper - 1) <= 0.05
            cells.append(f"{count / 1e12:>14.1f}{'*' if near else ' '}")
        lines.append(f"{label:<40}{n:>7,}{''.join(cells)}")

    _, n, batch = batches[0]
    span_share = batch["t2i"][1] / n
    lengths = []
    for i in range(len(CONVENTIONS)):
        def tera_flops(tokens: float) -> float:
            alone = {"t2i": (1, int(span_share * tokens))}
            return by_convention(batch_flops, config, None, int(tokens), alone)[i] / 1e12
        lengths.append(int(bisect(tera_flops, paper, 1, 1e5)))
    label = f"one t2i sequence costs {paper} at tokens"
    lines.append(f"{label:<47}" + "".join(f"{length:>14,} " for length in lengths))

    def ratios(keep: float) -> list:
        plan = Plan.mod(config.n_layer, tuple(batch), keep)
        return by_convention(flops_ratio, config, plan, n, batch)

    keep = bisect(lambda keep: ratios(keep)[TRAIN_FULL], ratio, 0.0, 0.99)
    label = f"first batch, odd layers keep {keep:.3f}: ratio"
    lines.append(f"{label:<47}" + "".join(f"{x:>14.3f} " for x in ratios(keep)))
    return "\n".join(line.rstrip() for line in lines)


def comparisons() -> str:
    """Every model of PAPER, and how to read it."""
    reading = (
        "full: n x n attention; live: the pairs that the mask lets through. The keep is found by "
        "bisection, so that the training\nFLOPs, full, meet the paper's ratio; live, kept tokens "
        "are spread evenly. The paper states neither its batch nor its\nconvention: what comes "
        "near proves none.")
    return "\n\n".join([*map(comparison, PAPER), reading])


if __name__ == "__main__":
    print(comparisons())
