"""UniMoD in one sitting, on a laptop: dense training -> layer switch -> UniMoD, side by side with dense.

    python train_toy.py                          # the toy world, Emu3 style
    python train_toy.py --backbone showo         # masked-diffusion images
    python train_toy.py --images FOLDER          # your own pictures (metadata.jsonl with captions)

Reads top to bottom: what is trained, the dense phase, ARank and the plan, the second phase twice (the method and
dense), the evaluation by exact checkers, and what is written to --out.
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
                         UnifiedTransformer, World, WordText, arank_table, calibrate, count_flops,
                         flops_ratio, generate_image, generate_text, load_image_folder,
                         make_optimizers, plan_for_budget, predictor_report, save_checkpoint,
                         train_step)
from unimod_mini.console import command, progress_bar
from unimod_mini.evaluate import blind_accuracy, evaluate
from unimod_mini.atomic_files import write_json
from unimod_mini.layer_switch import show_table
from unimod_mini.objectives import TASK_WEIGHTS, drop_prompts, mask_image_tokens
from unimod_mini.pictures import save_png, terminal
from unimod_mini.device import find_device, find_precision, seed_everything
from unimod_mini.optim import learning_rate
from unimod_mini.transformer import PRECISIONS

# --------------------------------------------------------------------------------------------------------------
# Settings: what each backbone needs. Budget: training FLOPs of the plan over those of dense. weights: what a task's
# loss counts; much of t2i's no model can know (shades, places that no caption names).
# --------------------------------------------------------------------------------------------------------------

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
                     help="how pictures are drawn: code by code (emu3), or masked codes in parallel (showo)")
    cli.add_argument("--method", choices=METHODS, default="unimod", help="the plan that the layer switch makes")
    cli.add_argument("--steps", type=int, help="steps of the dense phase; the second phase takes half as many")
    cli.add_argument("--device", help="cuda, mps or cpu; found by itself when not given")
    cli.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto",
                     help="of matrix products; auto: bf16 where the hardware multiplies it, else float32")
    cli.add_argument("--seed", type=int, default=0, help="of weights, data and evaluation")
    cli.add_argument("--images", help="a folder of pictures with metadata.jsonl instead of the toy world")
    cli.add_argument("--out", default="out/toy", help="where metrics, plan, checkpoint and samples are written")
    return cli


def parse(argv=None) -> argparse.Namespace:
    cli = parser()
    args = cli.parse_args(argv)
    if args.steps is not None and args.steps < 2:
        cli.error(f"--steps must be at least 2, got {args.steps}")
    return args


# --------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------

def make_world(args):
    """The toy world, or the pictures of --images behind the same interface; and the tokenizer that fits it."""
    world = Pictures(*load_image_folder(args.images)) if args.images else World()
    text = WordText([*world.words, "USER:", "ASSISTANT:", "{}*{}".format(*world.grid)])
    return world, Tokenizer(args.backbone, text, Palette(world.patches), world.grid, world.longest_text + 2, "USER:",
                            "ASSISTANT:")


def toy_config(backbone: str, tokenizer: Tokenizer) -> ModelConfig:
    """The toy preset with the sizes that follow from the tokenizer."""
    return replace(ModelConfig.preset(f"toy-{backbone}"), **tokenizer.sizes(), image_positions=tokenizer.n_image)


def dense_model(config: ModelConfig, device, precision: str = "auto") -> UnifiedTransformer:
    """A new model on the device. precision: as find_precision takes it."""
    model = UnifiedTransformer(config).to(device)
    model.precision = find_precision(precision, device)
    return model


class Sampler:
    """Endless training batches, {task: Batch}, from one seed."""

    def __init__(self, world, tokenizer, seed: int, n_t2i: int, n_mmu: int):
        self.world, self.tokenizer, self.n_t2i, self.n_mmu = world, tokenizer, n_t2i, n_mmu
        self.rng, self.generator = Random(f"train {seed}"), torch.Generator().manual_seed(seed)

    def __call__(self, n_t2i: int | None = None, n_mmu: int | None = None) -> dict:
        """{task: Batch} of the usual sizes, or of these."""
        prompts, drawn = self.world.sample_prompts(n_t2i or self.n_t2i, self.rng)
        dialogues, seen = self.world.sample_dialogues(n_mmu or self.n_mmu, self.rng, self.tokenizer.text_length)
        t2i = self.tokenizer.t2i(drop_prompts([p.text for p in prompts], 0.1, self.rng), drawn)
        if self.tokenizer.backbone == "showo":
            t2i = mask_image_tokens(t2i, self.tokenizer, self.generator)
        asked, answered = ([[turn[i] for turn in turns] for turns in dialogues] for i in (0, 2))  # Question fields
        return {"t2i": t2i, "mmu": self.tokenizer.mmu(asked, answered, seen)}


# --------------------------------------------------------------------------------------------------------------
# One phase of training
# --------------------------------------------------------------------------------------------------------------

def train(model, sampler, steps: int, decay: float, device, label: str, weights: dict = TASK_WEIGHTS) -> float:
    """Train for `steps`; the rate falls to 0 over the last `decay` of them. Returns the median milliseconds a step."""
    optimizers, times, means = make_optimizers(model), [], {}
    model.train()
    bar = progress_bar(range(steps), desc=f"{label:<8}", unit="step", mininterval=1.0)
    for step in bar:
        batches = {task: batch.to(device) for task, batch in sampler().items()}
        start = time.perf_counter()
        losses = train_step(model, optimizers, batches, step, learning_rate(step, steps, decay=decay), weights)
        if step % 10 == 9 or step == steps - 1:            # reading a loss waits for the device
            means = {task: f"{loss.item():.3f}" for task, loss in losses.items()}
            bar.set_postfix(means, refresh=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)                 # what was launched belongs to the step
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[len(times) // 2]


def step_flops(config, plan, tokenizer) -> int:
    """Training FLOPs of one sample of each task."""
    return sum(count_flops(config, plan, task, tokenizer.length(task), "train").total for task in ("t2i", "mmu"))


# --------------------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------------------

def main(argv=None) -> dict:
    args, began = parse(argv), time.perf_counter()
    setting, out = SETTINGS[args.backbone], Path(args.out)
    seed_everything(args.seed)
    device, (world, tokenizer) = find_device(args.device), make_world(args)
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"{out} cannot be written to: choose another --out")
    config = toy_config(args.backbone, tokenizer)
    dense = dense_model(config, device, args.precision)
    sampler = Sampler(world, tokenizer, args.seed, setting["t2i"], setting["mmu"])
    introduce(dense, tokenizer, Sampler(world, tokenizer, args.seed, 1, 1)(), device, args.seed)

    steps = args.steps or setting["steps"]
    more = max(1, steps // 2)
    print(f"\n1. dense training, {steps} steps of {setting['t2i']} t2i + {setting['mmu']} mmu sequences")
    train(dense, sampler, steps, 0.0, device, "dense", setting["weights"])

    print("\n2. layer switch: ARank over length on 20 t2i prompts and 50 mmu samples")
    plan, flops = switch(dense, sampler, args.method, setting["budget"], device)
    plan.save(out / "plan.json")

    print(f"\n3. {more} more steps: {args.method}, and dense for comparison, from the same weights and data")
    routed, same_data = dense.with_plan(plan), copy.deepcopy(sampler)
    step_ms = {"routed": train(routed, sampler, more, 0.7, device, args.method, setting["weights"]),
               "dense": train(dense, same_data, more, 0.7, device, "dense", setting["weights"])}

    print(f"\n4. evaluation: {EVAL_SCENES} fresh scenes of each task, one sample each, free-running")
    drawing, sizes = setting["drawing"], {task: setting[task] for task in plan.tasks}
    saved = 1 - flops_ratio(config, plan, {task: tokenizer.length(task) for task in sizes}, "train", sizes)
    results = judge(dense, routed, sampler, args.seed, drawing, flops, step_ms, device)
    metrics = {"backbone": args.backbone, "method": args.method, "seed": args.seed, "precision": dense.precision,
               "seconds": round(time.perf_counter() - began, 1),
               "parameters": sum(p.numel() for p in routed.parameters()), **results,
               "blind_mmu_accuracy": blind_accuracy(world, EVAL_SCENES, args.seed),
               "saved": {"samples": round(1 - flops["routed"] / flops["dense"], 4), "step": round(saved, 4),
                         "whole_run": round(saved * more / (steps + more), 4)}}
    report(metrics, plan)
    write_results(out, metrics, routed, tokenizer, world, drawing)
    return metrics


def switch(dense, sampler, method: str, budget: float, device) -> tuple[Plan, dict]:
    """ARank -> the method's plan, both printed; and the training FLOPs of {"dense": .., "routed": ..}."""
    tokenizer, config = sampler.tokenizer, dense.config
    table = arank_table(dense, {task: batch.to(device) for task, batch in sampler(20, 50).items()})
    plan = plan_for_budget(method, table, config, {task: tokenizer.length(task) for task in table}, budget)
    print(show_table(table))
    flops = {"dense": step_flops(config, None, tokenizer), "routed": step_flops(config, plan, tokenizer)}
    print(f"\nplan ({method}), {1 - flops['routed'] / flops['dense']:.1%} of the training FLOPs saved "
          f"(full n x n attention)\n{plan}")
    return plan, flops


