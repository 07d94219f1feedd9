"""UniMoD on your own pictures and texts, in one process or on many GPUs: dense -> switch -> UniMoD.

    python -m unimod_mini.prepare SOURCE SHARDS
    python train_full.py --data SHARDS --out out/full                                  # one process
    torchrun --nproc-per-node 8 train_full.py --data SHARDS --out out/full --preset base

The global batch, and so every loss, is the same however many processes share it and however often
they accumulate. A run can be killed at any moment: the same command with --resume auto goes on, to
the same weights.

Reads top to bottom: settings, what a run works with, beginning and going on, the layer switch, what
is shown, the loop. The step itself is in unimod_mini/train/trainer.py.
"""

import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from unimod_mini import (METHODS, ModelConfig, Plan, UnifiedTransformer, arank_table, calibrate,
                         plan_for_budget, predictor_report, save_checkpoint)
from unimod_mini.atomic_files import write_json
from unimod_mini.config import PRESETS
from unimod_mini.console import command
from unimod_mini.data.shards import Loader, Shards
from unimod_mini.device import find_device, find_precision
from unimod_mini.flops import flops_ratio
from unimod_mini.layer_switch import BY_ARANK, least_cost, show_table
from unimod_mini.objectives import TASK_WEIGHTS
from unimod_mini.plan import TASKS
from unimod_mini.train import checkpoints, cuda_graphs
from unimod_mini.train.command_line import SettingsParser, check_settings, listing, setting
from unimod_mini.train.distributed import (Ranks, any_rank, asked_to_stop, from_first_rank,
                                           process_group)
from unimod_mini.train.metrics import (MetricsLog, StepClock, draw_and_answer, row_text, step_row)
from unimod_mini.train.trainer import Trainer, shares_of_step, to_device
from unimod_mini.transformer import PRECISIONS

# --- Settings ---

# Sizes by name: layers, heads, key/value heads of emu3, width (MLP: 4 D for showo, 3 D for emu3);
# and the settings that go with them. Beside these, --preset takes the true sizes of config.PRESETS.
SIZES = {
    "tiny": ((2, 2, 1, 32), {"steps": 20, "warmup": 5, "lr": 3e-3, "eval_samples": 16}),   # tests
    "laptop": ((8, 4, 2, 128), {"t2i": 16, "mmu": 16, "lr": 2e-3, "weight_decay": 0.01}),  # 2 M
    "base": ((12, 10, 5, 640), {"t2i": 64, "mmu": 64, "steps": 10000, "warmup": 500,
                                "lr": 6e-4}),                                      # 60 M, one GPU
}
# what a run that goes on may change: these at any time, those before the layer switch
FREE = {"out", "data", "init", "resume", "steps", "parallel", "accumulate", "compile", "graphs",
        "activation_checkpointing", "device", "precision", "timeout", "log_every", "eval_every",
        "eval_samples", "sample_every", "save_every", "keep_checkpoints", "lr", "muon_lr",
        "weight_decay", "warmup", "decay", "clip"}
UNTIL_SWITCH = {"dense", "method", "budget"}
SWITCH = {"t2i": 20, "mmu": 50, "lm": 20}                  # samples for ARank (the paper's numbers)
DRAWING = {"temperature": 1.0, "guidance": 1.0, "steps": 16}
SHOWN = 4                                                  # samples of a task on a sheet
CALIBRATION = 32                                           # samples that thresholds are set on
PATIENCE = 5                                               # steps in a row that may be skipped


