"""How fast is cached decoding, dense and UniMoD in turns, and how much of the possible speed-up is
reached?

    python benchmarks/decode.py [--quick] [--device cuda] [--out decode.json]

A random Show-o-style model (CPU: width 512, 12 layers, float32; GPU: width 2048, 24 layers, bf16)
and a plan that keeps a quarter of the tokens in every other layer, thresholds calibrated. For each
prompt length and batch: milliseconds a decoding step, median over turns, and bytes of cache.
"allowed" is the speed-up of a roofline timed in the same run: the matrix products of both models
alone (routers and predictors too), at the row counts and cache lengths that the routing really had,
each reading its weights. "reached" is the measured speed-up over the allowed one.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from unimod_mini import Cache, ModelConfig, Plan, UnifiedTransformer, calibrate  # noqa: E402
from unimod_mini.tokenizer import Batch  # noqa: E402
from unimod_mini.atomic_files import write_json  # noqa: E402
from unimod_mini.device import find_device  # noqa: E402

TASK, KEEP, STEPS, TURNS, DISTINCT = "mmu", 0.25, 16, 5, 4
PROMPTS, BATCHES = (64, 256, 1024), (1, 8, 32)


def models(device) -> dict:
    """{"dense": .., "unimod": ..} with the same weights; thresholds calibrated on random
    sequences.
    """
    on_gpu = device.type == "cuda"
    width, layers, vocab = (2048, 24, 58498) if on_gpu else (512, 12, 2048)
    config = ModelConfig("showo", layers, width // 64, width // 64, width, 4 * width, vocab, 2048, image_start=vocab // 2,
                         rope_fraction=0.5, qk_norm=True)
    torch.manual_seed(0)
    dense = UnifiedTransformer(config).to(device, torch.bfloat16 if on_gpu else torch.float32).eval()
    keep = tuple(KEEP if layer % 2 else 1.0 for layer in range(layers))
    unimod = dense.with_plan(Plan({"t2i": keep, TASK: keep})).eval()
    for router in unimod.routers:
        for one in router.values():
            torch.nn.init.normal_(one.score.weight)
    ids = torch.randint(config.vocab_size, (8, 256), device=device)
    calibrate(unimod, {TASK: Batch(ids, None, None, ids)})
    return {"dense": dense, "unimod": unimod}


def prefilled(model, prompt, batch: int, n_new: int) -> Cache:
    """A cache behind `batch` rows, made of the few distinct rows of `prompt` (D, T) again and
    again.
    """
    D, T = prompt.shape
    few = Cache(model, TASK, D, T + n_new)
    for chunk in prompt.split(256, 1):
        model(chunk, task=TASK, routing="causal", cache=few)
    cache = Cache(model, TASK, batch, T + n_new)
    again = torch.arange(batch, device=prompt.device) % D
    counts = [[source.counts[b] for b in again.tolist()] for source in few.layers]
    cache.rewind((few.length, few.n_valid[again], few.n_image[again], few.last_span[again], counts))
    for layer, source in zip(cache.layers, few.layers):
        layer.n_slot = source.n_slot
        layer.k, layer.v, layer.positions = source.k[again], source.v[again], source.positions[again]
    return cache


def decode(model, cache, new, clock=None) -> list:
    """Feed new (B, STEPS) one token at a time.

    Returns for each step, for each layer, [slots of every row routed].
    """
    trace = []
    for step in range(new.shape[1]):
        out = model(new[:, step:step + 1], task=TASK, routing="causal", cache=cache)
        if clock is not None:
            clock()
        else:
            routed = [[True] * len(new) if decision is None else decision.selected[:, 0].tolist() for decision in out.routing]
            trace.append([[n for n, on in zip(layer.counts, rows) if on] for layer, rows in zip(cache.layers, routed)])
    return trace


class Clock:
    """Seconds between calls, one list entry each; synchronises the device."""

    def __init__(self, device):
        self.device, self.seconds, self.last = device, [], None
        self()

    def __call__(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


def products(model, trace, keys, values) -> list:
    """The matrix products of that decoding, a list of calls a step: what no implementation can
    leave out.
    """
    config, steps = model.config, []
    like, d = {"dtype": keys.dtype, "device": keys.device}, config.head_width
    for step in trace:
        calls = []
        for block, routers, slots in zip(model.blocks, model.routers, step):
            if TASK in routers:                            # who is routed is asked of every row
                x, predictor = torch.randn(len(step[0]), config.d_model, **like), routers[TASK].predictor
                hidden = torch.randn(len(x), config.predictor_hidden, **like)
                calls += [(F.linear, x, routers[TASK].score.weight), (F.linear, x, predictor[0].weight),
                          (F.linear, hidden, predictor[2].weight)]
            if not slots:
                continue
            rows, length = len(slots), round(statistics.mean(slots))
            x = torch.randn(rows, config.d_model, **like)
            hidden = torch.randn(rows, config.d_ff, **like)
            q = torch.randn(rows, config.n_head, 1, d, **like)
            k, v = keys[:rows, :, :length], values[:rows, :, :length]
            attention, mlp = block.attention, block.mlp
            wide = [attention.q, attention.k, attention.v, mlp.up, *([] if mlp.gate is None else [mlp.gate])]
            calls += [*((F.linear, x, linear.weight) for linear in wide), (F.scaled_dot_product_attention, q, k, v),
                      (F.linear, x, attention.out.weight), (F.linear, hidden, mlp.down.weight)]
        calls.append((F.linear, torch.randn(len(step[0]), config.d_model, **like), model.head.weight))
        steps.append(calls)
    return steps


def run_products(steps: list, clock) -> None:
    for calls in steps:
        for function, *arguments in calls:
            function(*arguments)
        clock()


def milliseconds(turns: list) -> float:
    """Lists of seconds by step, one list a turn -> ms a step: the median over turns of every
    step, then their mean.
    """
    return 1000 * statistics.mean(statistics.median(times) for times in zip(*turns))


def measure(pair: dict, length: int, batch: int, device) -> dict:
    """One line of the table: medians over TURNS turns of dense, UniMoD and their rooflines."""
    config = pair["dense"].config
    generator = torch.Generator().manual_seed(length + batch)
    prompt, new = (torch.randint(config.vocab_size, shape, generator=generator).to(device)
                   for shape in ((min(batch, DISTINCT), length), (batch, STEPS)))
    shape = (batch, config.n_head, length + STEPS, config.head_width)
    keys, values = (torch.randn(shape, device=device).to(pair["dense"].embed.weight.dtype) for _ in range(2))
    seconds, out = {}, {"prompt": length, "batch": batch}
    caches = {name: prefilled(model, prompt, batch, STEPS) for name, model in pair.items()}
    marks = {name: cache.mark() for name, cache in caches.items()}
    calls = {}
    for name, model in pair.items():  # a warm-up, and the row counts that really occur
        calls[name] = products(model, decode(model, caches[name], new), keys, values)
        out[f"{name}_bytes"], out[f"{name}_used"] = caches[name].nbytes(), caches[name].nbytes(used=True)
    for turn in range(TURNS):
        # now one and now the other first
        for name, model in list(pair.items())[::-1 if turn % 2 else 1]:
            caches[name].rewind(marks[name])
            clock = Clock(device)
            decode(model, caches[name], new, clock)
            seconds.setdefault(name, []).append(clock.seconds)
            clock = Clock(device)
            run_products(calls[name], clock)
            seconds.setdefault(f"{name}_products", []).append(clock.seconds)
    ms = {name: milliseconds(turns) for name, turns in seconds.items()}
    out |= {f"{name}_ms": round(value, 3) for name, value in ms.items()}
    out |= {"speedup": ms["dense"] / ms["unimod"], "allowed": ms["dense_products"] / ms["unimod_products"],
            "tokens_per_second": 1000 * batch / ms["unimod"], "dense_tokens_per_second": 1000 * batch / ms["dense"]}
    out["reached"] = out["speedup"] / out["allowed"]
    return out


def cached_against_recomputed(pair: dict, device, first: int = 192, last: int = 256) -> dict:
    """Milliseconds a token (median) for tokens `first` to `last` of one row, behind a cache and
    by running the whole prefix again.
    """
    ids, out = torch.randint(pair["dense"].config.vocab_size, (1, last), device=device), {}
    for name, model in pair.items():
        cache, clock = prefilled(model, ids[:, :first], 1, last - first), Clock(device)
        decode(model, cache, ids[:, first:], clock)
        for stop in range(first + 1, last + 1):
            model(ids[:, :stop], task=TASK, routing="causal")
            clock()
        cached, again = (1000 * statistics.median(part) for part in (clock.seconds[:last - first],
                                                                     clock.seconds[last - first:]))
        out[name] = {"cached_ms": cached, "recomputed_ms": again, "ratio": again / cached}
    return out


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the smallest sizes only, to see that it runs")
    parser.add_argument("--device", help="cuda or cpu; found by itself when not given")
    parser.add_argument("--out", help="write the figures as JSON to this file")
    args = parser.parse_args()
    device = find_device(args.device)
    pair, rows = models(device), []
    sizes = [(length, batch) for length in PROMPTS for batch in BATCHES][:1 if args.quick else None]
    config = pair["dense"].config
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{device}, {where}, width {config.d_model}, {config.n_layer} layers, {pair['dense'].embed.weight.dtype}, "
          f"keep {KEEP} in every other layer; {STEPS} steps, median of {TURNS} turns")
    print(f"{'prompt':>6}{'batch':>6}{'dense tok/s':>13}{'UniMoD tok/s':>14}{'speed-up':>10}{'allowed':>9}{'reached':>9}"
          f"{'dense MB':>10}{'UniMoD MB':>11}{'used share':>12}")
    for length, batch in tqdm(sizes, unit="size"):
        row = measure(pair, length, batch, device)
        rows.append(row)
        tqdm.write(f"{length:>6}{batch:>6}{row['dense_tokens_per_second']:>13.1f}{row['tokens_per_second']:>14.1f}"
                   f"{row['speedup']:>10.2f}{row['allowed']:>9.2f}{row['reached']:>9.2f}{row['dense_bytes'] / 1e6:>10.1f}"
                   f"{row['unimod_bytes'] / 1e6:>11.1f}{row['unimod_used'] / row['dense_used']:>12.1%}")
    versus = cached_against_recomputed(pair, device)
    for name, value in versus.items():
        print(f"{name}, tokens 193 to 256, batch 1: cached {value['cached_ms']:.1f} ms, recomputed "
              f"{value['recomputed_ms']:.1f} ms a token, {value['ratio']:.1f}x")
    if args.out:
        write_json(args.out, {"device": where, "keep": KEEP, "rows": rows, "cached_against_recomputed": versus})


if __name__ == "__main__":
    main()