def judge(dense, routed, sampler, seed: int, drawing: dict, flops: dict, step_ms: dict, device) -> dict:
    """Thresholds, then the accuracies of dense, of the method with top-k and with causal routing; the predictors."""
    seen, fresh = ({task: batch.to(device) for task, batch in sampler(128, 128).items()} for _ in range(2))
    results = {}
    calibrate(routed, seen)
    for name, model, rule in (("dense", dense, "causal"), ("topk", routed, "topk"), ("causal", routed, "causal")):
        kind = "dense" if name == "dense" else "routed"
        results[name] = evaluate(model, sampler.tokenizer, sampler.world, rule, EVAL_SCENES, seed, drawing, name)
        results[name] |= {"train_flops": flops[kind], "step_ms": round(step_ms[kind], 1)}
    return {**results, "predictor": predictor_report(routed, fresh)}


# --------------------------------------------------------------------------------------------------------------
# What is shown and written
# --------------------------------------------------------------------------------------------------------------

def introduce(model, tokenizer, example: dict, device, seed: int) -> None:
    """The configuration, the parameters, the tasks and one sequence of each, id by id."""
    print(f"config   {model.config}\ndevice   {device}, seed {seed}, {torch.get_num_threads()} threads, "
          f"{model.precision}")
    print(f"model    {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary of {tokenizer.vocab_size}")
    for task, batch in example.items():
        print(f"{task:<8} {batch.ids.shape[1]} tokens: {' '.join(tokenizer.name(i) for i in batch.ids[0].tolist())}")