@dataclass(frozen=True)
class Config:
    data: str = setting("", "the folder that python -m unimod_mini.prepare wrote")
    out: str = setting("out/full", "where model.pt, checkpoints, samples and metrics are written")
    preset: str = setting("laptop", "sizes, and settings that go with them: tiny, laptop, base, a "
                          "name of ModelConfig.preset, or init: those of --init",
                          choices=(*SIZES, "init", *PRESETS))
    init: str = setting("", "begin with these weights (and sizes): of a run, a checkpoint, or a "
                        "folder of Hugging Face")
    plan: str = setting("", "UniMoD with this plan from the first step, without a layer switch")
    resume: str = setting("no", "auto: go on from the newest whole checkpoint of --out, if any",
                          choices=("no", "auto"))
    steps: int = setting(2000, "of both stages together", low=1)
    dense: float = setting(0.67, "share of the steps before the layer switch; 1: dense to the end",
                           low=0, high=1)
    method: str = setting("unimod", "the plan that the layer switch makes", choices=METHODS)
    budget: float = setting(0.6, "its training FLOPs over those of dense", low=0.01, high=1)
    t2i: int = setting(8, "captions in a step, over all processes and accumulation steps", low=0)
    mmu: int = setting(8, "questions on pictures in a step", low=0)
    lm: int = setting(0, "texts alone in a step", low=0)
    accumulate: int = setting(1, "forward and backward passes a step", low=1)
    drop: float = setting(0.1, "share of captions that are emptied, for guidance", low=0, high=1)
    seed: int = setting(0, "of weights and the order of samples")
    optimizer: str = setting("adamw", "muon: on the matrices of the blocks (not with fsdp)",
                             choices=("adamw", "muon"))
    lr: float = setting(1e-3, "peak rate of AdamW", low=1e-12, high=1e12)
    muon_lr: float = setting(0.02, "peak rate of Muon", low=1e-12, high=1e12)
    weight_decay: float = setting(0.1, "of AdamW's matrices", low=0)
    warmup: int = setting(100, "steps up to the peak rate, again after the layer switch", low=1)
    decay: str = setting("cosine", "the last stage's way from the peak to 0",
                         choices=("cosine", "linear"))
    clip: float = setting(1.0, "largest norm of the gradient", low=1e-12, high=1e12)
    ema: float = setting(0.0, "above 0: evaluate, draw and publish an average of the weights with "
                         "this decay", low=0, high=0.99999)
    parallel: str = setting("ddp", "fsdp: weights, gradients and optimizer are sharded",
                            choices=("ddp", "fsdp"))
    compile: bool = setting(False, "torch.compile")
    graphs: bool = setting(False, "CUDA graphs: forward and backward in one launch (one process)")
    activation_checkpointing: bool = setting(False, "compute blocks again in the backward pass")
    device: str = setting("", "cuda, mps or cpu; found by itself when not given")
    precision: str = setting("auto", "of matrix products; auto: bf16 where the hardware "
                             "multiplies it, else float32", choices=("auto", *PRECISIONS))
    timeout: float = setting(30.0, "minutes that a process waits for the others", low=1e-12,
                             high=1e12)
    log_every: int = setting(10, "steps between two lines", low=1)
    eval_every: int = setting(500, "steps between two evaluations on the held-out split", low=1)
    eval_samples: int = setting(256, "samples of each task in an evaluation", low=1)
    sample_every: int = setting(500, "steps between two sheets of pictures and answers", low=1)
    save_every: int = setting(500, "steps between two checkpoints", low=1)
    keep_checkpoints: int = setting(3, "the last ones that stay, besides the best", low=1)

    def __post_init__(self):
        """ValueError for a value that nothing can be done with, naming the setting."""
        check_settings(self)
        if self.preset == "init" and not self.init:
            raise ValueError("--preset init takes the sizes of --init, which is not given")
        slower = self.compile or self.activation_checkpointing or self.accumulate > 1
        if self.graphs and slower:
            raise ValueError("--graphs records whole eager steps in one pass: leave out --compile, "
                             "--activation-checkpointing and --accumulate")
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise ValueError("--optimizer muon needs whole matrices, --parallel fsdp shards them: "
                             "use adamw, or ddp")


def parser() -> SettingsParser:
    return SettingsParser(Config, __doc__ + "\nA preset brings its own defaults for some settings.")


def parse(argv=None) -> Config:
    """Defaults, then the preset's settings, then what was given."""
    given = parser().parse_given(sys.argv[1:] if argv is None else argv)
    if not given.get("data"):
        raise ValueError("--data is missing: the folder that python -m unimod_mini.prepare SOURCE "
                         "FOLDER wrote")
    default = "init" if given.get("init") else "laptop"
    preset = given.get("preset", default)
    _, settings = SIZES.get(preset, (None, {}))
    return Config(**settings | given | {"preset": preset})


