"""What causal routing costs in quality: the same scenes, prompts and random numbers, top-k against causal, in pairs.

    python benchmarks/quality.py out/toy/checkpoint.pt [more checkpoints] [--scenes 2000] [--seed 1000] [--out FILE]

For each checkpoint of train_toy.py and each task: free-running accuracy with top-k (non-causal, the yardstick) and with
causal routing, the difference in points with its paired standard error, and how often both judge a scene alike; then
the same for scenes with a colour-shape pair that training never showed.
"""

import argparse
import json
import sys
from pathlib import Path
from random import Random

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from unimod_mini import Tokenizer, World, load_checkpoint  # noqa: E402
from unimod_mini.evaluate import ask_and_judge, draw_and_judge  # noqa: E402
from unimod_mini.files import whole_file  # noqa: E402
from unimod_mini.trainer import find_device, precision  # noqa: E402

RULES = ("topk", "causal")


def paired(topk: list, causal: list) -> dict:
    """[(category, right)] of the same scenes under both rules -> accuracies, difference and its standard error."""
    a, b = ([float(right) for _, right in rows] for rows in (topk, causal))
    n, differences = len(a), [y - x for x, y in zip(a, b)]
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / max(1, n - 1)
    return {"scenes": n, "topk": sum(a) / n, "causal": sum(b) / n, "points": 100 * mean,
            "standard_error": 100 * (variance / n) ** 0.5, "alike": sum(d == 0 for d in differences) / n}


def compare(path: str, scenes: int, seed: int, device) -> dict:
    """{"t2i": .., "mmu": .., "t2i held out": .., "mmu held out": ..} of one checkpoint."""
    model, stored = load_checkpoint(path, device)
    tokenizer, world, out = Tokenizer.from_state(stored["tokenizer"]), World(), {}
    if not set(world.words) <= set(tokenizer.text.words):
        sys.exit(f"error: {path} does not know the words of the toy world: it was trained on other pictures")
    for held_out in (False, True):
        rng = Random(f"quality {seed}")
        prompts, _ = world.sample_t2i(scenes, rng, held_out)
        questions, codes = world.sample_mmu(scenes, rng, held_out)
        with tqdm(total=4 * scenes, desc=path, unit="scene", mininterval=1.0) as bar, precision(device):
            drawn = [draw_and_judge(model, tokenizer, world, prompts, bar, routing=rule, **stored["drawing"])
                     for rule in RULES]
            answered = [ask_and_judge(model, tokenizer, questions, codes, bar, routing=rule) for rule in RULES]
        for task, rows in (("t2i", drawn), ("mmu", answered)):
            out[task + " held out" * held_out] = paired(*rows)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--scenes", type=int, default=2000, help="of each task")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", help="write the figures as JSON to this file")
    args = parser.parse_args()
    device = find_device()
    results = {path: compare(path, args.scenes, args.seed, device) for path in args.checkpoints}
    for path, tasks in results.items():
        print(f"\n{path}\n{'':<14}{'scenes':>8}{'top-k':>9}{'causal':>9}{'points':>9}{'s.e.':>7}{'alike':>8}")
        for task, row in tasks.items():
            print(f"{task:<14}{row['scenes']:>8}{row['topk']:>9.1%}{row['causal']:>9.1%}{row['points']:>+9.2f}"
                  f"{row['standard_error']:>7.2f}{row['alike']:>8.1%}")
    if args.out:
        with whole_file(args.out) as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
