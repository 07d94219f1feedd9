"""What causal routing costs in quality: the same scenes, prompts and random numbers, top-k against
causal, in pairs.

    python benchmarks/quality.py out/toy/checkpoint.pt [more checkpoints] [--scenes 2000] [--seed
    1000] [--out FILE] python benchmarks/quality.py out/toy/checkpoint.pt --labels python
    benchmarks/quality.py out/toy/checkpoint.pt --trained-with 0

For each checkpoint of train_toy.py and each task: free-running accuracy with top-k (non-causal, the
yardstick) and with causal routing, the difference in points with its paired standard error, and how
often both judge a scene alike; then the same for scenes with a colour-shape pair that training
never showed. --labels: causal routing with the right task label against the wrong one, so that the
other task's keep ratios, routers and thresholds decide. --trained-with: the seed of the run, whose
training data is made again (of the default number of steps): causal accuracy on the captions,
pictures and pairs of picture and question that occur there, and on those that do not.
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path
from random import Random

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_toy as toy  # noqa: E402
from unimod_mini import Plan, Tokenizer, UnifiedTransformer, World, load_checkpoint  # noqa: E402
from unimod_mini.evaluate import ask_and_judge, draw_and_judge, fresh_scenes  # noqa: E402
from unimod_mini.atomic_files import write_json  # noqa: E402
from unimod_mini.device import find_device  # noqa: E402

OTHER = {"t2i": "mmu", "mmu": "t2i"}


def relabelled(model: UnifiedTransformer) -> UnifiedTransformer:
    """The same weights; each task with the other's keep ratios, routers and thresholds."""
    plan = Plan({task: model.plan.keep[OTHER[task]] for task in OTHER}, model.plan.shared_router)
    copy = UnifiedTransformer(model.config, plan).to(next(model.parameters()).device)
    copy.load_state_dict({re.sub("t2i|mmu", lambda task: OTHER[task[0]], name): weight
                          for name, weight in model.state_dict().items()})
    return copy


def paired(first: list, second: list) -> dict:
    """[(category, right)] of the same scenes, twice -> accuracies, difference and its standard
    error.
    """
    a, b = ([float(right) for _, right in rows] for rows in (first, second))
    n, differences = len(a), [y - x for x, y in zip(a, b)]
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / max(1, n - 1)
    return {"scenes": n, "first": sum(a) / n, "second": sum(b) / n, "points": 100 * mean,
            "standard_error": 100 * (variance / n) ** 0.5, "alike": sum(d == 0 for d in differences) / n}


def load_toy(path: str, device) -> tuple:
    """(model, tokenizer, how it draws) of a checkpoint that knows the toy world."""
    model, stored = load_checkpoint(path, device)
    tokenizer = Tokenizer.from_state(stored["tokenizer"])
    if not set(World().words) <= set(tokenizer.text.words):
        sys.exit(f"error: {path} does not know the words of the toy world: it was trained on other pictures")
    return model, tokenizer, stored["drawing"]


def compare(path: str, scenes: int, seed: int, labels: bool, device) -> dict:
    """{"t2i": .., "mmu": .., "t2i held out": .., "mmu held out": ..} of one checkpoint."""
    (model, tokenizer, drawing), world, out = load_toy(path, device), World(), {}
    pair = ((model, "causal"), (relabelled(model), "causal")) if labels else ((model, "topk"), (model, "causal"))
    for held_out in (False, True):
        prompts, questions, codes = fresh_scenes(world, scenes, Random(f"quality {seed}"), held_out)
        with tqdm(total=4 * scenes, desc=path, unit="scene", mininterval=1.0) as bar:
            drawn = [draw_and_judge(which, tokenizer, world, prompts, bar, routing=rule, **drawing)
                     for which, rule in pair]
            answered = [ask_and_judge(which, tokenizer, questions, codes, bar, routing=rule) for which, rule in pair]
        for task, rows in (("t2i", drawn), ("mmu", answered)):
            out[task + " held out" * held_out] = paired(*rows)
    return out


