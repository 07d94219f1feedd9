"""UniMoD in one sitting, on a laptop: dense training -> layer switch -> UniMoD, beside dense.

    python train_toy.py                          # the toy world, Emu3 style
    python train_toy.py --backbone showo         # masked-diffusion images
    python train_toy.py --images FOLDER          # your own pictures (metadata.jsonl with captions)

Reads top to bottom: what is trained, one phase of training, the run (dense phase, layer switch, the
second phase twice, evaluation by exact checkers), and what is shown and written to --out.
"""

import argparse
import copy
import os
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

from unimod_mini import (METHODS, ModelConfig, Palette, Pictures, Plan, Tokenizer,
                         UnifiedTransformer, WordText, World, arank_table, calibrate, count_flops,
                         flops_ratio, generate_image, generate_text, load_image_folder,
                         make_optimizers, plan_for_budget, predictor_report, save_checkpoint,
                         train_step)
from unimod_mini.atomic_files import write_json
from unimod_mini.console import command, progress_bar
from unimod_mini.device import find_device, find_precision
from unimod_mini.evaluate import blind_accuracy, evaluate
from unimod_mini.layer_switch import show_table
from unimod_mini.objectives import TASK_WEIGHTS, drop_prompts, mask_image_tokens
from unimod_mini.optim import learning_rate
from unimod_mini.pictures import save_png, terminal
from unimod_mini.transformer import PRECISIONS

# --- Settings: what each backbone needs ---
# steps: of the dense phase. t2i, mmu: sequences in a step. budget: training FLOPs of the plan over
# those of dense. weights: how much a task's loss counts; much of a drawing no model can know
# (shades, places that no caption names).

TASKS = ("t2i", "mmu")
SETTINGS = {
    "emu3": dict(steps=1000, t2i=12, mmu=36, weights=TASK_WEIGHTS | {"mmu": 4.0}, budget=0.60,
                 drawing={"temperature": 0.7, "guidance": 1.0}),
    "showo": dict(steps=1250, t2i=36, mmu=16, weights=TASK_WEIGHTS | {"mmu": 2.0}, budget=0.85,
                  drawing={"temperature": 1.0, "guidance": 1.0, "steps": 16}),
}
AIMS = {"t2i": 0.90, "mmu": 0.95}
EVAL_SCENES = 504                  # of each task, from seeds that training never uses


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cli.add_argument("--backbone", choices=("showo", "emu3"), default="emu3",
                     help="how pictures are drawn: code by code (emu3), or masked codes in "
                          "parallel (showo)")
    cli.add_argument("--method", choices=METHODS, default="unimod",
                     help="the plan that the layer switch makes")
    cli.add_argument("--steps", type=int,
                     help="steps of the dense phase; the second phase takes half as many")
    cli.add_argument("--device", help="cuda, mps or cpu; found by itself when not given")
    cli.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto",
                     help="of matrix products; auto: bf16 where the hardware multiplies it, else "
                          "float32")
    cli.add_argument("--seed", type=int, default=0, help="of weights, data and evaluation")
    cli.add_argument("--images",
                     help="a folder of pictures with metadata.jsonl instead of the toy world")
    cli.add_argument("--out", default="out/toy",
                     help="where metrics, plan, checkpoint and samples are written")
    return cli


def parse(argv=None) -> argparse.Namespace:
    cli = parser()
    args = cli.parse_args(argv)
    if args.steps is not None and args.steps < 2:
        cli.error(f"--steps must be at least 2, got {args.steps}")
    return args


# --- Data and model ---

def make_world(args) -> tuple:
    """The toy world, or the pictures of --images behind the same interface; and its tokenizer."""
    world = Pictures(*load_image_folder(args.images)) if args.images else World()
    text = WordText([*world.words, "USER:", "ASSISTANT:", "{}*{}".format(*world.grid)])
    tokenizer = Tokenizer(args.backbone, text, Palette(world.patches), world.grid,
                          world.longest_text + 2, "USER:", "ASSISTANT:")
    return world, tokenizer


def toy_config(backbone: str, tokenizer: Tokenizer) -> ModelConfig:
    """The toy preset with the sizes that follow from the tokenizer."""
    preset = ModelConfig.preset(f"toy-{backbone}")
    return replace(preset, **tokenizer.sizes(), image_positions=tokenizer.n_image)


