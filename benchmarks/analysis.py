"""The observations that UniMoD rests on, measured on a dense model of the toy world, and the
synergy of its tasks.

    python benchmarks/analysis.py observations [--backbone emu3] [--steps 1000] [--dense FILE]
    [--out FILE] python benchmarks/analysis.py synergy [--backbone emu3] [--steps 1000] [--out FILE]
    python benchmarks/analysis.py plans [--backbone emu3] [--steps 1000] [--dense FILE] [--out FILE]

observations, by layer: ARank over length; attention that text and image tokens receive; what is
lost without the layer, in cross-entropy and accuracy; whose tokens win when both tasks compete for
one router, with equal weights of the tasks' losses, and with those of train_toy.py. synergy: a
model of each task alone and one of both, on the same samples of a task in every step; then half as
many steps more of each, dense and with UniMoD's plan (of the model of both). Held out: a
colour-shape pair that training never shows. plans: how far a plan of train_toy.py's budget depends
on the samples that ARank is measured on, and on what counts as rank.

--dense keeps the dense model in this file and takes it, and its steps, from there the next time.
--out: a file of JSON, and of observations a drawing beside it.
"""

import sys
from functools import partial
from pathlib import Path
from random import Random

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.choices import MEASURES, begin, cli, measured, toy  # noqa: E402
from benchmarks.growth import COLORS, GAP, HIGH, LEFT, TOP, WIDE, Panel, round_steps, svg  # noqa: E402
from unimod_mini import Plan, arank_table, calibrate, layer_switch, plan_from_arank  # noqa: E402
from benchmarks.observations import attention_received, competition, layer_importance  # noqa: E402
from unimod_mini.evaluate import ask_and_judge, draw_and_judge, accuracy  # noqa: E402
from unimod_mini.atomic_files import write_json, write_text  # noqa: E402
from unimod_mini.objectives import cross_entropy  # noqa: E402

TASKS = ("t2i", "mmu")
SAMPLES = 256                # of each task, for what is measured
ROUTER_STEPS, COMPETING = 150, 24    # of the competition, on so many samples of each task
# of plans: so many plans, each from other samples, for each number of samples
DRAWS, COUNTS = 8, (1, 5, 20, 50, 256)


@toy.torch.no_grad()
def score(model, world, tokenizer, data, args, held_out=(False,), tasks=TASKS) -> dict:
    """{"ce t2i": cross-entropy on fresh data, "t2i": accuracy, "held t2i": on held-out pairs,
    ..}, causal routing.
    """
    model.eval()
    out, fresh = {}, data(3, SAMPLES, SAMPLES)()
    for task in tasks:
        batch = fresh[task].to(next(model.parameters()).device)
        logits = model(**batch.inputs(), task=task, routing="causal").logits
        out[f"ce {task}"] = cross_entropy(logits, batch.labels).item()
        for held in held_out:
            rng = Random(f"evaluate {args.seed} {task} {held}")
            if task == "t2i":
                right = draw_and_judge(model, tokenizer, world, world.sample_t2i(args.scenes, rng, held)[0],
                                       **toy.SETTINGS[args.backbone]["drawing"])
            else:
                right = ask_and_judge(model, tokenizer, *world.sample_mmu(args.scenes, rng, held))
            out[f"held {task}" if held else task] = accuracy(right)
    return out


# What a dense model shows

