"""What causal routing costs in quality: the same scenes, prompts and random numbers, top-k against causal, in pairs.

    python benchmarks/quality.py out/toy/checkpoint.pt [more checkpoints] [--scenes 2000] [--seed 1000] [--out FILE]
    python benchmarks/quality.py out/toy/checkpoint.pt --labels

For each checkpoint of train_toy.py and each task: free-running accuracy with top-k (non-causal, the yardstick) and with
causal routing, the difference in points with its paired standard error, and how often both judge a scene alike; then
the same for scenes with a colour-shape pair that training never showed. --labels: causal routing with the right task
label against the wrong one, so that the other task's keep ratios, routers and thresholds decide.
"""

import argparse
import re
import sys
from pathlib import Path
from random import Random

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from unimod_mini import Plan, Tokenizer, UnifiedTransformer, World, load_checkpoint  # noqa: E402
from unimod_mini.evaluate import ask_and_judge, draw_and_judge  # noqa: E402
from unimod_mini.files import write_json  # noqa: E402
from unimod_mini.trainer import find_device, precision  # noqa: E402

OTHER = {"t2i": "mmu", "mmu": "t2i"}


def relabelled(model: UnifiedTransformer) -> UnifiedTransformer:
    """The same weights; each task with the other's keep ratios, routers and thresholds."""
    plan = Plan({task: model.plan.keep[OTHER[task]] for task in OTHER}, model.plan.shared_router)
    copy = UnifiedTransformer(model.config, plan).to(next(model.parameters()).device)
    copy.load_state_dict({re.sub("t2i|mmu", lambda task: OTHER[task[0]], name): weight
                          for name, weight in model.state_dict().items()})
    return copy


def paired(first: list, second: list) -> dict:
    """[(category, right)] of the same scenes, twice -> accuracies, difference and its standard error."""
    a, b = ([float(right) for _, right in rows] for rows in (first, second))
    n, differences = len(a), [y - x for x, y in zip(a, b)]
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / max(1, n - 1)
    return {"scenes": n, "first": sum(a) / n, "second": sum(b) / n, "points": 100 * mean,
            "standard_error": 100 * (variance / n) ** 0.5, "alike": sum(d == 0 for d in differences) / n}


def compare(path: str, scenes: int, seed: int, labels: bool, device) -> dict:
    """{"t2i": .., "mmu": .., "t2i held out": .., "mmu held out": ..} of one checkpoint."""
    model, stored = load_checkpoint(path, device)
    pair = ((model, "causal"), (relabelled(model), "causal")) if labels else ((model, "topk"), (model, "causal"))
    tokenizer, world, out = Tokenizer.from_state(stored["tokenizer"]), World(), {}
    if not set(world.words) <= set(tokenizer.text.words):
        sys.exit(f"error: {path} does not know the words of the toy world: it was trained on other pictures")
    for held_out in (False, True):
        rng = Random(f"quality {seed}")
        prompts, _ = world.sample_t2i(scenes, rng, held_out)
        questions, codes = world.sample_mmu(scenes, rng, held_out)
        with tqdm(total=4 * scenes, desc=path, unit="scene", mininterval=1.0) as bar, precision(device):
            drawn = [draw_and_judge(which, tokenizer, world, prompts, bar, routing=rule, **stored["drawing"])
                     for which, rule in pair]
            answered = [ask_and_judge(which, tokenizer, questions, codes, bar, routing=rule) for which, rule in pair]
        for task, rows in (("t2i", drawn), ("mmu", answered)):
            out[task + " held out" * held_out] = paired(*rows)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--scenes", type=int, default=2000, help="of each task")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--labels", action="store_true", help="right against wrong task labels, both causal")
    parser.add_argument("--out", help="write the figures as JSON to this file")
    args = parser.parse_args()
    device, (first, second) = find_device(), ("right", "wrong") if args.labels else ("top-k", "causal")
    if lost := [path for path in args.checkpoints if not Path(path).is_file()]:          # before hours of the others
        parser.error(f"{', '.join(lost)}: no such file")
    results = {path: compare(path, args.scenes, args.seed, args.labels, device) for path in args.checkpoints}
    for path, tasks in results.items():
        print(f"\n{path}\n{'':<14}{'scenes':>8}{first:>9}{second:>9}{'points':>9}{'s.e.':>7}{'alike':>8}")
        for task, row in tasks.items():
            print(f"{task:<14}{row['scenes']:>8}{row['first']:>9.1%}{row['second']:>9.1%}{row['points']:>+9.2f}"
                  f"{row['standard_error']:>7.2f}{row['alike']:>8.1%}")
    if args.out:
        write_json(args.out, results)


if __name__ == "__main__":
    main()
