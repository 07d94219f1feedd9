"""How much of the FLOPs that a plan saves becomes time? Whole training steps of dense and UniMoD,
in turns.

    python benchmarks/step.py [--quick] [--backbone emu3] [--preset showo-1.3b] [--graphs] [--out
    step.json]

A step is that of objectives.train_step: forward, backward, clip, update (torch's fused AdamW, the
same for both), on one batch of random ids. CUDA and CPUs that multiply bf16 run bf16 autocast over
float32 weights, the others float32. The twins have the same weights; UniMoD adds its routers. A
Show-o batch has a bidirectional image span, so its attention is masked.

    time saved      1 - (seconds of a UniMoD step) / (seconds of the dense step beside it), median over the pairs
    realised share  time saved / FLOPs saved; FLOPs of training by unimod_mini.flops, full n x n attention

Intervals are 95 %, by bootstrap over the pairs. Pairs are added until that of the realised share is
narrower than --interval, or --seconds are over; "stopped" says which. MFU counts the plan's own
FLOPs, so skipped tokens as skipped. Attention dropout is off, so that every device has a fused
kernel.

Legend: B batch, T tokens, L layers.
"""

import argparse
import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.growth import counted_equal_at, draw, laws  # noqa: E402
from benchmarks.text_models import TextModel  # noqa: E402
from benchmarks.timing import Step, has_sync, race  # noqa: E402
from unimod_mini import Batch, ModelConfig, Plan, UnifiedTransformer, count_flops, flops_ratio
from unimod_mini.train import cuda_graphs as graphs  # noqa: E402
from unimod_mini.atomic_files import write_json, write_text  # noqa: E402
from unimod_mini.flops import bisect, peak_flops  # noqa: E402
from unimod_mini.flops import activation_bytes  # noqa: E402
from unimod_mini.plan import capacity  # noqa: E402
from unimod_mini.device import find_device, find_precision  # noqa: E402

SAVINGS = (0.15, 0.40, 0.60)
IMAGE = 1026 / 1408  # share of a Show-o sequence that is soi..eoi: 512 pixels, as it was trained
FLOOR, CEILING = 0.1, 0.999        # keeps that a plan may have in its routed layers
LENGTHS = (256, 512, 1024, 2048, 4096)
SIZES = {"width": 384, "layers": 8, "length": 512, "batch": 4, "seconds": 60.0}
QUICK = {"width": 64, "layers": 4, "length": 128, "batch": 2, "seconds": 0.2}


def arguments() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    out.add_argument("--backbone", choices=("showo", "emu3"), help="dialect of the model, showo when not given")
    out.add_argument("--preset", help="the true sizes instead: showo-1.3b or emu3-8b (or a toy)")
    out.add_argument("--width", type=int, help=f"D, {SIZES['width']} when not given; 64 a head, vocabulary 10 D")
    out.add_argument("--layers", type=int, help=f"L, {SIZES['layers']} or the preset's when not given")
    out.add_argument("--length", type=int, help=f"T, {SIZES['length']} when not given")
    out.add_argument("--batch", type=int, help=f"B, {SIZES['batch']} when not given")
    out.add_argument("--task", choices=("t2i", "mmu"), default="t2i")
    out.add_argument("--savings", type=float, nargs="+", default=list(SAVINGS), help="shares of the FLOPs to save")
    out.add_argument("--compile", action="store_true", help="torch.compile both, forward and backward")
    out.add_argument("--graphs", action="store_true", help="CUDA graphs for both, forward and backward")
    out.add_argument("--device", help="cuda, mps or cpu; found by itself when not given")
    out.add_argument("--seconds", type=float, help=f"at most, for each plan; {SIZES['seconds']:.0f} when not given")
    out.add_argument("--interval", type=float, default=0.1, help="stop when that of the realised share is narrower")
    out.add_argument("--quick", action="store_true", help="the smallest sizes, to see that it runs")
    out.add_argument("--grow", nargs="?", const="step.svg", metavar="FILE.svg",
                     help="the table for T = 256 .. 4,096 and several depths, and a plot of it (step.svg)")
    out.add_argument("--against-hf", action="store_true", help="Hugging Face's text model of that shape beside it, too")
    out.add_argument("--unrouted", action="store_true", help="the same blocks on the first tokens of every row, too: "
                     "what a routing that costs nothing would save")
    out.add_argument("--out", help="write the figures as JSON to this file")
    return out


