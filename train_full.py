"""UniMoD on your own pictures and texts, in one process or on many GPUs: dense -> layer switch -> UniMoD.

    python -m unimod_mini.prepare SOURCE SHARDS
    python train_full.py --data SHARDS --out out/full                                    # one process
    torchrun --nproc-per-node 8 train_full.py --data SHARDS --out out/full --preset base --resume auto

The global batch, and so every loss, is the same however many processes share it and however often they accumulate. A
run can be killed at any moment: the same command with --resume auto goes on, to the same weights. `--help` lists the
settings. Reads top to bottom: settings, what a run works with, beginning and going on, the layer switch, what is shown,
the loop. The step itself is in unimod_mini/train/trainer.py.
"""

import math
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from unimod_mini import (METHODS, ModelConfig, Plan, UnifiedTransformer, arank_table, calibrate,
                         plan_for_budget, predictor_report, save_checkpoint)
from unimod_mini.train import checkpoints, cuda_graphs as graphs
from unimod_mini.config import PRESETS as PUBLISHED
from unimod_mini.console import command
from unimod_mini.train.distributed import Ranks, asked_to_stop, from_first, join
from unimod_mini.atomic_files import write_json
from unimod_mini.flops import flops_ratio
from unimod_mini.train.metrics import Clock, Journal, figures, line, samples
from unimod_mini.layer_switch import BY_ARANK, least_cost, show_table
from unimod_mini.objectives import TASK_WEIGHTS
from unimod_mini.plan import TASKS
from unimod_mini.train.trainer import Run, share_out, to_device
from unimod_mini.console import flag
from unimod_mini.train.flags import help_of, listing, nearest, overrides
from unimod_mini.data.shards import Loader, Shards
from unimod_mini.device import find_device, find_precision
from unimod_mini.transformer import PRECISIONS

# --------------------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------------------

# layers, heads, key/value heads of emu3, width; and what goes with them. MLP: 4 D for showo, 3 D (gated) for emu3.
PRESETS = {
    "tiny": ((2, 2, 1, 32), {"steps": 20, "warmup": 5, "lr": 3e-3, "eval_samples": 16}),             # tests
    "laptop": ((8, 4, 2, 128), {"t2i": 16, "mmu": 16, "lr": 2e-3, "weight_decay": 0.01}),            # 2 M, a CPU
    "base": ((12, 10, 5, 640), {"t2i": 64, "mmu": 64, "steps": 10000, "warmup": 500, "lr": 6e-4}),   # 60 M, one GPU
}
CHOICES = {"preset": (*PRESETS, "init", *PUBLISHED), "method": METHODS, "optimizer": ("adamw", "muon"),
           "decay": ("cosine", "linear"), "parallel": ("ddp", "fsdp"), "resume": ("no", "auto"),
           "precision": ("auto", *PRECISIONS)}
RANGES = {**dict.fromkeys(("steps", "accumulate", "warmup", "log_every", "eval_every", "eval_samples", "sample_every",
                           "save_every", "keep_checkpoints"), (1, math.inf)),
          **dict.fromkeys(("lr", "muon_lr", "clip", "timeout"), (1e-12, 1e12)), "budget": (0.01, 1), "dense": (0, 1),
          "drop": (0, 1), "ema": (0, 0.99999), **dict.fromkeys((*TASKS, "weight_decay"), (0, math.inf))}
# what a run may change: these at any time, those before the layer switch
FREE = {"out", "data", "init", "resume", "steps", "parallel", "accumulate", "compile", "graphs",
        "activation_checkpointing", "device", "precision", "timeout", "log_every", "eval_every", "eval_samples", "sample_every",
        "save_every", "keep_checkpoints", "lr", "muon_lr", "weight_decay", "warmup", "decay", "clip"}
UNTIL_SWITCH = {"dense", "method", "budget"}
SWITCH = {"t2i": 20, "mmu": 50, "lm": 20}                  # samples that ARank is measured on (the paper's numbers)
DRAWING = {"temperature": 1.0, "guidance": 1.0, "steps": 16}
SHOWN, CALIBRATION, PATIENCE = 4, 32, 5                    # samples on a sheet; for thresholds; skipped steps in a row


