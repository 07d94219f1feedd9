"""What a plan costs: FLOPs, parameters and bytes, from sizes and lengths alone. No model is built.

FLOPs of a forward or a training step: a multiply-add counts 2, and only matrix products count. A
routed layer costs its K = floor(keep T + 1/2) slots, its router and predictor all T tokens. Two
conventions for the scores of attention, and every figure must say which:

    full    all n x n pairs, whatever the mask hides: a kernel without knowledge of the mask
    live    the pairs that the mask lets through, no padding: what a perfect kernel would compute

The backward pass costs twice the forward, with two exceptions. The predictor's first layer needs no
gradient of its detached input; and a router without a slot (K = 0) gets no gradient, unless the
membership loss is its own. Norms, gate, gather, scatter and the optimizer are no matrix products: a
FLOP saved here is not yet a second saved.

Legend: T tokens, K slots, D width, d head width, H heads, G key/value heads, F, h hidden widths of
MLP and predictor, V vocabulary.
"""

import argparse
from collections import Counter
from typing import NamedTuple

from .config import PRESETS, ModelConfig
from .console import command
from .plan import BASELINES, TASKS, Plan, capacity

# embedding: a look-up, 0 FLOPs
PARTS = ("embedding", "projections", "scores", "mlp", "router", "predictor", "head")
# bf16 FLOPs a second, dense; H100 and H200 as SXM modules
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
FLOAT, INDEX = 4, 8                # bytes of a float32 and of an index


class Flops(NamedTuple):
    total: int
    by_layer: list     # one int a layer, head apart
    by_part: dict      # PARTS -> int
    table: list        # one dict PARTS -> int a layer, head apart


class Bytes(NamedTuple):
    total: int
    by_layer: list     # one int a layer


def peak_flops(name: str) -> float | None:
    """bf16 FLOPs a second of a CUDA device by its name, None where the table does not know it."""
    words = set(name.replace("-", " ").split())
    slower = {"H100", "H200"} & words and {"PCIe", "NVL"} & words
    if "MIG" in words or slower:                           # a part of a device; no SXM module
        return None
    known = [peak for word, peak in PEAKS.items() if word in words]
    return known[0] if known else None


def keep_ratios(config: ModelConfig, plan: Plan | None, task: str) -> tuple:
    """The keep of every layer; plan None: dense.

    ValueError for a task that the plan lacks, a plan of another depth.
    """
    if plan is None:
        return (1.0,) * config.n_layer
    if task not in plan.tasks or plan.n_layer != config.n_layer:
        raise ValueError(f"the plan has tasks {plan.tasks} and {plan.n_layer} layers, asked for "
                         f"{task!r} and {config.n_layer}")
    return plan.keep[task]


# --- Pairs of attention ---