def report(metrics: dict, plan: Plan) -> None:
    """The closing table; top-k looks at the whole sequence, so its row is labelled non-causal."""
    method = metrics["method"]
    names = {"dense": "dense", "topk": f"{method}, top-k (non-causal)", "causal": f"{method}, causal"}
    width = len(names["topk"])
    print(f"\n{'model':<{width}}{'t2i':>8}{'mmu':>8}{'composed':>10}{'GFLOP':>8}{'ms/step':>9}{'kept t2i':>10}"
          f"{'kept mmu':>10}")
    for key, name in names.items():
        row = metrics[key]
        kept = [1.0 if key == "dense" else sum(plan.keep[task]) / plan.n_layer for task in ("t2i", "mmu")]
        composed = "n/a" if row["composition"] is None else f"{row['composition']:.1%}"
        print(f"{name:<{width}}{row['t2i_accuracy']:>8.1%}{row['mmu_accuracy']:>8.1%}{composed:>10}"
              f"{row['train_flops'] / 1e9:>8.3f}{row['step_ms']:>9.0f}{kept[0]:>10.1%}{kept[1]:>10.1%}")
    print(f"{'blind (no picture)':<{width}}{'':>8}{metrics['blind_mmu_accuracy']:>8.1%}")
    worst = {key: min((v, f"{task} {name}") for task in ("t2i", "mmu")
                      for name, v in metrics[key]["by_category"][task].items()) for key in names}
    print("worst category: " + ", ".join(f"{key} {name} {value:.1%}" for key, (value, name) in worst.items()))
    print("GFLOP: training FLOPs of one sample of each task, full n x n attention. Saved: {samples:.1%} of them; "
          "{step:.1%} of a step's, whose tasks are not equally many; {whole_run:.1%} over both phases."
          .format(**metrics["saved"]))
    report_predictors(metrics["predictor"])
    saved = 1 - SETTINGS[metrics["backbone"]]["budget"]
    print(f"aimed at: t2i {AIMS['t2i']:.0%}, mmu {AIMS['mmu']:.0%}, {saved:.0%} saved "
          f"(toy world, default steps). This run took {metrics['seconds'] / 60:.1f} minutes.")


def report_predictors(predictor: dict) -> None:
    """One line for each routed layer and task, and the means."""
    names = [name for name in predictor if name != "by_layer"]
    print("\nmembership" + "".join(f"{name.removeprefix('capacity_'):>11}" for name in names))
    for row in [*predictor["by_layer"], {"task": "mean", "layer": ""} | predictor]:
        print(f"{row['task']:<6}{row['layer']:>4}" + "".join(
            f"{'n/a':>11}" if row[name] is None else f"{row[name]:>11.3f}" for name in names))
    print("accuracy against top-k beside the majority's base rate; share of tokens kept: trained (top-k), realised "
          "(causal)\n")


def write_results(out: Path, metrics: dict, model, tokenizer, world, drawing: dict) -> None:
    """metrics.json and checkpoint.pt, before anything can fail to be shown; answers and pictures to look at."""
    write_json(out / "metrics.json", metrics)
    toy = world if isinstance(world, World) else None      # generate judges by it
    save_checkpoint(out / "checkpoint.pt", model, tokenizer=tokenizer.state(), drawing=drawing, world=toy)
    print(f"\n{out}/metrics.json, {out}/plan.json, {out}/checkpoint.pt written")
    rng = Random("show")
    questions, codes = world.sample_mmu(6, rng)
    images = tokenizer.image.decode(codes)
    print("\n" + terminal(images))
    for number, (question, answer) in enumerate(zip(questions, generate_text(
            model, tokenizer, images, [q.text for q in questions])), start=1):
        verdict = "" if answer == question.answer else f"  (right: {question.answer})"
        print(f"picture {number}: {question.text} {answer}{verdict}")
    prompts = [prompt.text for prompt in world.sample_t2i(7, rng)[0]]
    drawn = generate_image(model, tokenizer, prompts, **drawing)
    print("\n" + terminal(drawn) + "\n" + "\n".join(f"drawn {i}: {text}" for i, text in enumerate(prompts, start=1)))
    print("\n" + save_png(drawn, prompts, out / "samples.png", scale=max(1, 96 // drawn.shape[1])))


if __name__ == "__main__":
    with command(stopped="stopped: the weights of this run are lost, train_toy.py writes them at its end"):
        main()