@dataclass(frozen=True)
class Config:
    data: str = ""                 # the folder that python -m unimod_mini.prepare wrote
    out: str = "out/full"          # where everything is written: model.pt, checkpoints/, samples/, metrics.jsonl ..
    preset: str = "laptop"         # sizes and settings: tiny, laptop, base, one of ModelConfig.preset, or --init's: init
    init: str = ""                 # begin with these weights (and sizes): of a run, a checkpoint, Hugging Face's folder
    plan: str = ""                 # UniMoD with this plan from the first step; "": dense, then the layer switch
    resume: str = "no"             # or auto: go on from the newest whole checkpoint of --out, if there is any
    steps: int = 2000              # of both stages together
    dense: float = 0.67            # share of the steps before the layer switch; 1: dense to the end
    method: str = "unimod"         # the plan that the layer switch makes (layer_switch.METHODS)
    budget: float = 0.6            # its training FLOPs over those of dense, of a step's samples
    t2i: int = 8                   # samples of each task in a step, over all processes and accumulation steps
    mmu: int = 8                   # of questions on pictures
    lm: int = 0                    # of texts alone
    accumulate: int = 1            # forward and backward passes a step; gradients are exchanged once
    drop: float = 0.1              # share of captions that are emptied, for guidance
    seed: int = 0                  # of weights and order of samples
    optimizer: str = "adamw"       # or muon (on the matrices of the blocks; not with fsdp)
    lr: float = 1e-3               # peak rate of AdamW
    muon_lr: float = 0.02          # peak rate of Muon
    weight_decay: float = 0.1      # of AdamW's matrices (Muon's: 0.01)
    warmup: int = 100              # steps up to the peak rate, again after the layer switch
    decay: str = "cosine"          # or linear: the last stage's way from the peak to 0
    clip: float = 1.0              # largest norm of the gradient
    ema: float = 0.0               # > 0: evaluate, draw and publish an average of the weights with this decay
    parallel: str = "ddp"          # or fsdp: weights, gradients and optimiser are sharded over the processes
    compile: bool = False          # torch.compile
    graphs: bool = False           # CUDA graphs: forward and backward in one launch (one process, without torchrun)
    activation_checkpointing: bool = False    # forget what a block computes, do it again in the backward pass
    device: str = ""               # cuda, mps or cpu; found by itself when not given
    precision: str = "auto"        # of matrix products: float32, bf16; auto: bf16 where the hardware multiplies it
    timeout: float = 30.0          # minutes that a process waits for the others before it gives up
    log_every: int = 10            # steps between two lines
    eval_every: int = 500          # .. two evaluations on the held-out split (and before a checkpoint)
    eval_samples: int = 256        # of each task
    sample_every: int = 500        # .. two sheets of pictures and answers
    save_every: int = 500          # .. two checkpoints
    keep_checkpoints: int = 3      # the last ones, besides the best

    def __post_init__(self):
        """ValueError for a value that nothing can be done with, naming the setting."""
        for name, value in asdict(self).items():
            key, low, high = flag(name), *RANGES.get(name, (-math.inf, math.inf))
            if name in CHOICES and value not in CHOICES[name]:
                raise ValueError(f"{key} {value}" + nearest(value, CHOICES[name]))
            if name not in CHOICES and isinstance(value, (int, float)) and not low <= value <= high:
                raise ValueError(f"{key} {value}: expected {low} to {high}" if high < math.inf else
                                 f"{key} {value}: expected {low} or more")
        if self.preset == "init" and not self.init:
            raise ValueError("--preset init takes the sizes of --init, which is not given")
        if self.graphs and (self.compile or self.activation_checkpointing or self.accumulate > 1):
            raise ValueError("--graphs records whole eager steps, in one pass that keeps its activations: leave out "
                             "--compile, --activation-checkpointing and --accumulate")
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise ValueError("--optimizer muon needs whole matrices, --parallel fsdp shards them: use adamw, or ddp")


def parse(argv=None) -> Config:
    """Defaults, then the preset's settings, then what was given."""
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}\nSettings, their types and defaults (a preset brings its own for some):\n{help_of(Config)}")
        sys.exit()
    given = overrides(Config, argv)
    if not given.get("data"):
        raise ValueError("--data is missing: the folder that python -m unimod_mini.prepare SOURCE FOLDER wrote")
    preset = given.get("preset", "init" if given.get("init") else Config.preset)
    _, settings = PRESETS.get(preset, (None, {}))
    return Config(**settings | given | {"preset": preset})