def live_pairs(length: int, spans=None, valid=None, indices=None) -> int:
    """Pairs (query, key) of one row that the mask lets through, in a layer that keeps `indices`.

    spans and valid (T,), indices (K,) distinct token numbers: lists or tensors; None: no span, no
    padding, every token. Positions count the valid tokens. Of m tokens, m_s of them in span s:

        m (m + 1) / 2  causal pairs  +  m_s (m_s - 1) / 2  that look ahead inside of each span
    """
    kept = [int(i) for i in (range(length) if indices is None else indices)]
    if valid is not None:
        kept = [i for i in kept if valid[i]]
    m, ahead = len(kept), 0
    if spans is not None:
        sizes = Counter(int(spans[i]) for i in kept if spans[i])
        ahead = sum(size * (size - 1) // 2 for size in sizes.values())
    return m * (m + 1) // 2 + ahead


def spread_pairs(keeps, length: int, span: int = 0) -> list:
    """Live pairs of every layer before anybody has routed: kept tokens are spread evenly.

    span: tokens of the one span. Exact without a span, and where every token is kept. ValueError
    for a span longer than the sequence.
    """
    if not 0 <= span <= length:
        raise ValueError(f"a span of {span} tokens does not fit into {length}")
    pairs = []
    for keep in keeps:
        k = capacity(keep, length)
        inside = capacity(span / length, k)
        pairs.append(k * (k + 1) // 2 + inside * (inside - 1) // 2)
    return pairs


# --- FLOPs ---

def block_flops(config: ModelConfig, n: int, pairs: int) -> dict:
    """Forward of one block over n tokens whose queries meet `pairs` keys."""
    D, F = config.d_model, config.d_ff
    qkv = (config.n_head + 2 * config.n_kv_head) * config.head_width
    matrices = 3 if config.backbone == "emu3" else 2       # SwiGLU, GELU
    return {"projections": 2 * n * D * (qkv + D), "scores": 4 * pairs * D,
            "mlp": 2 * n * D * F * matrices}


def layer_flops(config: ModelConfig, keep: float, length: int, mode: str,
                pairs: int | None = None) -> dict:
    """One layer: block over K tokens, router and predictor over all T when 0 < keep < 1."""
    K, D, h = capacity(keep, length), config.d_model, config.predictor_hidden
    passes = 3 if mode == "train" else 1
    parts = dict.fromkeys(PARTS, 0)
    for part, count in block_flops(config, K, K * K if pairs is None else pairs).items():
        parts[part] = passes * count
    if 0.0 < keep < 1.0:
        has_gradient = K > 0 or h == 0                     # does a loss depend on the score?
        parts["router"] = (passes if has_gradient else 1) * 2 * length * D
        first = min(passes, 2)                             # no gradient of the input
        parts["predictor"] = first * 2 * length * D * h + passes * 2 * length * h
    return parts


def count_flops(config: ModelConfig, plan: Plan | None, task: str, length: int,
                mode: str = "forward", pairs: list | None = None) -> Flops:
    """FLOPs of one sequence of `length` tokens.

    mode: "forward" or "train" (forward and backward, optimizer apart). pairs: None counts the full
    n x n attention; one number a layer (live_pairs, spread_pairs) the live part of it. ValueError
    for an unknown mode, a task that the plan lacks, a plan of another depth, a length below 1.
    """
    if mode not in ("forward", "train") or length < 1 or length != int(length):
        raise ValueError('count_flops: mode must be "forward" or "train" and length an integer '
                         f">= 1, got {mode!r}, {length}")
    length, keeps = int(length), keep_ratios(config, plan, task)       # numpy's would overflow
    if pairs is None:
        pairs = [None] * config.n_layer
    if len(pairs) != config.n_layer:
        raise ValueError(f"count_flops: one number of pairs a layer, got {len(pairs)} for "
                         f"{config.n_layer} layers")
    table = [layer_flops(config, keep, length, mode, n) for keep, n in zip(keeps, pairs)]
    by_part = {part: sum(layer[part] for layer in table) for part in PARTS}
    passes = 3 if mode == "train" else 1
    by_part["head"] = passes * 2 * length * config.d_model * config.vocab_size
    by_layer = [sum(layer.values()) for layer in table]
    return Flops(sum(by_part.values()), by_layer, by_part, table)


def batch_flops(config: ModelConfig, plan: Plan | None, lengths: dict, mode: str = "train",
                counts: dict | None = None, spans: dict | None = None) -> int:
    """FLOPs of a batch with counts[task] sequences (None: one) of lengths[task] tokens.

    spans None: full n x n attention; {task: tokens of its span, or 0}: live, kept tokens spread
    evenly. ValueError for counts that are negative, all zero, or of other tasks than `lengths`.
    """
    if counts is None:
        counts = dict.fromkeys(lengths, 1)
    if set(counts) != set(lengths) or min(counts.values()) < 0 or not any(counts.values()):
        raise ValueError("counts must give every task of lengths a number of samples >= 0, and one "
                         f"> 0: got {counts} for {', '.join(lengths)}")
    total = 0
    for task, n in lengths.items():
        pairs = None
        if spans is not None:
            pairs = spread_pairs(keep_ratios(config, plan, task), n, spans[task])
        total += counts[task] * count_flops(config, plan, task, n, mode, pairs).total
    return total


def flops_ratio(config: ModelConfig, plan: Plan, lengths: dict, mode: str = "train",
                counts: dict | None = None, spans: dict | None = None) -> float:
    """FLOPs of the plan over FLOPs of dense; the arguments of batch_flops."""
    of_plan = batch_flops(config, plan, lengths, mode, counts, spans)
    return of_plan / batch_flops(config, None, lengths, mode, counts, spans)


def bisect(cost, target: float, low: float, high: float) -> float:
    """The largest x of [low, high] with cost(x) <= target, to 2^-50 of the interval; low if none.

    cost ascends with x.
    """
    for _ in range(50):
        middle = (low + high) / 2
        if cost(middle) <= target:
            low = middle
        else:
            high = middle
    return low


# --- Parameters ---

def count_parameters(config: ModelConfig, plan: Plan | None = None) -> int:
    """Numbers that training moves, routers and predictors of the plan included."""
    D, F, V, h, d = (config.d_model, config.d_ff, config.vocab_size, config.predictor_hidden,
                     config.head_width)
    qkv, showo = (config.n_head + 2 * config.n_kv_head) * d, config.backbone == "showo"
    block = D * qkv + D * D + (2 if showo else 3) * D * F + 2 * D
    if config.qk_norm:
        block += 4 * d
    if showo:
        block += qkv + D + F + D                           # biases of the four matrices
    ends = V * D + config.image_positions * D + D + V * D  # embeddings, last norm, head
    if showo:
        ends += D + V                                      # their biases
    return config.n_layer * block + ends + count_routers(plan) * router_parameters(D, h)


def count_routers(plan: Plan | None) -> int:
    if plan is None:
        return 0
    tasks = [len(plan.routed(layer)) for layer in range(plan.n_layer)]
    return sum(min(n, 1) if plan.shared_router else n for n in tasks)


def router_parameters(D: int, h: int) -> int:
    predictor = D * h + h + h + 1 if h else 0
    return D + 1 + predictor


# --- Bytes ---
# What autograd holds after a forward in float32 on a CPU (checked with torch 2.13; fused norms of a
# GPU keep less), each storage once, ids included, parameters, logits and loss apart; eager mode, no
# autocast, no dropout. Attention is the fused kernel: no n x n scores, but a mask in every layer.
# In floats, of n tokens:
#
#   norm           LayerNorm: input D, output D, 2 statistics; RMSNorm: 3 D (with its factors), 1
#   QK norm        queries and keys before it (H + G) d, 2 (H + G) statistics
#   attention      rotated queries and keys (H + G) d, values G d, output D, log-sum-exp H, mask n
#   MLP            before and after GELU 2 F; SwiGLU 4 F: gate and up, silu(gate), their product
#   routed layer   x itself T D, scores T, predictor 2 T h; u K D, gates

def block_bytes(config: ModelConfig, n: int, masked: bool) -> int:
    """Bytes kept by one block over n tokens, its input included, the rotary angles apart."""
    D, d, H, G = config.d_model, config.head_width, config.n_head, config.n_kv_head
    attention = (H + 2 * G) * d + D + H
    if config.qk_norm:
        attention += (H + G) * (d + 2)
    if masked:
        attention += n
    if config.backbone == "showo":
        others = 2 * D + 2 + 2 * config.d_ff               # one norm, GELU
    else:
        others = 2 * (3 * D + 1) + 4 * config.d_ff         # two norms, SwiGLU
    return FLOAT * n * (attention + others)


def layer_bytes(config: ModelConfig, keep: float, T: int, spans: bool, padded: bool) -> int:
    """Bytes kept by one layer."""
    if keep == 0.0:
        return 0
    if keep == 1.0:
        return block_bytes(config, T, spans or padded)
    K, D = capacity(keep, T), config.d_model
    predictor = FLOAT * 2 * T * config.predictor_hidden
    if K == 0:                                             # x is counted in the next layer
        return predictor
    scores = FLOAT * (T * D + T)                           # x, and r, from which K are gathered
    gate = FLOAT * K * (D + 1 + (config.gate != "linear"))  # u, g, and tanh or sigmoid
    # slots (with padding a view of all T), their places in the batch, which of them are live
    indices = INDEX * ((T if padded else K) + K) + (K if padded else 0)
    angles = FLOAT * K * 2 * config.rope_dims
    return scores + predictor + gate + indices + angles + block_bytes(config, K, spans)


def activation_bytes(config: ModelConfig, plan: Plan | None, task: str, length: int,
                     spans: bool = False, padded: bool = False) -> Bytes:
    """What one sequence keeps for its backward pass.

    spans, padded: does the call give spans, validity? A dense layer has an n x n mask with either,
    a routed one with spans alone: sorted tokens are causal.
    """
    keeps = keep_ratios(config, plan, task)
    layers = [layer_bytes(config, keep, length, spans, padded) for keep in keeps]
    D = config.d_model
    final_norm = FLOAT * length * (2 * D + 2 if config.backbone == "showo" else 3 * D + 1)
    total = sum(layers) + INDEX * length + final_norm      # and the ids
    if config.image_positions:
        total += length * (INDEX + 1)                      # positions, and which are images
    if 1.0 in keeps:                                       # angles, one tensor for all dense layers
        total += FLOAT * length * 2 * config.rope_dims
    return Bytes(total, layers)


def cache_bytes(config: ModelConfig, plan: Plan | None, task: str, length: int,
                element: int = FLOAT, routed: list | None = None) -> Bytes:
    """The cache of one row: (2 G d) x element + 4 bytes for each token that a layer routed.

    Keys, values and positions. routed: tokens that each layer kept, by default the plan's K.
    element: 4 for float32, 2 for bfloat16. Cache.nbytes(used=True) is the same count; more is
    allocated, in advance.
    """
    if routed is None:
        routed = [capacity(keep, length) for keep in keep_ratios(config, plan, task)]
    token = 2 * config.n_kv_head * config.head_width * element + 4
    return Bytes(token * sum(routed), [token * n for n in routed])


# --- python -m unimod_mini.flops ---

def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser("python -m unimod_mini.flops",
                                  description="What a plan costs, by layer and part.")
    add = cli.add_argument
    add("--preset", required=True, help=", ".join(PRESETS))
    add("--plan", default="dense",
        help=f"a file that Plan.save wrote, or {', '.join(BASELINES)}")
    add("--length", type=int, required=True, help="tokens of the sequence")
    add("--task", choices=TASKS, default="t2i", help="whose keep ratios (t2i)")
    add("--mode", choices=("forward", "train"), default="train",
        help="one forward pass, or a training step of three times as many FLOPs (train)")
    add("--span", type=int, default=0,
        help="of them in a bidirectional span, for the live convention")
    return cli


def unit_for(flops: int) -> tuple:
    """(1e12, "TFLOPs") or smaller."""
    for scale, name in ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs")):
        if flops >= scale:
            return scale, name
    return 1, "FLOPs"


def report(args) -> str:
    """The table by layer and part, then the live convention, parameters and bytes."""
    config, task, n, mode = ModelConfig.preset(args.preset), args.task, args.length, args.mode
    if args.plan in BASELINES:
        plan = BASELINES[args.plan](config.n_layer, TASKS)
    else:
        plan = Plan.load(args.plan)
    flops = count_flops(config, plan, task, n, mode)
    dense = count_flops(config, None, task, n, mode)
    live = count_flops(config, plan, task, n, mode, spread_pairs(plan.keep[task], n, args.span))
    scale, unit = unit_for(dense.total)
    parts = PARTS[1:-1]                                    # those of a layer

    def line(name, keep: str, counts: list) -> str:
        text = f"{name:<9}{keep:>13}"
        for count in counts:
            number = "" if count is None else f"{count / scale:.4f}"
            text += f"{number:>13}"
        return text

    header = "".join(f"{part:>13}" for part in (*parts, "total"))
    lines = [f"{args.preset}, {args.plan}, {task}, {n:,} tokens, {mode}; {unit}, full n x n "
             "attention", f"{'layer':<9}{'keep      K':>13}{header}"]
    for layer, (keep, row) in enumerate(zip(plan.keep[task], flops.table)):
        counts = [row[part] for part in parts]
        lines.append(line(layer, f"{keep:.3f} {capacity(keep, n):>6}", [*counts, sum(counts)]))
    for part in ("embedding", "head"):
        lines.append(line(part, "", [None] * len(parts) + [flops.by_part[part]]))
    lines.append(line("total", "", [flops.by_part[part] for part in parts] + [flops.total]))
    kept, cache = [], []
    for which in (plan, None):
        kept.append(activation_bytes(config, which, task, n, args.span > 0).total / 1e6)
        cache.append(cache_bytes(config, which, task, n).total / 1e6)
    lines += [
        f"over dense: {flops.total / dense.total:.3f}",
        f"live (a span of {args.span} tokens, kept tokens spread evenly): scores "
        f"{live.by_part['scores'] / scale:.4f}, total {live.total / scale:.4f}",
        f"parameters: {count_parameters(config, plan):,} (dense {count_parameters(config):,})",
        f"kept for the backward pass, float32: {kept[0]:,.3f} MB (dense {kept[1]:,.3f})",
        f"cache, float32: {cache[0]:,.3f} MB (dense {cache[1]:,.3f})"]
    return "\n".join(lines)


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