def parse(argv=None) -> argparse.Namespace:
    """The arguments with their sizes filled in. Errors in one line."""
    parser = arguments()
    args = parser.parse_args(argv)
    if args.preset and (args.width or args.backbone):
        parser.error("--preset fixes width and backbone: leave --width and --backbone out")
    for name, value in (QUICK if args.quick else SIZES).items():
        if getattr(args, name) is None and not (args.preset and name in ("width", "layers")):
            setattr(args, name, value)
    if args.compile and args.graphs:
        parser.error("--compile and --graphs: choose one of them")
    if args.graphs and args.against_hf:
        parser.error("--against-hf compares eager or compiled steps: leave --graphs out")
    sizes = [size for size in (args.layers, args.width, args.length, args.batch) if size is not None]
    if min(sizes) < 1 or args.seconds < 0 or args.interval <= 0:
        parser.error("sizes must be at least 1, --seconds at least 0, --interval above 0")
    return args


# What is compared

def make_config(args) -> ModelConfig:
    """The preset, or CPU sizes in the proportions of the true ones, with room for args.length
    tokens.
    """
    if args.preset:
        config = ModelConfig.preset(args.preset)
        return replace(config, n_layer=args.layers or config.n_layer, max_length=max(config.max_length, args.length),
                       attention_dropout=0.0)
    D, heads = args.width, max(1, args.width // 64)
    if args.backbone == "emu3":
        groups = next(g for g in range(max(1, heads // 4), 0, -1) if heads % g == 0)
        return ModelConfig("emu3", args.layers, heads, groups, D, 7 * D // 2, 10 * D, args.length, image_start=8 * D,
                           rope_theta=1e6)
    return ModelConfig("showo", args.layers, heads, heads, D, 4 * D, 10 * D, args.length, image_start=8 * D,
                       rope_fraction=0.5, qk_norm=True)


def plan_for_saving(config: ModelConfig, task: str, length: int, saving: float) -> Plan:
    """One keep for the odd layers, found by bisection on the counted training FLOPs.

    Where the odd layers would keep less than FLOOR: for all but the first; where that is not
    enough: for all. ValueError when even then the plan does not save as much (the head is never
    pruned).
    """
    def plan(keep: float) -> Plan:
        row = tuple(keep if layer in routed else 1.0 for layer in range(config.n_layer))
        return Plan({"t2i": row, "mmu": row})

    def cost(keep: float) -> float:
        return flops_ratio(config, plan(keep), {task: length})

    for first, stride in ((1, 2), (1, 1), (0, 1)):
        routed = range(first, config.n_layer, stride)
        if routed and 0.0 < saving < 1.0 and cost(FLOOR) <= 1 - saving:
            # saves enough; one slot more, too little
            keep = bisect(cost, 1 - saving, FLOOR, CEILING)
            return plan(min(keep, min(keep + 1 / length, CEILING), key=lambda x: abs(cost(x) - (1 - saving))))
    raise ValueError(f"no plan with keeps of {FLOOR} and more saves {saving:.0%} of the training FLOPs of this model")


def image_span(config: ModelConfig, length: int) -> int:
    """Tokens of the bidirectional span."""
    return int(IMAGE * length) if config.backbone == "showo" else 0


def make_batch(config: ModelConfig, task: str, batch: int, length: int, device, text: bool = False) -> Batch:
    """Random ids (B, T), every one a label; Show-o's span at the end for t2i, at the front for mmu.

    text: no span.
    """
    ids = torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    size, spans = image_span(config, length), torch.zeros_like(ids)
    spans[:, length - size if task == "t2i" else 0:length if task == "t2i" else size] = 1
    spans = None if text or size == 0 else spans.to(device)
    return Batch(ids.to(device), spans, None, ids.to(device))


# The table

class Unrouted(UnifiedTransformer):
    """A plan's blocks on the first K tokens of every row: no router, no predictor, no gather, no
    scatter.
    """

    def layer(self, layer: int, x, task: str, context, rule: str, cache=None):
        keep = self.plan.keep[task][layer]
        if keep in (0.0, 1.0):
            return super().layer(layer, x, task, context, rule, cache)
        K = capacity(keep, x.shape[1])
        mask = None if context.mask is None else context.mask[:, :, :K, :K]
        update = self.blocks[layer](x[:, :K], context.rope[:, :K], mask)  # (B, K, D)
        return torch.cat((x[:, :K] + update, x[:, K:]), dim=1), None


def unrouted_saving(config: ModelConfig, plan: Plan, task: str, length: int) -> float:
    """Training FLOPs that Unrouted saves: the plan's, and those of its routers and predictors."""
    dense, routed = (count_flops(config, which, task, length, "train") for which in (None, plan))
    return 1 - (routed.total - routed.by_part["router"] - routed.by_part["predictor"]) / dense.total


def costs(config: ModelConfig, plan: Plan | None, name: str, row: dict, peak: float | None) -> dict:
    """Tokens a second, MFU and, where no peak was measured, the bytes of activations of one
    twin.
    """
    T, B, task, seconds = row["length"], row["batch"], row["task"], row[f"{name}_ms"] / 1000
    work = B * count_flops(config, plan, task, T, "train").total
    kept = B * activation_bytes(config, plan, task, T, spans=image_span(config, T) > 0).total
    return {f"{name}_tokens_per_second": B * T / seconds, f"{name}_flops": work,
            f"{name}_mfu": work / seconds / peak if peak else None, f"{name}_activation_bytes": kept}


def measure(config: ModelConfig, plans: list, args, length: int, batch: int, device) -> list:
    """One line for each saving: dense and UniMoD in turns."""
    batches = {args.task: make_batch(config, args.task, batch, length, device)}
    how = {"compiled": args.compile, "graphs": args.graphs}
    dense, rows = Step(lambda: UnifiedTransformer(config), batches, device, **how), []
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    for saving, plan in zip(args.savings, plans):
        unimod = Step(lambda: dense.model.with_plan(plan), batches, device, **how)
        lengths, span = {args.task: length}, {args.task: image_span(config, length)}
        routed = [layer for layer in range(config.n_layer) if plan.keep[args.task][layer] < 1]
        row = {"saving": saving, "task": args.task, "layers": config.n_layer, "length": length, "batch": batch,
               "keep": plan.keep[args.task][routed[0]], "routed_layers": routed,
               "flops_saved_live": 1 - flops_ratio(config, plan, lengths, spans=span)}
        row |= race(dense, unimod, 1 - flops_ratio(config, plan, lengths), args.seconds, args.interval)
        row |= costs(config, None, "dense", row, peak) | costs(config, plan, "unimod", row, peak)
        row |= {"dense_peak_bytes": dense.peak, "unimod_peak_bytes": unimod.peak,
                "step_has_sync": has_sync(unimod) if device.type == "cuda" else None}
        rows.append(row)
        print(line(row), flush=True)
        del unimod  # its memory is free before the next one is built
        if args.unrouted:
            free = Step(lambda: Unrouted(config, plan), batches, device, **how)
            other = row["unrouted"] = race(dense, free, unrouted_saving(config, plan, args.task, length), args.seconds,
                                           args.interval)
            low, high = other["time_saved_interval"]
            print(f"{'':>15}without routing: {other['flops_saved']:.1%} of the FLOPs, time saved "
                  f"{other['time_saved']:.1%} [{low:.1%},{high:.1%}], {other['pairs']} pairs", flush=True)
    return rows


HEADER = (f"{'L':>3}{'T':>6}{'B':>4}{'keep':>7}{'FLOPs':>8}{'dense ms':>11}{'UniMoD ms':>11}{'time saved':>19}"
          f"{'realised share':>22}{'pairs':>6}{'tokens/s':>16}{'MB':>16}{'MFU':>12}")


def line(row: dict) -> str:
    """A row as text: dense / UniMoD in the last three columns."""
    low, high = row["time_saved_interval"]
    below, above = row["realised_interval"]
    which = "peak" if row["dense_peak_bytes"] else "activation"
    two = [f"{row['dense_tokens_per_second']:.0f}/{row['unimod_tokens_per_second']:.0f}",
           f"{row[f'dense_{which}_bytes'] / 1e6:.0f}/{row[f'unimod_{which}_bytes'] / 1e6:.0f}",
           f"{row['dense_mfu']:.0%}/{row['unimod_mfu']:.0%}" if row["dense_mfu"] else "n/a"]
    return (f"{row['layers']:>3}{row['length']:>6}{row['batch']:>4}{row['keep']:>7.3f}{row['flops_saved']:>8.1%}"
            f"{row['dense_ms']:>11.2f}{row['unimod_ms']:>11.2f}{row['time_saved']:>7.1%}{f'[{low:.1%},{high:.1%}]':>15}"
            f"{row['realised']:>7.2f}{f'[{below:.2f},{above:.2f}]':>15}{row['pairs']:>6}{two[0]:>16}{two[1]:>16}"
            f"{two[2]:>12}")


def against_hf(config: ModelConfig, args, device) -> dict:
    """Our dense step and that of Hugging Face's text model: causal attention, no spans,
    everything else the same.
    """
    batches = {args.task: make_batch(config, args.task, args.batch, args.length, device, text=True)}
    theirs = Step(lambda: TextModel(config), batches, device, args.compile, fullgraph=False)
    ours = Step(lambda: UnifiedTransformer(config), batches, device, args.compile)
    row = race(theirs, ours, 1.0, args.seconds, args.interval)
    low, high = row["time_saved_interval"]
    print(f"against {theirs.model.name}, causal text: theirs {row['dense_ms']:.2f} ms, ours (dense) "
          f"{row['unimod_ms']:.2f} ms, time saved {row['time_saved']:.1%} [{low:.1%},{high:.1%}], {row['pairs']} pairs")
    return {"name": theirs.model.name, "hf_ms": row["dense_ms"], "ours_ms": row["unimod_ms"], "pairs": row["pairs"],
            "time_saved": row["time_saved"], "time_saved_interval": row["time_saved_interval"]}


def jobs(args, config: ModelConfig) -> list:
    """[(config, plans, T, B)]: the size asked for, or with --grow every length, about as many
    tokens a step, and depth.

    All plans are made before anything is timed: a saving out of reach is an error at once.
    """
    L, tokens, sizes = config.n_layer, args.batch * args.length, [(config.n_layer, args.length, args.batch)]
    if args.grow:
        lengths = sorted({args.length, *(LENGTHS if not args.quick else (64, 256))})
        depths = sorted({max(2, L // 4), max(2, L // 2)} - {L})
        sizes = [(L, T, max(1, tokens // T)) for T in lengths] + [(depth, args.length, args.batch) for depth in depths]
    out = []
    for depth, T, B in sizes:
        sized = replace(config, n_layer=depth, max_length=max(T, config.max_length))
        out.append((sized, [plan_for_saving(sized, args.task, T, saving) for saving in args.savings], T, B))
    return out


def where(args, device) -> dict:
    """What the figures depend on besides the sizes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return {"device": device.type, "hardware": name, "torch": torch.__version__, "preset": args.preset,
            "dtype": find_precision("auto", device), "compile": args.compile, "graphs": args.graphs,
            "optimizer": "AdamW, fused", "interval": args.interval, "seconds": args.seconds,
            "memory": ("peak, measured" if device.type == "cuda" and not args.graphs else
                       "activations of a batch, closed form, float32")}


def main(argv=None) -> dict:
    args = parse(argv)
    device = find_device(args.device)
    if args.graphs:
        graphs.check_device(device)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # --compile: one graph for each model of this process
    config = make_config(args)
    todo = jobs(args, config)
    out = where(args, device) | {"backbone": config.backbone, "width": config.d_model, "rows": []}
    how = ", compiled" * args.compile + ", CUDA graphs" * args.graphs
    print(f"{device}, {out['hardware']}, torch {out['torch']}, {out['dtype']}{how}; "
          f"{config.backbone}, width {config.d_model}, {args.task}\nMB: {out['memory']}. Two figures: dense/UniMoD. "
          f"[95 % interval]. FLOPs: saved by count, full n x n attention\n{HEADER}")
    for sized, plans, T, B in todo:
        out["rows"] += measure(sized, plans, args, T, B, device)
    if device.type == "cuda":
        print("a step waits for the device:", any(row["step_has_sync"] for row in out["rows"]))
    if args.grow:
        out["laws"] = laws(out["rows"], config.n_layer, args.length)
        out["laws"]["counted_equal_at"] = counted_equal_at(out["rows"], config.n_layer)
        write_text(args.grow, draw(out["laws"]))
        timed, counted = out["laws"]["length"]["dense"]["equal_at"] or float("inf"), out["laws"]["counted_equal_at"]
        print(f"{args.grow} written; the T and the T^2 part of dense are equal at T = {timed:,.0f} by time, "
              f"{counted:,.0f} by counted FLOPs")
    if args.against_hf:
        out["hf"] = against_hf(config, args, device)
    if args.out:
        write_json(args.out, out)
    return out


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        try:
            main()
        except (ValueError, OSError, ImportError) as error:
            sys.exit(f"error: {error}")