def model_config(preset: str, tokenizer, init: str = "") -> ModelConfig:
    """The preset's sizes with the tokenizer's vocabulary and lengths; "init": those of `init`.

    ValueError for another backbone or, with "init", another vocabulary.
    """
    fitted, backbone = tokenizer.sizes(), tokenizer.backbone
    if preset == "init":
        return config_of_weights(init, tokenizer)
    if preset in PRESETS:
        config = ModelConfig.preset(preset)
        if config.backbone != backbone:
            raise ValueError(f"--preset {preset} is of the {config.backbone} backbone, the shards "
                             f"are of {backbone}")
        n_position = tokenizer.n_image if config.image_positions else 0
        return replace(config, **fitted, image_positions=n_position)
    (n_layer, n_head, groups, width), _ = SIZES[preset]
    if backbone == "showo":
        kind = {"n_kv_head": n_head, "d_ff": 4 * width, "rope_fraction": 0.5}
    else:
        kind = {"n_kv_head": groups, "d_ff": 3 * width, "rope_theta": 1e6}
    return ModelConfig(backbone, n_layer, n_head, d_model=width, qk_norm=True, **kind, **fitted,
                       image_positions=tokenizer.n_image)


def config_of_weights(init: str, tokenizer) -> ModelConfig:
    """The sizes of the weights `init`; ValueError unless they are made for this tokenizer."""
    config = checkpoints.as_data(checkpoints.sizes_of(init), tokenizer.sizes()["max_length"],
                                 tokenizer.image_start)
    theirs = config.backbone, config.vocab_size, config.image_start
    ours = tokenizer.backbone, tokenizer.vocab_size, tokenizer.image_start
    if ours != theirs or config.image_positions not in (0, tokenizer.n_image):
        raise ValueError("backbone, vocabulary, first image code and codes of a picture are "
                         f"{*ours, tokenizer.n_image} in --data and "
                         f"{*theirs, config.image_positions or 'any'} in --init {init}: prepare "
                         "the data with --backbone, --text and --image of these weights")
    return config


# --- The job: what stays as it is during a run ---

class Job(NamedTuple):
    config: Config
    ranks: Ranks
    device: torch.device
    shards: Shards
    counts: dict                   # {task: samples of a step}, of the trained tasks
    lengths: dict                  # {task: tokens of a sample}
    loader: Loader
    held: list                     # micro-batches of the held-out split ..
    held_shares: list              # .. and their shares, as shares_of_step gives them
    out: Path
    about: dict                    # what a checkpoint belongs to

    @property
    def loads(self) -> bool:
        """Does this rank need whole weights when a stage begins? FSDP takes those of the first."""
        return self.ranks.first or self.config.parallel == "ddp"

    def say(self, *lines) -> None:
        if self.ranks.first:
            print(*lines, sep="\n", flush=True)

    def batches(self, n: dict, split: str = "train") -> dict:
        """{task: Batch} of n[task] samples, always the same ones, no caption dropped."""
        n = {task: n[task] for task in self.counts if self.shards.count(task, split)}
        if not n:
            return {}
        batches = Loader(self.shards, n, seed=0, drop=0.0, split=split).batches(0)[0]
        return to_device(batches, self.device)


def make_job(config: Config, ranks: Ranks, device: torch.device) -> Job:
    """ValueError and FileNotFoundError for data that cannot be trained on."""
    if config.graphs:
        cuda_graphs.check_device(device)
    shards = Shards(config.data, checksums=ranks.local == 0)
    counts = {task: getattr(config, task) for task in TASKS if getattr(config, task)}
    lengths = {task: shards.tokenizer.length(task) for task in counts}
    loader = Loader(shards, counts, config.seed, ranks.rank, ranks.world, config.accumulate,
                    config.drop)
    held = held_out(config, shards, counts, ranks)
    about = {"shards": checkpoints.identity(shards.folder), "tokenizer": shards.tokenizer_hash,
             "config": asdict(config)}
    return Job(config, ranks, device, shards, counts, lengths, loader, held, shares_of_step(held),
               Path(config.out), about)