def observations(world, tokenizer, data, dense, args, device) -> dict:
    """{column: a number for each layer, or None}; under "whole" what the whole model scores."""
    fresh = {task: batch.to(device) for task, batch in data(1, SAMPLES, SAMPLES)().items()}
    table = {f"rank {task}": row for task, row in arank_table(dense, fresh).items()}
    for task, batch in fresh.items():
        table |= {f"{kind} {task}": row.tolist() for kind, row in attention_received(dense, batch, task).items()}
    with tqdm(total=dense.config.n_layer + 1, desc="importance", unit="model") as bar:
        def measure(model) -> dict:
            bar.update(1)
            return score(model, world, tokenizer, data, args)
        whole, without = layer_importance(dense, measure)
    sign = lambda name: 1 if name.startswith("ce ") else -1
    table |= {f"lost {name}": [sign(name) * (row[name] - value) for row in without] for name, value in whole.items()}
    for label, weights in (("equal", dict.fromkeys(TASKS, 1.0)), ("toy", toy.SETTINGS[args.backbone]["weights"])):
        won = competition(dense, data(2, COMPETING, COMPETING), ROUTER_STEPS, weights,
                          progress=partial(tqdm, desc=f"routers, {label}", unit="step", mininterval=1.0))
        table |= {f"won {task} {label}": row for task, row in won.items()}
    return {"whole": whole, **table}


def show_observations(found: dict, args) -> str:
    names = [name for name in found if name != "whole"]
    lines = [f"{args.backbone}, seed {args.seed}, {args.steps} dense steps, {args.scenes} scenes a task. The whole model: "
             + ", ".join(f"{name} {value:.3f}" for name, value in found["whole"].items()),
             "layer" + "".join(f"{name:>16}" for name in names)]
    for layer, row in enumerate(zip(*(found[name] for name in names))):
        lines.append(f"{layer:>5}" + "".join(f"{'-' if value is None else f'{value:.3f}':>16}" for value in row))
    for first in (0, 1):
        alike = (rank_correlation(found[f"rank {task}"][first:], found[f"lost ce {task}"][first:]) for task in TASKS)
        lines.append(f"rank correlation of ARank with the cross-entropy lost, from layer {first} on: "
                     + ", ".join(f"{task} {value:.2f}" for task, value in zip(TASKS, alike)))
    return "\n".join(lines)


def rank_correlation(a: list, b: list) -> float:
    """Spearman's, of values without ties."""
    return toy.torch.corrcoef(toy.torch.tensor([a, b]).argsort(1).argsort(1).float())[0, 1].item()


def draw(found: dict) -> str:
    """The table as SVG: ARank, attention, accuracy lost, tokens won, each by layer; t2i and mmu
    in two colours.
    """
    depth = len(found["rank t2i"])
    panels = (("ARank over length", "rank {}"), ("attention received: image, text (dashed)", "image {}", "text {}"),
              ("accuracy lost without the layer", "lost {}"),
              ("share that wins; with the toy's weights (dashed)", "won {} equal", "won {} toy"))
    out = []
    for number, (title, *names) in enumerate(panels):
        lines = [([(x, y) for x, y in enumerate(found[name.format(task)]) if y is not None], color, dash)
                 for task, color in zip(TASKS, COLORS[1:]) for name, dash in zip(names, ("", "4 4"))]
        axes = Panel(number % 2, [depth - 1], [y for points, *_ in lines for _, y in points], log=False)
        body = [axes.frame(title, "layer"), axes.ticks(range(depth), round_steps(*axes.y, log=False), unit=1)]
        for points, color, dash in lines:
            body += [axes.line(points, color, dash), axes.dots(points, color)]
        out.append(f'<g transform="translate(0, {number // 2 * (HIGH + GAP)})">{"".join(body)}</g>')
    legend = "".join(f'<text x="{LEFT + 60 * i}" y="{TOP + 2 * HIGH + GAP + 60}" fill="{color}">{task}</text>'
                     for i, (task, color) in enumerate(zip(TASKS, COLORS[1:])))
    return svg(LEFT + 2 * WIDE + GAP + 30, TOP + 2 * HIGH + GAP + 80, "\n".join([*out, legend]))


# What tasks gain from each other

def only(sampler, tasks):
    """The same samples, those of `tasks` alone."""
    return lambda: {task: batch for task, batch in sampler().items() if task in tasks}