def model_config(preset: str, tokenizer, init: str = "") -> ModelConfig:
    """The preset's sizes with the vocabulary and the lengths of the tokenizer; "init": those of the weights `init`.
    ValueError for another backbone or, there, another vocabulary."""
    fitted = tokenizer.sizes()
    if preset == "init":
        config = checkpoints.as_data(checkpoints.sizes_of(init), fitted["max_length"], tokenizer.image_start)
        theirs, ours = ((x.backbone, x.vocab_size, x.image_start) for x in (config, tokenizer))
        if ours != theirs or config.image_positions not in (0, tokenizer.n_image):
            raise ValueError("backbone, vocabulary, first image code and codes of a picture are "
                             f"{*ours, tokenizer.n_image} in --data and {*theirs, config.image_positions or 'any'} in "
                             f"--init {init}: prepare the data with --backbone, --text and --image of these weights")
        return config
    if preset in PUBLISHED:
        config = ModelConfig.preset(preset)
        if config.backbone != tokenizer.backbone:
            raise ValueError(f"--preset {preset} is of the {config.backbone} backbone, the shards are of "
                             f"{tokenizer.backbone}")
        return replace(config, **fitted, image_positions=config.image_positions and tokenizer.n_image)
    (layers, heads, groups, width), showo = PRESETS[preset][0], tokenizer.backbone == "showo"
    kind = {"n_kv_head": heads, "d_ff": 4 * width, "rope_fraction": 0.5} if showo else {
        "n_kv_head": groups, "d_ff": 3 * width, "rope_theta": 1e6}
    return ModelConfig(tokenizer.backbone, layers, heads, d_model=width, qk_norm=True, **kind, **fitted,
                       image_positions=tokenizer.n_image)


# --------------------------------------------------------------------------------------------------------------
# The job: what stays as it is during a run
# --------------------------------------------------------------------------------------------------------------

class Job(NamedTuple):
    config: Config
    ranks: Ranks
    device: torch.device
    shards: Shards
    counts: dict                   # {task: samples of a step}, the trained tasks alone
    lengths: dict                  # {task: tokens of a sample}
    loader: Loader
    held: tuple                    # micro-batches of the held-out split and their parts, as share_out gives them
    out: Path
    about: dict                    # what a checkpoint belongs to

    @property
    def loads(self) -> bool:
        """Does this rank need whole weights when a stage begins? FSDP takes those of the first."""
        return self.ranks.first or self.config.parallel == "ddp"

    def say(self, *lines) -> None:
        if self.ranks.first:
            print(*lines, sep="\n", flush=True)

    def batches(self, wanted: dict, split: str = "train") -> dict:
        """{task: Batch} of so many samples of the trained tasks, always the same ones, no caption dropped."""
        wanted = {task: n for task, n in wanted.items() if task in self.counts and self.shards.count(task, split)}
        return Loader(self.shards, wanted, seed=0, drop=0.0, split=split).batches(0)[0] if wanted else {}


def make_job(config: Config, ranks: Ranks, device: torch.device) -> Job:
    """ValueError and FileNotFoundError for data that cannot be trained on."""
    if config.graphs:
        graphs.check(device)
    shards = Shards(config.data, checksums=ranks.local == 0)
    counts = {task: getattr(config, task) for task in TASKS if getattr(config, task)}
    loader = Loader(shards, counts, config.seed, ranks.rank, ranks.world, config.accumulate, config.drop)
    lengths = {task: shards.tokenizer.length(task) for task in counts}
    held = held_out(config, shards, counts, ranks)
    about = {"shards": checkpoints.identity(shards.folder), "tokenizer": shards.tokenizer_hash,
             "config": asdict(config)}
    held = held, share_out(held)[0]
    return Job(config, ranks, device, shards, counts, lengths, loader, held, Path(config.out), about)


