"""Floating-point operations of a forward or a training step, from (config, plan, task, length) alone.

A multiply-add counts 2, and only matrix products count. A routed layer costs its K = floor(keep T + 1/2) slots, its
router and predictor all T tokens. Two conventions for the scores of attention, and every figure must say which:

    full    all n x n pairs, whatever the mask hides: what a kernel without knowledge of the mask computes (the default)
    live    the pairs that the mask lets through, no padding: what a perfect kernel would compute

The backward pass costs twice the forward, with two exceptions. The predictor's first layer needs no gradient of its
detached input; and a router without a slot (K = 0) gets no gradient, unless the membership loss is its own. Norms,
gate, gather, scatter and the optimiser are no matrix products: a FLOP saved here is not yet a second saved.

Legend: T tokens, K slots, D width, d head width, H heads, G key/value heads, F hidden width of the MLP, V vocabulary.
"""

import argparse
from collections import Counter
from typing import NamedTuple

from .config import PRESETS, ModelConfig
from .console import command
from .memory import activation_bytes, cache_bytes, count_parameters, keep_ratios
from .plan import BASELINES, TASKS, Plan, capacity

PARTS = ("embedding", "projections", "scores", "mlp", "router", "predictor", "head")   # embedding: a look-up, 0 FLOPs


PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}       # bf16 FLOPs a second, dense; H100 and H200 as SXM


def peak_flops(name: str) -> float | None:
    """bf16 FLOPs a second of a CUDA device by its name, None where the table does not know it."""
    words = name.replace("-", " ").split()
    if "MIG" in words or {"H100", "H200"} & set(words) and {"PCIe", "NVL"} & set(words):
        return None                                        # a part of a device; slower than the SXM modules
    return next((peak for word, peak in PEAKS.items() if word in words), None)


class Flops(NamedTuple):
    total: int
    by_layer: list     # one int a layer, head apart
    by_part: dict      # PARTS -> int
    table: list        # one dict PARTS -> int a layer, head apart


def live_pairs(length: int, spans=None, valid=None, indices=None) -> int:
    """Pairs (query, key) of one row that the mask lets through in a layer that keeps the tokens `indices`.

    spans and valid (T,), indices (K,) distinct token numbers: lists or tensors, None: no span, no padding, every token.
    Positions count the valid tokens, as by default. Of m tokens, m_s of them in span s:

        m (m + 1) / 2  causal pairs  +  m_s (m_s - 1) / 2  pairs that look ahead inside of each span
    """
    kept = [int(i) for i in (range(length) if indices is None else indices)]
    kept = [i for i in kept if valid is None or valid[i]]
    sizes = Counter() if spans is None else Counter(int(spans[i]) for i in kept if spans[i])
    return len(kept) * (len(kept) + 1) // 2 + sum(size * (size - 1) // 2 for size in sizes.values())


