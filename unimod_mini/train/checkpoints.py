"""Checkpoints of a run that may die at any moment, by torch.distributed.checkpoint.

    FOLDER/step-00000500/run.json                facts, and the size of every other file
    FOLDER/step-00000500/.metadata, *.distcp     weights, optimizer, average, counters by name
    FOLDER/step-00000500/rng-0.pt ..             random state of every rank

Each rank writes what it holds. A checkpoint is written as FOLDER/step-00000500.tmp, run.json last,
and renamed when it is complete, so a killed run leaves the one before. A folder without run.json,
with a file of another size than it says, or with a random state that cannot be read, was cut short
(a full disk, a power cut, a broken copy): it is passed over with a warning. Tensors are named after
the model's parameters, so another number of ranks, or DDP instead of FSDP, reads them as well. All
ranks must see FOLDER: on several machines it lies on a shared disk.
"""

import json
import os
import shutil
import sys
import warnings
from dataclasses import asdict, replace
from hashlib import sha256
from math import isfinite
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from ..atomic_files import disk_trouble, save_data, write_json
from ..checkpoint import load_checkpoint
from ..config import ModelConfig
from ..console import flag
from ..data.shards import HEADER
from ..plan import Plan
from ..transformer import UnifiedTransformer
from ..weights.pretrained import load_pretrained, pretrained_config
from .distributed import Ranks, from_first_rank, local_part, wait_for_all

FACTS = "run.json"


# --- What a run consists of, by name ---

def named_tensors(model: nn.Module, optimizers: list, **others) -> dict:
    """{name: tensor} of all that training moves; others: {name: tensor} each, such as an EMA.

    The state of an optimizer that has not stepped yet is made first, so that the names are always
    the same.
    """
    out = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        if not optimizer.state:
            make_state(optimizer)
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                out[f"optimizer.{names[parameter]}.{key}"] = value
    for kind, tensors in others.items():
        out |= {f"{kind}.{name}": tensor for name, tensor in tensors.items()}
    return out


def make_state(optimizer) -> None:
    """Lets an optimizer make its state: a step of rate 0 with gradients of 0; then it is zeroed."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    for state in optimizer.state.values():
        for value in state.values():
            local_part(value).zero_()


def collectively(do, tensors: dict, path: Path, alone: bool = False) -> None:
    """dcp.save or dcp.load, by all ranks, or by the one process that there is.

    OSError when it fails, with what the disk said or dcp's last line: its own text lists the
    traceback of every rank.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            do(tensors, checkpoint_id=path, no_dist=alone or not dist.is_initialized())
        except CheckpointException as error:
            troubles = [disk_trouble(failure) for failure, _ in error.failures.values()]
            why = next(filter(None, troubles), str(error).strip().splitlines()[-1])
            raise OSError(f"{path}: {why}") from error


def random_state() -> dict:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


# --- Writing ---

def save(folder: Path, step: int, tensors: dict, facts: dict, ranks: Ranks) -> Path:
    """Write one checkpoint, return its path; all ranks call it. A whole one of this step stays."""
    path, part = folder / f"step-{step:08d}", folder / f"step-{step:08d}.tmp"
    if from_first_rank(lambda: broken(path) is None):      # one looks: a shared disk may lag behind
        return path
    if ranks.first:
        shutil.rmtree(part, ignore_errors=True)
        discard(path)                                      # one of this step that was cut short
        part.mkdir(parents=True)
    wait_for_all()
    try:
        collectively(dcp.save, tensors, part)
        save_data(part / f"rng-{ranks.rank}.pt", random_state())
        wait_for_all()
        if ranks.first:
            sizes = {file.name: file.stat().st_size for file in part.iterdir()}
            write_json(part / FACTS, {"step": step, **facts, "sizes": sizes})
            os.replace(part, path)
    except OSError:                                        # a full disk: make room again
        shutil.rmtree(part, ignore_errors=True)
        raise
    wait_for_all()
    return path


