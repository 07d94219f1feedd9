"""Which method, which gate, who decides membership? One dense model goes on with each choice, on
the same data.

    python benchmarks/choices.py method [--backbone emu3] [--steps 1000] [--more 500] [--scenes 504]
    [--dense FILE] python benchmarks/choices.py measure [.. the same] python benchmarks/choices.py
    gate python benchmarks/choices.py membership python benchmarks/choices.py rule

method: UniMoD; the same keep ratios for the layers in the order of what the loss gains from each,
instead of ARank's order (by loss); UniMoD with a plan whose every row meets the budget, so that no
task saves more than another (by task); UniMoD's plan without routers, tokens kept by their position
alone, spread evenly (by place); and the other methods of the comparison
(layer_switch.plan_for_budget). measure: what counts as rank in ARank, with its tolerance; even: no
ARank, the same keep in every layer but the first, which is dense. gate, membership: the values of
the config field, all with UniMoD's plan. rule: who ranks the tokens of a picture that is drawn
token by token, in training (objectives. training_rule): the router, the predictors, or both in
turns, the default. --only runs some of the choices; --budget is that of train_toy.py when not
given.

For each choice, on fresh data: the losses of both tasks and free-running accuracies, with top-k and
with causal routing, how often membership agrees with top-k, and its base rate (nan: nothing is
routed). --dense keeps the dense model in this file and takes it, and its steps, from there the next
time.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_toy as toy  # noqa: E402
from unimod_mini import (METHODS, Plan, arank_table, calibrate, flops_ratio, load_checkpoint,  # noqa: E402
                         plan_for_budget, plan_from_arank, predictor_report, save_checkpoint)
from unimod_mini import objectives  # noqa: E402
from benchmarks.observations import layer_importance  # noqa: E402
from unimod_mini.evaluate import evaluate  # noqa: E402
from unimod_mini.flops import bisect  # noqa: E402
from unimod_mini.objectives import cross_entropy, training_rule  # noqa: E402
from unimod_mini.routers import GATES, GOLDEN, MEMBERSHIP_WEIGHT, TaskRouter  # noqa: E402

# of arank, with their tolerances
MEASURES = ("energy 0.1", "energy 0.01", "rank 0.1", "rank 0.01", "rank 1e-7")
FIELDS = {"gate": tuple(GATES), "membership": tuple(MEMBERSHIP_WEIGHT),
          "measure": (*MEASURES, "even"),
          "rule": ("in turns", "router", "predictors"),
          "method": (METHODS[0], "by loss", "by task", "by place", *METHODS[1:])}
FRESH, SEEN = 256, 128           # sequences of each task: for losses and agreement, for thresholds
NAMES = ("saved", "ce t2i", "ce t2i c.", "ce mmu", "ce mmu c.", "t2i", "t2i c.", "mmu", "mmu c.", "agreement", "base rate")


def cli(what: str, choices, steps: int) -> argparse.ArgumentParser:
    """The command line of a benchmark that begins with a dense model of the toy world."""
    out = argparse.ArgumentParser(description=what)
    out.add_argument("field", choices=choices)
    out.add_argument("--backbone", choices=("showo", "emu3"), default="emu3")
    out.add_argument("--steps", type=int, default=steps, help="of the dense model")
    out.add_argument("--scenes", type=int, default=252)
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--dense", help="a file for the dense model")
    return out


def begin(args, device):
    """(world, tokenizer, data, dense): data(part, t2i, mmu) samples batches; a model that was
    trained for args.steps, or lay in args.dense. ValueError when another model lies there. The
    folders of the files to be written are made first.
    """
    if args.steps < 2:
        raise ValueError(f"--steps must be at least 2, got {args.steps}")
    for file in (args.dense, getattr(args, "out", None)):
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
    setting = toy.SETTINGS[args.backbone]
    toy.torch.manual_seed(args.seed)
    world, tokenizer = toy.make_world(toy.parse(["--backbone", args.backbone]))
    data = lambda part, *sizes: toy.Sampler(world, tokenizer, 10 * args.seed + part, *sizes)
    if args.dense and Path(args.dense).exists():
        dense, stored = load_checkpoint(args.dense, device)
        if dense.config != toy.toy_config(args.backbone, tokenizer):
            raise ValueError(f"{args.dense} holds another model than --backbone {args.backbone} makes")
        args.steps = stored["steps"]
    else:
        dense = toy.dense_model(toy.toy_config(args.backbone, tokenizer), device)
        sampler = data(0, setting["t2i"], setting["mmu"])
        toy.train(dense, sampler, args.steps, 0.0, device, "dense", setting["weights"])
        if args.dense:
            save_checkpoint(args.dense, dense, steps=args.steps)
    return world, tokenizer, data, dense


def main() -> None:
    parser = cli(__doc__.split("\n")[0], FIELDS, steps=400)
    parser.add_argument("--more", type=int, help="steps of each choice; half of --steps when not given")
    parser.add_argument("--budget", type=float, help="training FLOPs over dense; train_toy.py's when not given")
    parser.add_argument("--only", nargs="+", help="these choices alone")
    args = parser.parse_args()
    setting, device = toy.SETTINGS[args.backbone], toy.find_device()
    sizes, budget, wanted = (setting["t2i"], setting["mmu"]), args.budget or setting["budget"], args.only or FIELDS[args.field]
    if unknown := set(wanted) - set(FIELDS[args.field]):
        parser.error(f"--only {' '.join(sorted(unknown))}: the choices of {args.field} are {', '.join(FIELDS[args.field])}")
    try:
        world, tokenizer, data, dense = begin(args, device)
    except ValueError as error:
        parser.error(error)
    more = args.more or args.steps // 2
    samples = {task: batch.to(device) for task, batch in data(1, 20, 50)().items()}
    lengths, table = {task: tokenizer.length(task) for task in samples}, arank_table(dense, samples)
    print(f"{args.backbone}, seed {args.seed}, {args.steps} dense steps, then {more} more of each, {args.scenes} "
          "scenes a task\nsaved: training FLOPs; ce: cross-entropy; t2i, mmu: accuracies; c.: causal routing, else top-k; "
          "agreement: of membership with top-k\n" + f"{args.field:<12}" + "".join(f"{name:>12}" for name in NAMES), flush=True)
    for choice in wanted:
        toy.torch.manual_seed(args.seed)  # a choice does not depend on those before it
        own = (by_loss(dense, table, samples) if choice == "by loss" else
               measured(dense, samples, choice) if choice in MEASURES else table)
        plan, changes = variant(args.field, choice, own, dense.config, lengths, budget)
        model, fresh = dense.with_plan(plan, **changes), data(2, *sizes)
        if choice == "by place":
            without_routers(model)
        if args.field == "rule":
            objectives.training_rules = lambda step, batches: {
                task: ranked_by(choice, step, batch, task) for task, batch in batches.items()}
        toy.train(model, fresh, more, 0.7, device, choice, setting["weights"])
        values = [1 - flops_ratio(dense.config, plan, lengths, "train"),
                  *judge(model, fresh, world, args.scenes, args.seed, setting["drawing"], device)]
        print(f"{choice:<12}" + "".join(f"{value:>12.3f}" for value in values), flush=True)


def measured(dense, samples: dict, choice: str) -> dict:
    """arank_table by one of MEASURES."""
    measure, tolerance = choice.split()
    return arank_table(dense, samples, measure, float(tolerance))


def by_loss(dense, table: dict, samples: dict) -> dict:
    """ARank's values, a task's smallest for the layer without which its loss on the samples
    grows least, and so on.
    """
    def losses(model) -> dict:
        return {task: cross_entropy(model(**batch.inputs(), task=task).logits, batch.labels).item()
                for task, batch in samples.items()}
    _, without = layer_importance(dense, losses)
    order = {task: sorted(range(len(row)), key=lambda layer: without[layer][task]) for task, row in table.items()}
    return {task: [sorted(row)[order[task].index(layer)] for layer in range(len(row))] for task, row in table.items()}


def even(config, lengths: dict, budget: float) -> Plan:
    """The first layer dense, one keep in all others and for all tasks, a router for each."""
    plan = lambda keep: Plan(dict.fromkeys(lengths, (1.0, *[int(1000 * keep) / 1000] * (config.n_layer - 1))))
    return plan(bisect(lambda keep: flops_ratio(config, plan(keep), lengths), budget, 0.0, 1.0))


def variant(field: str, choice: str, table: dict, config, lengths: dict, budget: float) -> tuple[Plan, dict]:
    """The plan of this choice, and what it changes in the config."""
    if choice == "even":
        return even(config, lengths, budget), {}
    if choice == "by task":
        return Plan({task: plan_from_arank({task: row}, config, {task: lengths[task]}, budget).keep[task]
                     for task, row in table.items()}), {}
    plan = plan_for_budget(choice if choice in METHODS else "unimod", table, config, lengths, budget)
    return plan, {field: choice} if field in ("gate", "membership") else {}


def ranked_by(choice: str, step: int, batch, task: str) -> str:
    """training_rule with a choice of its own for the pictures that it is about."""
    if training_rule(1, batch, task) == "topk" or choice == "in turns":
        return training_rule(step, batch, task)
    return {"router": "topk", "predictors": "predicted"}[choice]


class Place(TaskRouter):
    """Looks at no token: a position's score is spread evenly over any stretch of positions, and
    another one in every layer, so that a layer keeps its share wherever one looks. The scores are
    so small that the gate stays 1.
    """

    def __init__(self, width: int, task: str, layer: int):
        super().__init__(width, 0, [task])
        self.layer = layer
        self.requires_grad_(False)

    def forward(self, x, task, keep, context, rule, before=None):
        self.positions = context.positions
        return super().forward(x, task, keep, context, rule, before)

    def router_scores(self, x):
        return 1e-3 * ((self.positions + self.layer) * GOLDEN % 2**32).float() / 2**32


def without_routers(model) -> None:
    """Puts a Place where a router is."""
    for layer, routers in enumerate(model.routers):
        for task in routers:
            routers[task] = Place(model.config.d_model, task, layer).to(next(model.parameters()).device)


@toy.torch.no_grad()
def judge(model, data, world, scenes: int, seed: int, drawing: dict, device) -> list:
    """The four losses on fresh data, the four accuracies, agreement with top-k and its base
    rate.
    """
    fresh, seen = ({task: batch.to(device) for task, batch in data(n, n).items()} for n in (FRESH, SEEN))
    calibrate(model, seen)
    losses = [cross_entropy(model(**batch.inputs(), task=task, routing=routing).logits, batch.labels).item()
              for task, batch in fresh.items() for routing in ("topk", "causal")]
    scores = [evaluate(model, data.tokenizer, world, routing, scenes, seed, drawing, routing)
              for routing in ("topk", "causal")]
    report = predictor_report(model, fresh)
    accuracies = [score[key] for key in ("t2i_accuracy", "mmu_accuracy") for score in scores]
    return [*losses, *accuracies, *(report[name] if report["by_layer"] else math.nan for name in ("accuracy", "base_rate"))]


if __name__ == "__main__":
    main()