def dense_model(config: ModelConfig, device, precision: str = "auto") -> UnifiedTransformer:
    """A new model on the device. precision: as find_precision takes it."""
    model = UnifiedTransformer(config).to(device)
    model.precision = find_precision(precision, device)
    return model


class Sampler:
    """Endless training batches, {task: Batch}, from one seed."""

    def __init__(self, world, tokenizer: Tokenizer, seed: int, n_t2i: int, n_mmu: int):
        self.world, self.tokenizer = world, tokenizer
        self.n_t2i, self.n_mmu = n_t2i, n_mmu
        self.rng = Random(f"train {seed}")
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, n_t2i: int | None = None, n_mmu: int | None = None) -> dict:
        """{task: Batch} of the usual sizes, or of these."""
        tokenizer = self.tokenizer
        prompts, drawn = self.world.sample_prompts(n_t2i or self.n_t2i, self.rng)
        dialogues, seen = self.world.sample_dialogues(n_mmu or self.n_mmu, self.rng,
                                                      tokenizer.text_length)
        captions = drop_prompts([prompt.text for prompt in prompts], 0.1, self.rng)
        t2i = tokenizer.t2i(captions, drawn)
        if tokenizer.backbone == "showo":
            t2i = mask_image_tokens(t2i, tokenizer, self.generator)
        questions = [[turn.text for turn in turns] for turns in dialogues]
        answers = [[turn.answer for turn in turns] for turns in dialogues]
        return {"t2i": t2i, "mmu": tokenizer.mmu(questions, answers, seen)}


def to_device(batches: dict, device) -> dict:
    return {task: batch.to(device) for task, batch in batches.items()}


# --- One phase of training ---