def prune(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the last `keep` and the one with the lowest held-out loss."""
    paths = [path for path in sorted(folder.glob("step-????????")) if broken(path) is None]
    losses = {}
    for path in paths:
        loss = facts(path)["held"]
        if loss is not None and isfinite(loss):
            losses[path] = loss
    best = min(losses, key=losses.get, default=None)
    for path in paths[:-keep]:
        if path != best:
            discard(path)


def discard(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a kill leaves no half of it."""
    if path.exists():
        os.replace(path, path.with_suffix(".tmp"))
        shutil.rmtree(path.with_suffix(".tmp"))


# --- Reading ---

def facts(path: Path) -> dict:
    """What `save` was told, with the step."""
    return json.loads((path / FACTS).read_text())


def broken(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when it is whole."""
    try:
        sizes = facts(path)["sizes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable {FACTS} ({type(error).__name__})"
    for name, size in sizes.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        have = (path / name).stat().st_size
        if have != size:
            return f"{name} has {have} bytes instead of {size}"
    for file in path.glob("rng-*.pt"):                     # a power cut may leave zeros
        try:
            torch.load(file, weights_only=True)
        except Exception as error:                         # torch advises to load it unsafely
            return f"{file.name} cannot be read ({type(error).__name__})"
    return None


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, None when there is none; it warns of those that were cut short.

    What a kill left half-written or half-deleted is deleted: one process alone calls this.
    ValueError when there are checkpoints and none is whole, as no kill leaves them.
    """
    for part in folder.glob("step-????????.tmp"):
        shutil.rmtree(part)
    paths = sorted(folder.glob("step-????????"), reverse=True)
    for path in paths:
        wrong = broken(path)
        if wrong is None:
            return path
        print(f"warning: {path} was cut short: {wrong}; going back to the checkpoint before it",
              file=sys.stderr)
    if paths:
        raise ValueError(f"no checkpoint in {folder} is whole: bring one back, or delete them all "
                         "to begin anew")
    return None


def identity(folder: Path) -> str:
    """What makes a folder of shards this one: their headers, which hold hashes of their data."""
    digest = sha256()
    for path in sorted(folder.glob("*.shard")):
        with open(path, "rb") as file:
            digest.update(file.read(HEADER))
    return digest.hexdigest()


def refuse_another(path: Path, then: dict, now: dict, free: set) -> dict:
    """ValueError when a checkpoint's facts `then` are of other data or settings than `now`.

    free: the settings that may differ. Returns how those do, {setting: in words}.
    """
    for name in ("shards", "tokenizer"):
        if then[name] != now[name]:
            raise ValueError(f"{path} was trained on other {name} than --data has: give the --data "
                             "of that run, or choose another --out")
    before, changed = then["config"], {}
    for name, value in now["config"].items():
        if value != before.get(name):
            changed[name] = f"{flag(name)} {before.get(name)}, now {value}"
    wrong = [text for name, text in changed.items() if name not in free]
    if wrong:
        raise ValueError(f"{path} belongs to a run with other settings: {'; '.join(wrong)}. Give "
                         f"the same, or choose another --out (and --init {path}, to begin with its "
                         "weights)")
    return changed


def read(path: Path, tensors: dict, alone: bool = False) -> None:
    """Fill `tensors` in place: all ranks together, or `alone`. ValueError when it lacks some."""
    try:
        collectively(dcp.load, tensors, path, alone)
    except Exception as error:
        why = str(error).strip().splitlines()[-1]
        raise ValueError(f"{path} does not fit this run: {why}") from error


def load(path: Path, tensors: dict, ranks: Ranks) -> None:
    """Fill `tensors` (of named_tensors) in place, and this rank's random state, if it has one."""
    read(path, tensors)
    if (path / f"rng-{ranks.rank}.pt").is_file():
        state = torch.load(path / f"rng-{ranks.rank}.pt", weights_only=True)
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


# --- Weights to begin with ---

def is_pretrained(path) -> bool:
    """Is this a folder of Hugging Face?"""
    return (Path(path) / "config.json").is_file()


def model_file(path) -> Path | None:
    """The file with a finished model: path itself, or the one in a run's folder; else None."""
    path = Path(path)
    if (path / "model.pt").is_file():
        return path / "model.pt"
    return None if path.is_dir() else path


def sizes_of(path: str) -> ModelConfig:
    """The sizes of the model that begin_with(path, ..) reads."""
    if is_pretrained(path):
        return pretrained_config(path)[0]
    if file := model_file(path):
        return load_checkpoint(file)[0].config
    return stored_sizes(Path(path))


def stored_sizes(path: Path) -> ModelConfig:
    """The sizes of a checkpoint's model. ValueError when it is not whole."""
    if wrong := broken(path):
        raise ValueError(f"{path} is no whole checkpoint: {wrong}")
    return ModelConfig(**facts(path)["model"])


def begin_with(path: str, sizes: ModelConfig, plan: Plan | None) -> UnifiedTransformer:
    """Weights of another run, or of Hugging Face, under this plan (None: dense), fresh routers.

    path: model.pt, or a run's folder that has one; checkpoint.pt of train_toy.py; a checkpoint
    (step-00000500); a folder of Hugging Face. ValueError when the model is not of these sizes.
    """
    if is_pretrained(path):
        model = load_pretrained(path)
    elif file := model_file(path):
        model, _ = load_checkpoint(file)
    else:
        model = UnifiedTransformer(stored_sizes(Path(path)), Plan(**facts(Path(path))["plan"]))
        weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        read(Path(path), weights, alone=True)
    theirs = asdict(as_data(model.config, sizes.max_length, sizes.image_start))
    other = [f"{name} {theirs[name]} instead of {value}" for name, value in asdict(sizes).items()
             if theirs[name] != value]
    if other:
        raise ValueError(f"{path} is another model than the preset and the data make: "
                         f"{', '.join(other)}. Without --preset its own sizes are taken")
    fitted = {"max_length": sizes.max_length, "image_start": sizes.image_start}
    return model.float().with_plan(plan, **fitted)


def as_data(config: ModelConfig, max_length: int, image_start: int) -> ModelConfig:
    """These sizes with the data's longest sequence, on which no weight depends.

    And with its first image code, where they know of none (a plain Phi or Llama).
    """
    known = config.image_start < config.vocab_size
    return replace(config, max_length=max_length,
                   image_start=config.image_start if known else image_start)