def held_out(config: Config, shards: Shards, counts: dict, ranks: Ranks) -> list:
    """[{task: Batch}], this rank's part of --eval-samples of the held-out split, in pieces of a micro-batch's size.

    As many as fill whole steps; where there are fewer than one step takes, as many as the ranks can share.
    """
    held = []
    for task, n in counts.items():
        there = min(config.eval_samples, shards.count(task, "held"))
        few = max(1, there // ranks.world) * ranks.world
        piece, pieces = (n // config.accumulate, there // n * config.accumulate) if there >= n else (few, 1)
        if there:
            loader = Loader(shards, {task: piece}, 0, ranks.rank, ranks.world, drop=0.0, split="held")
            held += [loader.batches(number)[0] for number in range(pieces)]
    return held


# --------------------------------------------------------------------------------------------------------------
# Beginning, and going on
# --------------------------------------------------------------------------------------------------------------

def begin(job: Job) -> Run:
    """A new run, or the newest whole checkpoint of --out brought back. ValueError when the settings do not fit it."""
    config, shards = job.config, job.shards
    given = Plan.load(config.plan) if config.plan else None
    path, facts = from_first(lambda: find_start(job, given))
    plan = Plan(**facts["plan"]) if path else given
    place = (facts["stage"], facts["step"], facts["since"]) if path else ("unimod" if plan else "dense",)
    sizes = from_first(lambda: checkpoints.stored_sizes(path) if path else
                       model_config(config.preset, shards.tokenizer, config.init))
    if missing := [task for task in job.counts if plan and task not in plan.tasks]:
        raise ValueError(f"--plan {config.plan} has no row for {', '.join(missing)}: add it, or set --{missing[0]} 0")
    if place[0] == "dense" and config.dense < 1 and config.method in BY_ARANK:
        if (least := least_cost(sizes, job.lengths, job.counts)) > config.budget:
            raise ValueError(f"--budget {config.budget} is out of reach: the head alone costs {least:.2f} of dense "
                             f"with {sizes.vocab_size} ids; a higher budget, a deeper preset, or a smaller vocabulary")
    torch.manual_seed(config.seed)                         # the same weights on every rank
    if config.init and not path and job.loads:
        model = checkpoints.begin_with(config.init, sizes, plan)
    else:
        with torch.device("cpu" if job.loads else "meta"):
            model = UnifiedTransformer(sizes, plan)
    torch.manual_seed(config.seed * 1_000_003 + job.ranks.rank)              # but its own dropout
    run = Run(model, config, job.device, job.lengths, *place)
    if path:
        checkpoints.load(path, run.tensors(), job.ranks)
        job.say(f"going on from {path}, {run.step} of {config.steps} steps done, stage {run.stage}")
    return run


def find_start(job: Job, given: Plan | None) -> tuple:
    """(path, facts) of the checkpoint to go on from, or (None, None)."""
    folder = job.out / "checkpoints"
    if job.config.resume == "no":
        if any(folder.glob("step-????????")):
            raise ValueError(f"{job.out} holds a run already: --resume auto goes on with it, or choose another --out")
        return None, None
    path = checkpoints.newest(folder)
    if path is None:
        return None, None
    facts = checkpoints.facts(path)
    switches = facts["stage"] == "dense" and job.config.dense < 1            # then a step of UniMoD is to come at least
    if job.config.steps < facts["step"] + switches:
        raise ValueError(f"{path} is past --steps {job.config.steps}, in stage {facts['stage']}: ask for more steps")
    free = FREE | (UNTIL_SWITCH if facts["stage"] == "dense" else set())
    changed = checkpoints.refuse_another(path, facts, job.about, free)
    job.say(*(f"changed since {path.name}: {text}" for name, text in changed.items() if name != "resume"))
    if given is not None and given != Plan(**facts["plan"]):
        raise ValueError(f"{path} belongs to a run with another plan than {job.config.plan} has now")
    return path, facts


def save(run: Run, job: Job, held: float | None) -> None:
    """A checkpoint of this step; the last --keep-checkpoints of them and the best stay."""
    facts = {"stage": run.stage, "since": run.since, "held": held, "world": job.ranks.world, **job.about,
             "plan": asdict(run.model.plan), "model": asdict(run.model.config)}
    checkpoints.save(job.out / "checkpoints", run.step, run.tensors(), facts, job.ranks)
    if job.ranks.first:
        checkpoints.prune(job.out / "checkpoints", job.config.keep_checkpoints)


# --------------------------------------------------------------------------------------------------------------
# Dense -> layer switch -> UniMoD
# --------------------------------------------------------------------------------------------------------------

def switch(run: Run, job: Job) -> None:
    """ARank of the dense model on the first rank, the plan on every rank: the same weights with fresh routers.

    Optimisers and average begin anew, so the rate climbs again over --warmup steps.
    """
    model, sizes = run.bare(average=False, here=job.loads), run.model.config
    plan = Plan(*from_first(partial(measure, model, job, run.step)))
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if job.loads else "meta"):
        torch.default_generator.manual_seed(job.config.seed + 1)             # the same routers on every rank
        model = model.to("cpu").with_plan(plan) if job.loads else UnifiedTransformer(sizes, plan)
    run.enter("unimod", model, since=run.step)
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)     # from here on, that of UniMoD