def train(model, sampler, steps: int, decay: float, device, label: str,
          weights: dict = TASK_WEIGHTS) -> float:
    """Train for `steps`, the rate falling to 0 over the last `decay` of them.

    Returns the median milliseconds a step.
    """
    optimizers, seconds = make_optimizers(model), []
    model.train()
    bar = progress_bar(range(steps), desc=f"{label:<8}", unit="step", mininterval=1.0)
    for step in bar:
        batches = to_device(sampler(), device)
        start = time.perf_counter()
        factor = learning_rate(step, steps, decay=decay)
        losses = train_step(model, optimizers, batches, step, factor, weights)
        if step % 10 == 9 or step == steps - 1:            # reading a loss waits for the device
            shown = {task: f"{loss.item():.3f}" for task, loss in losses.items()}
            bar.set_postfix(shown, refresh=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)                 # what was launched belongs to the step
        seconds.append(time.perf_counter() - start)
    return 1000 * sorted(seconds)[steps // 2]


def step_flops(config: ModelConfig, plan: Plan | None, tokenizer: Tokenizer) -> int:
    """Training FLOPs of one sample of each task."""
    return sum(count_flops(config, plan, task, tokenizer.length(task), "train").total
               for task in TASKS)


# --- The run ---

def main(argv=None) -> dict:
    args, began = parse(argv), time.perf_counter()
    setting, out = SETTINGS[args.backbone], Path(args.out)
    torch.manual_seed(args.seed)
    device = find_device(args.device)
    world, tokenizer = make_world(args)
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"{out} cannot be written to: choose another --out")
    config = toy_config(args.backbone, tokenizer)
    dense = dense_model(config, device, args.precision)
    sampler = Sampler(world, tokenizer, args.seed, setting["t2i"], setting["mmu"])
    introduce(dense, tokenizer, Sampler(world, tokenizer, args.seed, 1, 1)(), device, args.seed)

    steps = args.steps or setting["steps"]
    more = max(1, steps // 2)
    print(f"\n1. dense training, {steps} steps of {setting['t2i']} t2i + {setting['mmu']} mmu "
          "sequences")
    train(dense, sampler, steps, 0.0, device, "dense", setting["weights"])

    print("\n2. layer switch: ARank over length on 20 t2i prompts and 50 mmu samples")
    plan, flops = switch(dense, sampler, args.method, setting["budget"], device)
    plan.save(out / "plan.json")

    print(f"\n3. {more} more steps: {args.method}, and dense for comparison, from the same weights "
          "and data")
    routed, same_data = dense.with_plan(plan), copy.deepcopy(sampler)
    weights = setting["weights"]
    step_ms = {"routed": train(routed, sampler, more, 0.7, device, args.method, weights),
               "dense": train(dense, same_data, more, 0.7, device, "dense", weights)}

    print(f"\n4. evaluation: {EVAL_SCENES} fresh scenes of each task, one sample each, "
          "free-running")
    results = judge(dense, routed, sampler, args.seed, setting["drawing"], flops, step_ms, device)
    counts = {task: setting[task] for task in TASKS}
    lengths = {task: tokenizer.length(task) for task in TASKS}
    saved = 1 - flops_ratio(config, plan, lengths, "train", counts)
    metrics = {"backbone": args.backbone, "method": args.method, "seed": args.seed,
               "precision": dense.precision, "seconds": round(time.perf_counter() - began, 1),
               "parameters": sum(p.numel() for p in routed.parameters()), **results,
               "blind_mmu_accuracy": blind_accuracy(world, EVAL_SCENES, args.seed),
               "saved": {"samples": round(1 - flops["routed"] / flops["dense"], 4),
                         "step": round(saved, 4),
                         "whole_run": round(saved * more / (steps + more), 4)}}
    report(metrics, plan)
    write_results(out, metrics, routed, tokenizer, world, setting["drawing"])
    return metrics


def switch(dense, sampler, method: str, budget: float, device) -> tuple[Plan, dict]:
    """ARank -> the method's plan, and the training FLOPs of {"dense": .., "routed": ..}."""
    tokenizer, config = sampler.tokenizer, dense.config
    table = arank_table(dense, to_device(sampler(20, 50), device))
    lengths = {task: tokenizer.length(task) for task in table}
    plan = plan_for_budget(method, table, config, lengths, budget)
    print(show_table(table))
    flops = {"dense": step_flops(config, None, tokenizer),
             "routed": step_flops(config, plan, tokenizer)}
    print(f"\nplan ({method}), {1 - flops['routed'] / flops['dense']:.1%} of the training FLOPs "
          f"saved (full n x n attention)\n{plan}")
    return plan, flops


def judge(dense, routed, sampler, seed: int, drawing: dict, flops: dict, step_ms: dict,
          device) -> dict:
    """Thresholds, then accuracies: of dense, and of the method by top-k and by causal routing."""
    seen = to_device(sampler(128, 128), device)
    fresh = to_device(sampler(128, 128), device)
    calibrate(routed, seen)
    results = {}
    for name, model, rule in (("dense", dense, "causal"), ("topk", routed, "topk"),
                              ("causal", routed, "causal")):
        kind = "dense" if name == "dense" else "routed"
        results[name] = evaluate(model, sampler.tokenizer, sampler.world, rule, EVAL_SCENES, seed,
                                 drawing, name)
        results[name] |= {"train_flops": flops[kind], "step_ms": round(step_ms[kind], 1)}
    return {**results, "predictor": predictor_report(routed, fresh)}


# --- What is shown and written ---

def introduce(model, tokenizer, example: dict, device, seed: int) -> None:
    """The configuration, the parameters, the tasks and one sequence of each, id by id."""
    print(f"config   {model.config}\ndevice   {device}, seed {seed}, {torch.get_num_threads()} "
          f"threads, {model.precision}")
    print(f"model    {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary of "
          f"{tokenizer.vocab_size}")
    for task, batch in example.items():
        names = " ".join(map(tokenizer.name, batch.ids[0].tolist()))
        print(f"{task:<8} {batch.ids.shape[1]} tokens: {names}")


def report(metrics: dict, plan: Plan) -> None:
    """The closing table; top-k looks at the whole sequence, so its row is labelled non-causal."""
    method = metrics["method"]
    names = {"dense": "dense", "topk": f"{method}, top-k (non-causal)",
             "causal": f"{method}, causal"}
    width = len(names["topk"])
    print(f"\n{'model':<{width}}{'t2i':>8}{'mmu':>8}{'composed':>10}{'GFLOP':>8}{'ms/step':>9}"
          f"{'kept t2i':>10}{'kept mmu':>10}")
    for key, name in names.items():
        row, kept = metrics[key], {}
        for task in TASKS:
            kept[task] = 1.0 if key == "dense" else sum(plan.keep[task]) / plan.n_layer
        composed = "n/a" if row["composition"] is None else f"{row['composition']:.1%}"
        print(f"{name:<{width}}{row['t2i_accuracy']:>8.1%}{row['mmu_accuracy']:>8.1%}"
              f"{composed:>10}{row['train_flops'] / 1e9:>8.3f}{row['step_ms']:>9.0f}"
              f"{kept['t2i']:>10.1%}{kept['mmu']:>10.1%}")
    print(f"{'blind (no picture)':<{width}}{'':>8}{metrics['blind_mmu_accuracy']:>8.1%}")
    print("worst category: " + ", ".join(f"{key} {worst_category(metrics[key])}" for key in names))
    print("GFLOP: training FLOPs of one sample of each task, full n x n attention. Saved: "
          "{samples:.1%} of them; {step:.1%} of a step's, whose tasks are not equally many; "
          "{whole_run:.1%} over both phases.".format(**metrics["saved"]))
    report_predictors(metrics["predictor"])
    saved = 1 - SETTINGS[metrics["backbone"]]["budget"]
    print(f"aimed at: t2i {AIMS['t2i']:.0%}, mmu {AIMS['mmu']:.0%}, {saved:.0%} saved (toy world, "
          f"default steps). This run took {metrics['seconds'] / 60:.1f} minutes.")


def worst_category(row: dict) -> str:
    """Such as "mmu existence 91.7%"."""
    accuracies = []
    for task in TASKS:
        for name, accuracy in row["by_category"][task].items():
            accuracies.append((accuracy, f"{task} {name}"))
    accuracy, name = min(accuracies)
    return f"{name} {accuracy:.1%}"


def report_predictors(predictor: dict) -> None:
    """One line for each routed layer and task, and the means."""
    names = [name for name in predictor if name != "by_layer"]
    print("\nmembership" + "".join(f"{name.removeprefix('capacity_'):>11}" for name in names))
    for row in [*predictor["by_layer"], {"task": "mean", "layer": ""} | predictor]:
        line = f"{row['task']:<6}{row['layer']:>4}"
        for name in names:
            line += f"{'n/a':>11}" if row[name] is None else f"{row[name]:>11.3f}"
        print(line)
    print("accuracy against top-k beside the majority's base rate; share of tokens kept: trained "
          "(top-k), realised (causal)\n")


def write_results(out: Path, metrics: dict, model, tokenizer, world, drawing: dict) -> None:
    """metrics.json and checkpoint.pt first; then answers and pictures to look at."""
    write_json(out / "metrics.json", metrics)
    toy = world if isinstance(world, World) else None      # by which `generate` judges
    save_checkpoint(out / "checkpoint.pt", model, tokenizer=tokenizer.state(), drawing=drawing,
                    world=toy)
    print(f"\n{out}/metrics.json, {out}/plan.json, {out}/checkpoint.pt written")
    rng = Random("show")
    questions, codes = world.sample_mmu(6, rng)
    answers = generate_text(model, tokenizer, codes, [question.text for question in questions])
    print("\n" + terminal(tokenizer.image.decode(codes)))
    for number, (question, answer) in enumerate(zip(questions, answers), start=1):
        verdict = "" if answer == question.answer else f"  (right: {question.answer})"
        print(f"picture {number}: {question.text} {answer}{verdict}")
    prompts = [prompt.text for prompt in world.sample_t2i(7, rng)[0]]
    drawn = generate_image(model, tokenizer, prompts, **drawing)
    print("\n" + terminal(drawn))
    for number, prompt in enumerate(prompts, start=1):
        print(f"drawn {number}: {prompt}")
    print("\n" + save_png(drawn, prompts, out / "samples.png", max(1, 96 // drawn.shape[1])))


if __name__ == "__main__":
    with command(stopped="stopped: the weights of this run are lost, train_toy.py writes them at "
                         "its end"):
        main()