def held_out(config: Config, shards: Shards, counts: dict, ranks: Ranks) -> list:
    """[{task: Batch}], this rank's part of --eval-samples of the held-out split.

    In micro-batches, as many as fill whole steps; where there are fewer samples than a step takes,
    as many as the ranks can share.
    """
    held = []
    for task, n in counts.items():
        there = min(config.eval_samples, shards.count(task, "held"))
        if there == 0:
            continue
        size, n_batch = n // config.accumulate, there // n * config.accumulate
        if there < n:
            size, n_batch = max(1, there // ranks.world) * ranks.world, 1
        loader = Loader(shards, {task: size}, 0, ranks.rank, ranks.world, drop=0.0, split="held")
        held += [loader.batches(number)[0] for number in range(n_batch)]
    return held


# --- Beginning, and going on ---

def start(job: Job) -> Trainer:
    """A new run, or the newest whole checkpoint of --out. ValueError when settings do not fit."""
    config = job.config
    plan = Plan.load(config.plan) if config.plan else None
    path, facts = from_first_rank(lambda: checkpoint_to_resume(job, plan))
    stage, step, since = "unimod" if plan else "dense", 0, 0
    if path:
        plan = Plan(**facts["plan"])
        stage, step, since = facts["stage"], facts["step"], facts["since"]

    def sizes_of_run() -> ModelConfig:
        if path:
            return checkpoints.stored_sizes(path)
        return model_config(config.preset, job.shards.tokenizer, config.init)

    sizes = from_first_rank(sizes_of_run)
    check_plan(job, sizes, plan, stage)
    torch.manual_seed(config.seed)                         # the same weights on every rank
    if config.init and not path and job.loads:
        model = checkpoints.begin_with(config.init, sizes, plan)
    else:
        with torch.device("cpu" if job.loads else "meta"):
            model = UnifiedTransformer(sizes, plan)
    torch.manual_seed(config.seed * 1_000_003 + job.ranks.rank)        # but its own dropout
    trainer = Trainer(model, config, job.device, job.lengths, stage, step, since)
    if path:
        checkpoints.load(path, trainer.tensors(), job.ranks)
        job.say(f"going on from {path}, {step} of {config.steps} steps done, stage {stage}")
    return trainer


def check_plan(job: Job, sizes: ModelConfig, plan: Plan | None, stage: str) -> None:
    """ValueError for a plan that lacks a trained task, and for a budget that none can meet."""
    config = job.config
    missing = [task for task in job.counts if plan and task not in plan.tasks]
    if missing:
        raise ValueError(f"--plan {config.plan} has no row for {', '.join(missing)}: add it, or "
                         f"set --{missing[0]} 0")
    if stage == "dense" and config.dense < 1 and config.method in BY_ARANK:
        least = least_cost(sizes, job.lengths, job.counts)
        if least > config.budget:
            raise ValueError(f"--budget {config.budget} is out of reach: the head alone costs "
                             f"{least:.2f} of dense with {sizes.vocab_size} ids; a higher budget, "
                             "a deeper preset, or a smaller vocabulary")


def checkpoint_to_resume(job: Job, plan: Plan | None) -> tuple:
    """(path, facts) of the checkpoint to go on from, or (None, None). plan: that of --plan."""
    config, folder = job.config, job.out / "checkpoints"
    if config.resume == "no":
        if any(folder.glob("step-????????")):
            raise ValueError(f"{job.out} holds a run already: --resume auto goes on with it, or "
                             "choose another --out")
        return None, None
    path = checkpoints.newest(folder)
    if path is None:
        return None, None
    facts = checkpoints.facts(path)
    is_dense = facts["stage"] == "dense"
    least = facts["step"] + (is_dense and config.dense < 1)            # a step of UniMoD is to come
    if config.steps < least:
        raise ValueError(f"{path} is past --steps {config.steps}, in stage {facts['stage']}: ask "
                         "for more steps")
    free = FREE | UNTIL_SWITCH if is_dense else FREE
    changed = checkpoints.refuse_another(path, facts, job.about, free)
    job.say(*[f"changed since {path.name}: {text}" for name, text in changed.items()
              if name != "resume"])
    if plan is not None and plan != Plan(**facts["plan"]):
        raise ValueError(f"{path} belongs to a run with another plan than {config.plan} has now")
    return path, facts


def save(trainer: Trainer, job: Job, held_loss: float | None) -> None:
    """A checkpoint of this step; the last --keep-checkpoints of them and the best stay."""
    facts = {"stage": trainer.stage, "since": trainer.since, "held": held_loss,
             "world": job.ranks.world, **job.about, "plan": asdict(trainer.model.plan),
             "model": asdict(trainer.model.config)}
    folder = job.out / "checkpoints"
    checkpoints.save(folder, trainer.step, trainer.tensors(), facts, job.ranks)
    if job.ranks.first:
        checkpoints.prune(folder, job.config.keep_checkpoints)


# --- Dense -> layer switch -> UniMoD ---

def switch(trainer: Trainer, job: Job) -> None:
    """A plan from ARank of the dense model; the same weights go on under it, with fresh routers.

    Optimizers and average begin anew, so the rate climbs again over --warmup steps.
    """
    model, sizes = trainer.bare_model(average=False, here=job.loads), trainer.model.config
    plan = Plan(*from_first_rank(partial(make_plan, model, job, trainer.step)))
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if job.loads else "meta"):
        torch.default_generator.manual_seed(job.config.seed + 1)       # the same on every rank
        if job.loads:
            model = model.to("cpu").with_plan(plan)
        else:
            model = UnifiedTransformer(sizes, plan)
    trainer.enter("unimod", model, since=trainer.step)
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)     # from here on, that of UniMoD


