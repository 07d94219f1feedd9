"""Which gate? The same dense model goes on as UniMoD with each gate of routers.GATES, same plan, same data.

    python benchmarks/gates.py [--backbone emu3] [--steps 400] [--scenes 252]

Prints both accuracies, with top-k and with causal routing, for each gate.
"""

import argparse
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_toy as toy  # noqa: E402
from unimod_mini import arank_table, calibrate, plan_for_budget  # noqa: E402
from unimod_mini.evaluate import evaluate  # noqa: E402
from unimod_mini.routers import GATES  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", choices=("showo", "emu3"), default="emu3")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--scenes", type=int, default=252)
    args = parser.parse_args()
    setting, device = toy.SETTINGS[args.backbone], toy.find_device()
    toy.seed_everything(0)
    world, tokenizer = toy.make_world(toy.parse(["--backbone", args.backbone]))
    sampler = toy.Sampler(world, tokenizer, 0, setting["t2i"], setting["mmu"])
    dense = toy.UnifiedTransformer(toy.toy_config(args.backbone, tokenizer)).to(device)
    toy.train(dense, sampler, args.steps, 0.0, device, "dense")
    samples = {task: batch.to(device) for task, batch in sampler(20, 50).items()}
    lengths = {task: tokenizer.length(task) for task in samples}
    plan = plan_for_budget("unimod", arank_table(dense, samples), dense.config, lengths, setting["budget"])
    drawing = {"temperature": setting["temperature"], "guidance": setting["guidance"], "steps": setting["draw_steps"]}
    rows = []
    for gate in GATES:
        sampler.rng, model = Random("gates"), dense.with_plan(plan, gate=gate)
        sampler.generator.manual_seed(0)
        toy.train(model, sampler, args.steps // 2, 0.7, device, gate)
        calibrate(model, {task: batch.to(device) for task, batch in sampler(128, 128).items()})
        with toy.precision(device):
            scores = [evaluate(model, tokenizer, world, routing, args.scenes, 0, drawing, routing)
                      for routing in ("topk", "causal")]
        rows.append((gate, *(score[key] for key in ("t2i_accuracy", "mmu_accuracy") for score in scores)))
    print(f"\n{args.backbone}, {args.steps} dense steps, then {args.steps // 2} routed ones, {args.scenes} scenes a task")
    print(f"{'gate':<10}{'t2i top-k':>11}{'t2i causal':>12}{'mmu top-k':>11}{'mmu causal':>12}")
    for gate, *values in rows:
        print(f"{gate:<10}{values[0]:>11.1%}{values[1]:>12.1%}{values[2]:>11.1%}{values[3]:>12.1%}")


if __name__ == "__main__":
    main()
