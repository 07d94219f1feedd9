"""A third task: drawing, answering questions on pictures, and answering the same questions on
texts, in one model.

    python benchmarks/tasks.py [--steps 1000] [--scenes 504] [--seed 0] [--out FILE]

The task "lm" reads a scene of one or two objects as a text ("a red ring top-left and a blue disc
top-right how many objects ? two") and is judged by the word after the question mark. As in
train_toy.py: dense training on all three, ARank, a plan with a row for every task that meets the
budget of a step's FLOPs, then half as many steps more with it, and dense from the same weights and
data. Emu3 style; causal routing.
"""

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_toy as toy  # noqa: E402
from unimod_mini import calibrate, flops_ratio, layer_switch  # noqa: E402
from unimod_mini.evaluate import CHUNK, ask_and_judge, by_category, draw_and_judge, accuracy  # noqa: E402
from unimod_mini.atomic_files import write_json  # noqa: E402
from unimod_mini.generate import left_pad  # noqa: E402
from unimod_mini.shapes import MMU_CATEGORIES, commonest_answers, phrase  # noqa: E402

SETTING = toy.SETTINGS["emu3"]
COUNTS = {"t2i": SETTING["t2i"], "mmu": SETTING["mmu"], "lm": 24}
SWITCH = {"t2i": 20, "mmu": 50, "lm": 50}          # samples that ARank is measured on
WEIGHTS = SETTING["weights"] | {"lm": 1.0}  # most of a text is a scene, which nobody can guess


def readings(world, n: int, rng: Random) -> list:
    """n pairs (a whole scene as a text, a question on it with a one-word answer); categories in
    turn.
    """
    out = []
    while len(out) < n:
        scene = world.scene(rng)
        question = world.question(MMU_CATEGORIES[len(out) % (len(MMU_CATEGORIES) - 1)], scene, rng)
        if question.category != "caption":         # what cannot be asked of this scene
            out.append((" and ".join(map(phrase, scene)), question))
    return out


class Sampler(toy.Sampler):
    """Endless training batches of the three tasks."""

    def __init__(self, world, tokenizer, seed: int):
        super().__init__(world, tokenizer, seed, COUNTS["t2i"], COUNTS["mmu"])
        self.small, self.dice = replace(world, max_objects=2), Random(f"texts {seed}")

    def __call__(self, n_t2i: int | None = None, n_mmu: int | None = None, n_lm: int = COUNTS["lm"]) -> dict:
        texts = [f"{scene} {q.text} {q.answer}" for scene, q in readings(self.small, n_lm, self.dice)]
        return super().__call__(n_t2i, n_mmu) | {"lm": self.tokenizer.lm(texts)}


@torch.no_grad()
def read_and_judge(model, tokenizer, asked: list) -> list:
    """[(category, right or wrong)] of the word that the model puts after each scene and
    question.
    """
    right, device = [], next(model.parameters()).device
    for start in range(0, len(asked), CHUNK):
        part = asked[start:start + CHUNK]
        rows = [[tokenizer.special["BOS"], *tokenizer.text.encode(f"{scene} {q.text}")] for scene, q in part]
        ids, valid = left_pad(rows, tokenizer.pad, device)
        words = model(ids, task="lm", valid=valid, routing="causal").logits[:, -1].argmax(-1).tolist()
        right += [(q.category, tokenizer.text.decode([word]) == q.answer) for (_, q), word in zip(part, words)]
    return right


def judge(model, world, small, tokenizer, scenes: int, seed: int) -> dict:
    """{task: accuracy, "worst": {task: its worst category}} on fresh scenes; small: the world of
    the texts.
    """
    model.eval()
    rng = Random(f"evaluate {seed}")
    right = {"t2i": draw_and_judge(model, tokenizer, world, world.sample_t2i(scenes, rng)[0], **SETTING["drawing"]),
             "mmu": ask_and_judge(model, tokenizer, *world.sample_mmu(scenes, rng)),
             "lm": read_and_judge(model, tokenizer, readings(small, scenes, rng))}
    worst = {task: min((value, name) for name, value in by_category(rows).items()) for task, rows in right.items()}
    return {task: accuracy(rows) for task, rows in right.items()} | {"worst": worst}


def blind(small, scenes: int, seed: int) -> float:
    """Accuracy in lm of the most frequent answer to each question, the scene unread."""
    known, asked = ([(q.text, q.answer) for _, q in readings(small, n, Random(f"{name} {seed}"))]
                    for name, n in (("blind", 4000), ("evaluate", scenes)))
    most = commonest_answers(known)
    return sum(most.get(text) == answer for text, answer in asked) / scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="of the dense phase")
    parser.add_argument("--scenes", type=int, default=504, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the figures as JSON to this file")
    args, device = parser.parse_args(), toy.find_device()
    toy.torch.manual_seed(args.seed)
    world, tokenizer = toy.make_world(toy.parse([]))
    config, sampler = toy.toy_config("emu3", tokenizer), Sampler(world, tokenizer, args.seed)
    dense = toy.dense_model(config, device)
    toy.train(dense, sampler, args.steps, 0.0, device, "dense", WEIGHTS)
    samples = {task: batch.to(device) for task, batch in sampler(*SWITCH.values()).items()}
    plan = layer_switch(dense, samples, SETTING["budget"], counts=COUNTS)
    saved = 1 - flops_ratio(config, plan, {task: tokenizer.length(task) for task in COUNTS}, "train", COUNTS)
    print(f"{args.steps} dense steps of {COUNTS}, {saved:.1%} of a step's training FLOPs saved from then on\n{plan}", flush=True)
    found, fresh = {"saved": saved, "keep": plan.keep}, copy.deepcopy(sampler)
    found["blind lm"] = blind(sampler.small, args.scenes, args.seed)
    for label, model, data in (("dense", copy.deepcopy(dense), fresh), ("unimod", dense.with_plan(plan), sampler)):
        toy.train(model, data, args.steps // 2, 0.7, device, label, WEIGHTS)
        calibrate(model, {task: batch.to(device) for task, batch in data(128, 128, 128).items()})
        found[label] = judge(model, world, sampler.small, tokenizer, args.scenes, args.seed)
        print(f"{label:<8}" + "".join(f"{task:>6} {found[label][task]:.1%}" for task in COUNTS)
              + "   worst: " + ", ".join(f"{task} {name} {value:.1%}" for task, (value, name) in found[label]["worst"].items()),
              flush=True)
    print(f"blind in lm: {found['blind lm']:.1%}")
    if args.out:
        write_json(args.out, vars(args) | found)


if __name__ == "__main__":
    main()