def measure(model: UnifiedTransformer, job: Job, step: int) -> tuple:
    """ARank -> the fields of the method's plan; both are printed, the plan is written."""
    wanted, config = {task: SWITCH[task] for task in job.counts}, model.config
    told = " + ".join(f"{n} {task}" for task, n in wanted.items())
    print(f"layer switch after {step} steps: ARank over length, on {told} samples", flush=True)
    table = arank_table(model.to(job.device), to_device(job.batches(wanted), job.device))
    print(show_table(table))
    plan = plan_for_budget(job.config.method, table, config, job.lengths, job.config.budget, job.counts)
    plan.save(job.out / "plan.json")
    saved = 1 - flops_ratio(config, plan, job.lengths, "train", job.counts)
    print(f"plan ({job.config.method}), {saved:.1%} of a step's training FLOPs saved, full n x n attention\n{plan}",
          flush=True)
    return plan.keep, plan.shared_router


# --------------------------------------------------------------------------------------------------------------
# What is shown
# --------------------------------------------------------------------------------------------------------------

def report(run: Run, job: Job, journal: Journal | None, losses, norm, clock: Clock) -> None:
    """The only place where a step waits for the device: its line, and the end of a run whose steps are all skipped."""
    in_a_row = int(run.skipped[0])                         # on every rank, so that all of them stop
    if job.ranks.first:
        row = figures(run, job.counts, job.lengths, losses, norm, clock.lap(run.step), job.ranks.world)
        journal.write(row)
        print(line(row, job.config.steps), flush=True)
    if in_a_row >= PATIENCE:
        raise Diverged(f"the last {in_a_row} steps had a loss or a gradient that is not finite and were skipped "
                       f"(losses {losses.tolist()}, norm {norm.item()}): the weights are those of step "
                       f"{run.step - in_a_row}. Look at --lr (lower it), --warmup (lengthen it), --clip, and at the "
                       "samples of these steps")


def finished_model(run: Run, job: Job) -> UnifiedTransformer | None:
    """The (averaged) model with thresholds for causal routing on the first rank, None on the others; all call it."""
    model = run.bare(average=True, here=job.ranks.first)
    if model is None:
        return None
    model.to(job.device)
    calibrate(model, to_device(job.batches(dict.fromkeys(job.counts, CALIBRATION)), job.device))
    return model


def membership(model: UnifiedTransformer, job: Job) -> dict:
    """predictor_report on held-out samples (training's, if there are none), its means printed."""
    wanted = dict.fromkeys(job.counts, CALIBRATION)
    found = predictor_report(model, to_device(job.batches(wanted) | job.batches(wanted, "held"), job.device))
    if found["by_layer"]:
        print("predictors agree with top-k on {accuracy:.1%} of the tokens (base rate {base_rate:.1%}); causal routing "
              "keeps {capacity_realised:.1%}, top-k {capacity_trained:.1%}".format(**found), flush=True)
    return found


def draw(model: UnifiedTransformer, job: Job, step: int) -> None:
    """The same captions drawn and the same questions answered every time, held-out ones if there are any."""
    shown = {}
    for task in job.counts:
        split = "held" if job.shards.count(task, "held") else "train"
        shown[task] = [job.shards.sample(task, i, split) for i in range(min(SHOWN, job.shards.count(task, split)))]
    print(samples(model, job.shards.tokenizer, shown.get("t2i", []), shown.get("mmu", []), DRAWING,
                  job.out / "samples" / f"step-{step:08d}.png"), flush=True)