def make_plan(model: UnifiedTransformer, job: Job, step: int) -> tuple:
    """ARank -> the fields of the method's plan; both are printed, the plan is written."""
    config, sizes = job.config, model.config
    samples = " + ".join(f"{SWITCH[task]} {task}" for task in job.counts)
    job.say(f"layer switch after {step} steps: ARank over length, on {samples} samples")
    table = arank_table(model.to(job.device), job.batches(SWITCH))
    plan = plan_for_budget(config.method, table, sizes, job.lengths, config.budget, job.counts)
    plan.save(job.out / "plan.json")
    saved = 1 - flops_ratio(sizes, plan, job.lengths, "train", job.counts)
    job.say(show_table(table), f"plan ({config.method}), {saved:.1%} of a step's training FLOPs "
            f"saved, full n x n attention\n{plan}")
    return plan.keep, plan.shared_router


# --- What is shown ---

class Diverged(RuntimeError):
    """Too many steps in a row were skipped."""


def report(trainer: Trainer, job: Job, log: MetricsLog | None, losses, norm,
           clock: StepClock) -> None:
    """The line of a step. The only place where a step waits for the device.

    Diverged, on every rank, when the last steps were all skipped.
    """
    if job.ranks.first:
        seconds = clock.lap(trainer.step)
        row = step_row(trainer, job.counts, job.lengths, losses, norm, seconds, job.ranks.world)
        log.write(row)
        job.say(row_text(row, job.config.steps))
    in_a_row = int(trainer.skipped[0])
    if in_a_row >= PATIENCE:
        raise Diverged(f"the last {in_a_row} steps had a loss or a gradient that is not finite and "
                       f"were skipped (losses {losses.tolist()}, norm {norm.item()}): the weights "
                       f"are those of step {trainer.step - in_a_row}. Look at --lr (lower it), "
                       "--warmup (lengthen it), --clip, and at the samples of these steps")


def evaluate_held_out(trainer: Trainer, job: Job, log: MetricsLog | None) -> dict:
    """{task: loss on the held-out split, "all": their weighted sum}; all ranks call it.

    Routed by top-k, as in training.
    """
    held = trainer.evaluate(job.held, job.held_shares)
    held["all"] = sum(TASK_WEIGHTS[task] * loss for task, loss in held.items())
    if job.ranks.first:
        log.write({"step": trainer.step} | {f"held_{name}": x for name, x in held.items()})
        rule = ", top-k (non-causal)" if trainer.model.plan.routes else ""
        losses = "  ".join(f"{name} {loss:.4f}" for name, loss in held.items())
        job.say(f"held out{rule}  {losses}")
    return held


def finished_model(trainer: Trainer, job: Job) -> UnifiedTransformer | None:
    """The (averaged) model with thresholds on the first rank, None on the others; all call it."""
    model = trainer.bare_model(average=True, here=job.ranks.first)
    if model is not None:
        calibrate(model.to(job.device), job.batches(dict.fromkeys(job.counts, CALIBRATION)))
    return model


def report_predictors(model: UnifiedTransformer, job: Job) -> dict:
    """predictor_report on held-out samples (training's, if there are none), its means printed."""
    n = dict.fromkeys(job.counts, CALIBRATION)
    found = predictor_report(model, job.batches(n) | job.batches(n, "held"))
    if found["by_layer"]:
        job.say("predictors agree with top-k on {accuracy:.1%} of the tokens (base rate "
                "{base_rate:.1%}); causal routing keeps {capacity_realised:.1%}, top-k "
                "{capacity_trained:.1%}".format(**found))
    return found