class Recorder(World):
    """The toy world, which remembers what it has given to training: captions, pictures, pictures
    with a question.
    """

    def __init__(self):
        super().__init__()
        self.captions, self.pictures, self.asked = set(), set(), set()

    def sample_prompts(self, *args):
        prompts, codes = super().sample_prompts(*args)
        self.captions.update(prompt.text for prompt in prompts)
        self.pictures.update(map(tuple, codes.flatten(1).tolist()))
        return prompts, codes

    def sample_dialogues(self, *args):
        dialogues, codes = super().sample_dialogues(*args)
        pictures = list(map(tuple, codes.flatten(1).tolist()))
        self.pictures.update(pictures)
        self.asked.update((picture, turn[0]) for picture, turns in zip(pictures, dialogues) for turn in turns)
        return dialogues, codes


def training_data(tokenizer: Tokenizer, seed: int) -> Recorder:
    """What `train_toy.py --seed` trains on, both phases."""
    setting, world = toy.SETTINGS[tokenizer.backbone], Recorder()
    sampler, steps = toy.Sampler(world, tokenizer, seed, setting["t2i"], setting["mmu"]), setting["steps"]
    for step in tqdm(range(steps + max(1, steps // 2)), desc="training data", unit="step", mininterval=1.0):
        if step == steps:  # ARank's samples, between the phases: nothing learns from them
            sampler.world = World()
            sampler(20, 50)
            sampler.world = world
        sampler()
    return world


def novelty(path: str, scenes: int, seed: int, trained_with: int, device) -> dict:
    """{what: {"in training": {"scenes": .., "accuracy": ..}, "not": ..}} of one checkpoint with
    causal routing.
    """
    model, tokenizer, drawing = load_toy(path, device)
    world = training_data(tokenizer, trained_with)
    prompts, questions, codes = fresh_scenes(world, scenes, Random(f"quality {seed}"))
    with tqdm(total=2 * scenes, desc=path, unit="scene", mininterval=1.0) as bar:
        drawn = draw_and_judge(model, tokenizer, world, prompts, bar, **drawing)
        answered = ask_and_judge(model, tokenizer, questions, codes, bar)
    pictures = list(map(tuple, codes.flatten(1).tolist()))
    seen = {"t2i: caption": (drawn, [prompt.text in world.captions for prompt in prompts]),
            "mmu: picture": (answered, [picture in world.pictures for picture in pictures]),
            "mmu: picture, question": (answered, [(picture, question.text) in world.asked
                                                  for picture, question in zip(pictures, questions)])}

    def part(rows: list, flags: list, which: bool) -> dict:
        right = [ok for (_, ok), flag in zip(rows, flags) if flag == which]
        return {"scenes": len(right), "accuracy": sum(right) / len(right) if right else None}

    return {what: {"in training": part(*pair, True), "not": part(*pair, False)} for what, pair in seen.items()}


def show_novelty(found: dict) -> None:
    for what, parts in found.items():
        print(f"{what:<24}" + "".join(
            f"{name:>13}: {part['scenes']} scenes, " + ("n/a" if part["accuracy"] is None else f"{part['accuracy']:.1%}")
            for name, part in parts.items()))


def show_pairs(found: dict, names: tuple) -> None:
    print(f"{'':<14}{'scenes':>8}{names[0]:>9}{names[1]:>9}{'points':>9}{'s.e.':>7}{'alike':>8}")
    for task, row in found.items():
        print(f"{task:<14}{row['scenes']:>8}{row['first']:>9.1%}{row['second']:>9.1%}{row['points']:>+9.2f}"
              f"{row['standard_error']:>7.2f}{row['alike']:>8.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--scenes", type=int, default=2000, help="of each task")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--labels", action="store_true", help="right against wrong task labels, both causal")
    parser.add_argument("--trained-with", type=int, metavar="SEED", help="what occurred in that run's training data")
    parser.add_argument("--out", help="write the figures as JSON to this file")
    args = parser.parse_args()
    if args.labels and args.trained_with is not None:
        parser.error("--labels and --trained-with are two comparisons: give one of them")
    device = find_device()
    # before hours of the others
    if lost := [path for path in args.checkpoints if not Path(path).is_file()]:
        parser.error(f"{', '.join(lost)}: no such file")
    if args.trained_with is None:
        results = {path: compare(path, args.scenes, args.seed, args.labels, device) for path in args.checkpoints}
        show = partial(show_pairs, names=("right", "wrong") if args.labels else ("top-k", "causal"))
    else:
        results = {path: novelty(path, args.scenes, args.seed, args.trained_with, device) for path in args.checkpoints}
        show = show_novelty
    for path, found in results.items():
        print(f"\n{path}")
        show(found)
    if args.out:
        write_json(args.out, results)


if __name__ == "__main__":
    main()
