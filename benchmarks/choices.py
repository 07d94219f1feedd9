"""Which gate, and who decides membership? One dense model goes on as UniMoD with each choice, same plan, same data.

    python benchmarks/choices.py gate [--backbone emu3] [--steps 400] [--scenes 252] [--dense FILE]
    python benchmarks/choices.py membership

For each value of the config field, on fresh data: the losses of both tasks and free-running accuracies, with top-k and
with causal routing, how often membership agrees with top-k, and its base rate. --dense keeps the dense model in
this file and takes it, and its steps, from there the next time.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_toy as toy  # noqa: E402
from unimod_mini import (arank_table, calibrate, load_checkpoint, plan_for_budget, predictor_report,  # noqa: E402
                         save_checkpoint)
from unimod_mini.evaluate import evaluate  # noqa: E402
from unimod_mini.objectives import cross_entropy  # noqa: E402
from unimod_mini.routers import GATES, MEMBERSHIP_WEIGHT  # noqa: E402

FIELDS = {"gate": GATES, "membership": MEMBERSHIP_WEIGHT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("field", choices=FIELDS)
    parser.add_argument("--backbone", choices=("showo", "emu3"), default="emu3")
    parser.add_argument("--steps", type=int, default=400, help="of the dense model; half as many for each choice")
    parser.add_argument("--scenes", type=int, default=252)
    parser.add_argument("--dense", help="a file for the dense model")
    args = parser.parse_args()
    setting, device = toy.SETTINGS[args.backbone], toy.find_device()
    toy.seed_everything(0)
    world, tokenizer = toy.make_world(toy.parse(["--backbone", args.backbone]))
    sampler = toy.Sampler(world, tokenizer, 0, setting["t2i"], setting["mmu"])
    if args.dense and Path(args.dense).exists():
        dense, stored = load_checkpoint(args.dense, device)
        if dense.config != toy.toy_config(args.backbone, tokenizer):
            parser.error(f"{args.dense} holds another model than --backbone {args.backbone} makes")
        args.steps = stored["steps"]
    else:
        dense = toy.UnifiedTransformer(toy.toy_config(args.backbone, tokenizer)).to(device)
        toy.train(dense, sampler, args.steps, 0.0, device, "dense", setting["mmu_weight"])
        if args.dense:
            save_checkpoint(args.dense, dense, steps=args.steps)
    samples = {task: batch.to(device) for task, batch in toy.Sampler(world, tokenizer, 1, 20, 50)().items()}
    lengths = {task: tokenizer.length(task) for task in samples}
    plan = plan_for_budget("unimod", arank_table(dense, samples), dense.config, lengths, setting["budget"])
    drawing = {"temperature": setting["temperature"], "guidance": setting["guidance"], "steps": setting["draw_steps"]}
    rows = []
    for choice in FIELDS[args.field]:
        model, data = dense.with_plan(plan, **{args.field: choice}), toy.Sampler(world, tokenizer, 2, setting["t2i"],
                                                                                   setting["mmu"])
        toy.train(model, data, args.steps // 2, 0.7, device, choice, setting["mmu_weight"])
        rows.append((choice, *judge(model, data, world, args.scenes, drawing, device)))
    print(f"\n{args.backbone}, {args.steps} dense steps, then {args.steps // 2} routed ones, {args.scenes} scenes a task")
    names = ("ce t2i", "ce t2i c.", "ce mmu", "ce mmu c.", "t2i", "t2i c.", "mmu", "mmu c.", "agreement", "base rate")
    print("ce: cross-entropy; t2i, mmu: accuracies; c.: causal routing, else top-k; agreement: of membership with top-k")
    print(f"{args.field:<12}" + "".join(f"{name:>12}" for name in names))
    for choice, *values in rows:
        print(f"{choice:<12}" + "".join(f"{value:>12.3f}" for value in values))


@toy.torch.no_grad()
def judge(model, data, world, scenes: int, drawing: dict, device) -> list:
    """The four losses on fresh data, the four accuracies, agreement with top-k and its base rate."""
    fresh = {task: batch.to(device) for task, batch in data(256, 256).items()}
    seen = {task: batch.to(device) for task, batch in data(128, 128).items()}
    with toy.precision(device):
        calibrate(model, seen)
        losses = [cross_entropy(model(**batch.inputs(), task=task, routing=routing).logits, batch.labels).item()
                  for task, batch in fresh.items() for routing in ("topk", "causal")]
        scores = [evaluate(model, data.tokenizer, world, routing, scenes, 0, drawing, routing)
                  for routing in ("topk", "causal")]
        report = predictor_report(model, fresh)
    accuracies = [score[key] for key in ("t2i_accuracy", "mmu_accuracy") for score in scores]
    return [*losses, *accuracies, report["accuracy"], report["base_rate"]]


if __name__ == "__main__":
    main()