def synergy(world, tokenizer, data, both, args, device) -> list:
    """[{"model": .., scores}]: dense and UniMoD, trained for both tasks and for each alone."""
    setting = toy.SETTINGS[args.backbone]
    sampler = lambda part: data(part, setting["t2i"], setting["mmu"])
    plan = layer_switch(both, {task: batch.to(device) for task, batch in data(1, 20, 50)().items()}, setting["budget"])
    rows = []
    for tasks in (TASKS, ("t2i",), ("mmu",)):
        dense = both
        if len(tasks) == 1:
            toy.torch.manual_seed(args.seed)
            dense = toy.dense_model(both.config, device)
            toy.train(dense, only(sampler(0), tasks), args.steps, 0.0, device, tasks[0], setting["weights"])
        for method in ("dense", "unimod"):
            own = plan if method == "unimod" else Plan.dense(plan.n_layer, TASKS)
            model = dense.with_plan(Plan({task: own.keep[task] for task in tasks}))
            label = f"{' + '.join(tasks)}, {method}"
            toy.train(model, only(sampler(2), tasks), args.steps // 2, 0.7, device, label, setting["weights"])
            seen = only(data(4, SAMPLES // 2, SAMPLES // 2), tasks)()
            calibrate(model, {task: batch.to(device) for task, batch in seen.items()})
            rows.append({"model": label, **score(model, world, tokenizer, data, args, (False, True), tasks)})
            print(show_row(rows[-1]), flush=True)
    return rows


def show_row(row: dict) -> str:
    return f"{row['model']:<20}" + "".join(f"{name:>10}{value:>7.3f}" for name, value in row.items() if name != "model")


# How far a plan can be trusted

def plans(world, tokenizer, data, dense, args, device) -> dict:
    """{"samples": a row for each number of samples, "measures": {measure: keep ratios, {task:
    row}}}.
    """
    budget, lengths = toy.SETTINGS[args.backbone]["budget"], {task: tokenizer.length(task) for task in TASKS}

    def switch(counts: tuple, part: int, measure: str = MEASURES[0]) -> tuple[dict, dict]:
        """(ARank, keep ratios) from fresh samples; every part has its own."""
        samples = {task: batch.to(device) for task, batch in data(part, *counts)().items()}
        table = measured(dense, samples, measure)
        return table, plan_from_arank(table, dense.config, lengths, budget).keep

    rows = []
    for count in tqdm(COUNTS, desc="samples", unit="count"):
        drawn = [switch((count, count), 10 + part) for part in range(DRAWS)]
        ranks, keeps = (toy.torch.tensor([[table[task] for task in TASKS] for table in tables]) for tables in zip(*drawn))
        usual = (keeps < 1).float().mean(0).round()  # (tasks, layers): is the layer switched?
        rows.append({"samples": count, "arank": (ranks.std(0) / ranks.mean(0)).mean().item(),
                     "keep": keeps.std(0).mean().item(), "kind": ((keeps < 1) != usual).float().mean().item()})
        print(f"{count} samples of each task: ARank varies by {rows[-1]['arank']:.1%}, keep ratios by {rows[-1]['keep']:.3f} "
              f"(standard deviation of {DRAWS} draws, mean over layers), other kind: {rows[-1]['kind']:.1%}", flush=True)
    found = {measure: switch((20, 50), 1, measure)[1] for measure in MEASURES}
    for measure, keep in found.items():
        print(f"{measure:<12}" + "  ".join(f"{task} " + " ".join(f"{k:.2f}" for k in row) for task, row in keep.items()))
    return {"samples": rows, "measures": found}


def main() -> None:
    parser = cli(__doc__.split("\n")[0], ("observations", "synergy", "plans"), steps=1000)
    parser.add_argument("--out", help="a file for the numbers, JSON; observations are drawn beside it, as .svg")
    args, device = parser.parse_args(), toy.find_device()
    try:
        ready = begin(args, device)
    except ValueError as error:
        parser.error(error)
    found = {"observations": observations, "synergy": synergy, "plans": plans}[args.field](*ready, args, device)
    if args.field == "observations":
        print(show_observations(found, args))
    if args.out:
        write_json(args.out, vars(args) | {"found": found})
        if args.field == "observations":
            write_text(Path(args.out).with_suffix(".svg"), draw(found))


if __name__ == "__main__":
    main()