def spread_pairs(keeps, length: int, span: int = 0) -> list:
    """Live pairs of every layer when nobody has routed yet: one span of `span` tokens, kept tokens spread evenly.

    Exact without a span (plain causal), and where every token is kept. ValueError for a span longer than the sequence.
    """
    if not 0 <= span <= length:
        raise ValueError(f"a span of {span} tokens does not fit into {length}")
    slots = [capacity(keep, length) for keep in keeps]
    inside = [capacity(span / length, k) for k in slots]
    return [k * (k + 1) // 2 + size * (size - 1) // 2 for k, size in zip(slots, inside)]


def block_flops(config: ModelConfig, n: int, pairs: int) -> dict:
    """Forward of one block over n tokens whose queries meet `pairs` keys."""
    D, d = config.d_model, config.head_width
    qkv, matrices = (config.n_head + 2 * config.n_kv_head) * d, 3 if config.backbone == "emu3" else 2
    return {"projections": 2 * n * D * (qkv + D), "scores": 4 * pairs * D, "mlp": 2 * n * D * config.d_ff * matrices}


def layer_flops(config: ModelConfig, keep: float, length: int, mode: str, pairs: int | None = None) -> dict:
    """One layer: block over K tokens, router and predictor over all T when 0 < keep < 1."""
    parts, slots, passes = dict.fromkeys(PARTS, 0), capacity(keep, length), 3 if mode == "train" else 1
    block = block_flops(config, slots, slots * slots if pairs is None else pairs)
    parts.update({part: passes * count for part, count in block.items()})
    if 0.0 < keep < 1.0:
        D, hidden = config.d_model, config.predictor_hidden
        reached = slots > 0 or hidden == 0                 # does a loss depend on the score?
        parts["router"] = (passes if reached else 1) * 2 * length * D
        first = min(passes, 2)                             # forward, gradient of the weight, none of the input
        parts["predictor"] = first * 2 * length * D * hidden + passes * 2 * length * hidden
    return parts


def count_flops(config: ModelConfig, plan: Plan | None, task: str, length: int, mode: str = "forward",
                pairs: list | None = None) -> Flops:
    """FLOPs of one sequence of `length` tokens. mode "forward" or "train" (forward and backward, optimiser apart).

    pairs: None counts the full n x n attention; one number a layer (live_pairs, spread_pairs) the live part of it.
    ValueError for an unknown mode, a task that the plan lacks, a plan of another depth, a length below 1.
    """
    if mode not in ("forward", "train") or length < 1 or length != int(length):
        raise ValueError('count_flops: mode must be "forward" or "train" and length an integer >= 1, got '
                         f"{mode!r}, {length}")
    length = int(length)                                   # numpy's would overflow
    keeps, pairs = keep_ratios(config, plan, task), [None] * config.n_layer if pairs is None else pairs
    if len(pairs) != config.n_layer:
        raise ValueError(f"count_flops: one number of pairs a layer, got {len(pairs)} for {config.n_layer} layers")
    table = [layer_flops(config, keep, length, mode, n) for keep, n in zip(keeps, pairs)]
    by_part = {part: sum(layer[part] for layer in table) for part in PARTS}
    by_part["head"] = (3 if mode == "train" else 1) * 2 * length * config.d_model * config.vocab_size
    return Flops(sum(by_part.values()), [sum(layer.values()) for layer in table], by_part, table)


def batch_flops(config: ModelConfig, plan: Plan | None, lengths: dict, mode: str = "train", counts: dict | None = None,
                spans: dict | None = None) -> int:
    """FLOPs of a batch with counts[task] sequences of lengths[task] tokens; counts None: one of each task.

    spans None: full n x n attention; {task: tokens of a bidirectional span, or 0}: live, kept tokens spread evenly.
    ValueError for counts that are negative, all zero, or of other tasks than `lengths`.
    """
    counts = dict.fromkeys(lengths, 1) if counts is None else counts
    if set(counts) != set(lengths) or min(counts.values()) < 0 or not any(counts.values()):
        raise ValueError(f"counts must give every task of lengths a number of samples >= 0, and one > 0: got {counts} "
                         f"for {', '.join(lengths)}")
    total = 0
    for task, n in lengths.items():
        pairs = None if spans is None else spread_pairs(keep_ratios(config, plan, task), n, spans[task])
        total += counts[task] * count_flops(config, plan, task, n, mode, pairs).total
    return total


def flops_ratio(config: ModelConfig, plan: Plan, lengths: dict, mode: str = "train", counts: dict | None = None,
                spans: dict | None = None) -> float:
    """FLOPs of the plan over FLOPs of dense, for one sequence of each task in `lengths` (task -> tokens), or for a
    training step of counts[task] sequences each; the arguments of batch_flops."""
    return (batch_flops(config, plan, lengths, mode, counts, spans)
            / batch_flops(config, None, lengths, mode, counts, spans))


def bisect(cost, target: float, low: float, high: float) -> float:
    """The largest x of [low, high] with cost(x) <= target, cost ascending, to 2^-50 of the interval; low if none."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    return low


# --------------------------------------------------------------------------------------------------------------
# python -m unimod_mini.flops
# --------------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser("python -m unimod_mini.flops", description="What a plan costs, by layer and part.")
    out.add_argument("--preset", required=True, help=", ".join(PRESETS))
    out.add_argument("--plan", default="dense", help=f"a file that Plan.save wrote, or {', '.join(BASELINES)}")
    out.add_argument("--length", type=int, required=True, help="tokens of the sequence")
    out.add_argument("--task", choices=TASKS, default="t2i", help="whose keep ratios (t2i)")
    out.add_argument("--mode", choices=("forward", "train"), default="train",
                     help="one forward pass, or a training step of three times as many FLOPs (train)")
    out.add_argument("--span", type=int, default=0, help="of them in a bidirectional span, for the live convention")
    return out


def report(args) -> str:
    """The table by layer and part, then the live convention, parameters and bytes."""
    config, task, n = ModelConfig.preset(args.preset), args.task, args.length
    plan = BASELINES[args.plan](config.n_layer, TASKS) if args.plan in BASELINES else Plan.load(args.plan)
    flops, dense = count_flops(config, plan, task, n, args.mode), count_flops(config, None, task, n, args.mode)
    live = count_flops(config, plan, task, n, args.mode, spread_pairs(plan.keep[task], n, args.span))
    scale, unit = next(pair for pair in ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"), (1, "FLOPs"))
                       if dense.total >= pair[0])
    parts = PARTS[1:-1]                                    # those of a layer

    def line(name, keep: str, counts: list) -> str:
        return f"{name:<9}{keep:>13}" + "".join(f"{'' if x is None else f'{x / scale:.4f}':>13}" for x in counts)

    lines = [f"{args.preset}, {args.plan}, {task}, {n:,} tokens, {args.mode}; {unit}, full n x n attention",
             f"{'layer':<9}{'keep      K':>13}" + "".join(f"{part:>13}" for part in (*parts, "total"))]
    lines += [line(layer, f"{keep:.3f} {capacity(keep, n):>6}", [*(row[part] for part in parts), sum(row.values())])
              for layer, (keep, row) in enumerate(zip(plan.keep[task], flops.table))]
    lines += [line(part, "", [None] * len(parts) + [flops.by_part[part]]) for part in ("embedding", "head")]
    lines += [line("total", "", [*(flops.by_part[part] for part in parts), flops.total]),
              f"over dense: {flops.total / dense.total:.3f}",
              f"live (a span of {args.span} tokens, kept tokens spread evenly): "
              f"scores {live.by_part['scores'] / scale:.4f}, total {live.total / scale:.4f}",
              f"parameters: {count_parameters(config, plan):,} (dense {count_parameters(config):,})"]
    kept = [activation_bytes(config, which, task, n, args.span > 0).total / 1e6 for which in (plan, None)]
    cache = [cache_bytes(config, which, task, n).total / 1e6 for which in (plan, None)]
    return "\n".join([*lines, f"kept for the backward pass, float32: {kept[0]:,.3f} MB (dense {kept[1]:,.3f})",
                      f"cache, float32: {cache[0]:,.3f} MB (dense {cache[1]:,.3f})"])


def main(argv=None) -> None:
    """Prints the report; what cannot be counted ends in one line."""
    with command():
        try:
            print(report(parser().parse_args(argv)))
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename}: {error.strerror}; --plan takes a file or one of "
                             + ", ".join(BASELINES)) from None


if __name__ == "__main__":
    main()