def due(run: Run, job: Job, journal: Journal | None, clock: Clock) -> dict:
    """Evaluation, samples and checkpoint, where this step is one for them; returns the losses of an evaluation."""
    config, last = job.config, run.step == job.config.steps
    keeps = last or run.step % config.save_every == 0
    judges = (keeps or run.step % config.eval_every == 0) and job.held[0]
    draws = run.step % config.sample_every == 0 and not last
    with clock.paused() if keeps or judges or draws else nullcontext():
        held = evaluate(run, job, journal) if judges else {}
        if keeps:                                          # first: a drawing that fails loses nothing
            save(run, job, held.get("all"))
        if draws and (model := finished_model(run, job)) is not None:
            draw(model, job, run.step)
    return held


def evaluate(run: Run, job: Job, journal: Journal | None) -> dict:
    """{task: loss on the held-out split, routed by top-k as in training, "all": their weighted sum}; all ranks call it,
    the first shows it."""
    held = run.evaluate(*job.held)
    held["all"] = sum(TASK_WEIGHTS[task] * loss for task, loss in held.items())
    if job.ranks.first:
        journal.write({"step": run.step, **{f"held_{name}": loss for name, loss in held.items()}})
        rule = "held out, top-k (non-causal)  " if run.model.plan.routes else "held out  "
        print(rule + "  ".join(f"{name} {loss:.4f}" for name, loss in held.items()), flush=True)
    return held


# --------------------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------------------

class Diverged(RuntimeError):
    """Too many steps in a row were skipped."""


def train(run: Run, job: Job, journal: Journal | None, asked: list) -> dict:
    """Steps, and what is due after each, until the last one, a SIGTERM or a Ctrl-C. Returns the last evaluation."""
    config, clock, held = job.config, Clock(run.step, job.device), {}
    while run.step < config.steps:
        end = config.steps
        if run.stage == "dense" and config.dense < 1:
            end = min(round(config.dense * config.steps), config.steps - 1)
            if run.step >= end:
                if share_out([], bool(asked))[1]:          # who asks to stop does not wait for the switch
                    return {}
                switch(run, job)
                clock.lap(run.step)                        # no lap holds steps of both stages
                continue
        for _, batches in job.loader.read_ahead(run.step, end):
            parts, stop = share_out(batches, bool(asked))
            if stop:
                return {}
            losses, norm = run.advance(batches, parts)
            if run.step % config.log_every == 0 or run.step in (1, config.steps):
                report(run, job, journal, losses, norm, clock)
            held = due(run, job, journal, clock)
    return held


def introduce(run: Run, job: Job) -> None:
    """The whole configuration, printed and saved; the model, the data and where it runs."""
    job.out.mkdir(parents=True, exist_ok=True)
    write_json(job.out / "settings.json", asdict(job.config))
    there = {task: [job.shards.count(task, split) for split in ("train", "held")] for task in job.counts}
    job.say(listing(job.config), f"{run.model.config}",
            f"{sum(p.numel() for p in run.model.parameters()):,} parameters; {job.ranks.world} process(es) on "
            f"{job.device.type}, torch {torch.__version__}, {run.model.precision}",
            *(f"{task}: {job.counts[task]} of {n} samples a step, {held} held out, {job.lengths[task]} tokens each"
              for task, (n, held) in there.items()))


def main(argv=None) -> dict:
    config = parse(argv)
    device = find_device(config.device or None)
    config = replace(config, precision=find_precision(config.precision, device))
    with asked_to_stop() as asked, join(device, config.timeout) as ranks:
        job = make_job(config, ranks, device)
        run = begin(job)
        if ranks.first:
            introduce(run, job)
        journal = Journal(job.out, run.step) if ranks.first else None
        held = train(run, job, journal, asked)
        if run.step < config.steps:
            save(run, job, None)
            job.say(f"stopped by a signal after {run.step} steps and saved: --resume auto goes on")
        else:
            model = finished_model(run, job)
            if model is not None:
                save_checkpoint(job.out / "model.pt", model, tokenizer=job.shards.tokenizer.state(), drawing=DRAWING,
                                predictor=membership(model, job))
                print(f"{job.out}/model.pt written", flush=True)
                draw(model, job, run.step)
        if journal is not None:
            journal.close()
        return {"step": run.step, "stage": run.stage, "held": held, "skipped": int(run.skipped[1])}


if __name__ == "__main__":
    with command(errors=(ValueError, OSError, ImportError, Diverged)):
        main()