def draw(model: UnifiedTransformer, job: Job, step: int) -> None:
    """Draws and answers the same few samples every time, held-out ones if there are any."""
    shown = {"t2i": [], "mmu": []}
    for task in shown.keys() & job.counts.keys():
        split = "held" if job.shards.count(task, "held") else "train"
        n = min(SHOWN, job.shards.count(task, split))
        shown[task] = [job.shards.sample(task, index, split) for index in range(n)]
    path = job.out / "samples" / f"step-{step:08d}.png"
    job.say(draw_and_answer(model, job.shards, shown["t2i"], shown["mmu"], DRAWING, path))


# --- The run ---

def train(trainer: Trainer, job: Job, log: MetricsLog | None, asked: list) -> dict:
    """Steps, and what is due after each, until the last one or a signal.

    Returns the last evaluation. asked: not empty when this process was asked to stop.
    """
    config, clock, held = job.config, StepClock(trainer.step, job.device), {}
    while trainer.step < config.steps:
        end = config.steps
        if trainer.stage == "dense" and config.dense < 1:
            end = min(round(config.dense * config.steps), config.steps - 1)
        if trainer.step >= end:
            if any_rank(bool(asked)):                      # who is to stop does not wait for it
                return {}
            switch(trainer, job)
            clock.lap(trainer.step)                        # no lap holds steps of both stages
            continue
        for _, batches in job.loader.read_ahead(trainer.step, end):
            if any_rank(bool(asked)):
                return {}
            losses, norm = trainer.train_step(batches, shares_of_step(batches))
            if trainer.step % config.log_every == 0 or trainer.step in (1, config.steps):
                report(trainer, job, log, losses, norm, clock)
            held = after_step(trainer, job, log, clock)
    return held


def after_step(trainer: Trainer, job: Job, log: MetricsLog | None, clock: StepClock) -> dict:
    """Evaluates, saves and draws where this step is one for it; returns an evaluation's losses."""
    config, step = job.config, trainer.step
    is_last = step == config.steps
    saves = is_last or step % config.save_every == 0
    evaluates = bool(job.held) and (saves or step % config.eval_every == 0)
    draws = step % config.sample_every == 0 and not is_last
    held = {}
    with clock.paused() if saves or evaluates or draws else nullcontext():
        if evaluates:
            held = evaluate_held_out(trainer, job, log)
        if saves:                                          # first: a drawing may fail
            save(trainer, job, held.get("all"))
        if draws and (model := finished_model(trainer, job)) is not None:
            draw(model, job, step)
    return held


def introduce(trainer: Trainer, job: Job) -> None:
    """The whole configuration, printed and saved; the model, the data and where it runs."""
    write_json(job.out / "settings.json", asdict(job.config))
    n_parameter = sum(p.numel() for p in trainer.model.parameters())
    job.say(listing(job.config), trainer.model.config,
            f"{n_parameter:,} parameters; {job.ranks.world} process(es) on {job.device.type}, "
            f"torch {torch.__version__}, {trainer.model.precision}")
    for task, count in job.counts.items():
        n, held = job.shards.count(task, "train"), job.shards.count(task, "held")
        job.say(f"{task}: {count} of {n} samples a step, {held} held out, {job.lengths[task]} "
                "tokens each")


def finish(trainer: Trainer, job: Job) -> None:
    """model.pt, and a last sheet of samples; or a checkpoint where the run was stopped."""
    if trainer.step < job.config.steps:
        save(trainer, job, None)
        job.say(f"stopped by a signal after {trainer.step} steps and saved: --resume auto goes on")
        return
    model = finished_model(trainer, job)
    if model is not None:
        save_checkpoint(job.out / "model.pt", model, tokenizer=job.shards.tokenizer.state(),
                        drawing=DRAWING, predictor=report_predictors(model, job))
        job.say(f"{job.out}/model.pt written")
        draw(model, job, trainer.step)


def main(argv=None) -> dict:
    config = parse(argv)
    device = find_device(config.device or None)
    config = replace(config, precision=find_precision(config.precision, device))
    with asked_to_stop() as asked, process_group(device, config.timeout) as ranks:
        job = make_job(config, ranks, device)
        trainer = start(job)
        log = None
        if ranks.first:
            introduce(trainer, job)
            log = MetricsLog(job.out, trainer.step)
        held = train(trainer, job, log, asked)
        finish(trainer, job)
        if log is not None:
            log.close()
        result = {"step": trainer.step, "stage": trainer.stage, "held": held,
                  "skipped": int(trainer.skipped[1])}
        trainer.release()
    return result


if __name__ == "__main__":
    with command(errors=(ValueError, OSError, ImportError, Diverged)):
        main()
