"""What a run reports: a line every few steps, all figures in metrics.jsonl, TensorBoard, samples.

metrics.jsonl is only ever appended to, one JSON object a line (null: a number that is not finite).
A run that resumes at step s first cuts it back to the rows of step s and before, without a last
line that a kill tore, so that every step has one row in the end.
"""

import json
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from ..atomic_files import json_text, whole_file, write_text
from ..flops import batch_flops, peak_flops
from ..generate import generate_image, generate_text
from ..pictures import save_png, write_codes


class MetricsLog:
    """Writes rows {"step": s, name: number ..}; the first rank has one, the others have None."""

    def __init__(self, out: Path, step: int):
        self.path = out / "metrics.jsonl"
        cut_back(self.path, step)
        self.file = open(self.path, "a")
        self.board = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:                                # an optional extra
            return
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict) -> None:
        self.file.write(json_text(row) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def cut_back(path: Path, step: int) -> None:
    """Leave the rows up to `step`, and no torn line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    with whole_file(path) as file:
        file.writelines(kept)


class StepClock:
    """Seconds of training steps alone: it is paused while the run evaluates, draws and saves."""

    def __init__(self, step: int, device: torch.device):
        self.start, self.step, self.device = time.perf_counter(), step, device

    def lap(self, step: int) -> float:
        """Seconds a step since the last lap."""
        now = time.perf_counter()
        seconds = (now - self.start) / max(1, step - self.step)
        self.start, self.step = now, step
        return seconds

    @contextmanager
    def paused(self):
        if self.device.type == "cuda":                     # what still runs belongs to the steps
            torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began


def memory_gb(device: torch.device, graphs: bool = False) -> float:
    """Peak gigabytes: of tensors on a CUDA device, of the whole process on a CPU.

    graphs: of all that is reserved on the device, for recordings hold no tensors.
    """
    if device.type == "cuda" and graphs:
        return torch.cuda.max_memory_reserved(device) / 1e9
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def model_flops_utilization(trainer, counts: dict, lengths: dict, seconds: float,
                            world: int) -> dict:
    """MFU: training FLOPs (full n x n attention) a second over the peak of all devices.

    It counts the plan's own FLOPs, so skipped tokens as skipped; dense-equivalent, as if no token
    were skipped. None where the peak is not known.
    """
    name = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else ""
    peak, shares = peak_flops(name), {}
    for key, plan in (("mfu", trainer.model.plan), ("mfu_dense_equivalent", None)):
        shares[key] = None
        if peak:
            flops = batch_flops(trainer.model.config, plan, lengths, "train", counts)
            shares[key] = flops / (seconds * world * peak)
    return shares


def step_row(trainer, counts: dict, lengths: dict, losses, norm, seconds: float,
             world: int) -> dict:
    """The row of a step of `seconds`, with counts[task] samples of lengths[task] tokens.

    Waits for the device.
    """
    plan, config = trainer.model.plan, trainer.config
    row = {"step": trainer.step, "stage": trainer.stage}
    for task, (task_loss, predictor) in zip(trainer.tasks, losses.tolist()):
        row |= {f"loss_{task}": task_loss, f"predictor_{task}": predictor}
    tokens = sum(counts[task] * lengths[task] for task in counts)
    return row | {
        "lr": trainer.optimizers[-1].param_groups[0]["lr"],
        "norm": norm.item(),
        "skipped": int(trainer.skipped[1]),
        "tokens_per_second": tokens / seconds,
        **model_flops_utilization(trainer, counts, lengths, seconds, world),
        "memory_gb": memory_gb(trainer.device, config.graphs),
        "kept": {task: sum(plan.keep[task]) / plan.n_layer for task in trainer.tasks},
        "seconds_left": (config.steps - trainer.step) * seconds}


def row_text(row: dict, steps: int) -> str:
    """A row of training as one line of the terminal."""
    parts = [f"step {row['step']}/{steps} {row['stage']}"]
    for task in row["kept"]:
        predictor = row[f"predictor_{task}"]
        more = f" (+{predictor:.3f})" if predictor else ""
        parts.append(f"{task} {row[f'loss_{task}']:.4f}{more}")
    mfu = "n/a"
    if row["mfu"] is not None:
        mfu = f"{row['mfu']:.1%} (dense-equivalent {row['mfu_dense_equivalent']:.1%})"
    kept = " ".join(f"{task} {share:.0%}" for task, share in row["kept"].items())
    parts += [f"lr {row['lr']:.2e}", f"norm {row['norm']:.3f}",
              f"{row['tokens_per_second']:,.0f} tok/s", f"MFU {mfu}",
              f"{row['memory_gb']:.2f} GB", f"kept {kept}"]
    if row["skipped"]:
        parts.append(f"skipped {row['skipped']}")
    days, seconds = divmod(row["seconds_left"], 86400)
    left = time.strftime("%H:%M:%S", time.gmtime(seconds))
    parts.append(f"{int(days)}d {left} left" if days else f"{left} left")
    return "  ".join(parts)


def draw_and_answer(model, shards, drawn: list, asked: list, drawing: dict, path: Path) -> str:
    """Draws the captions of the samples `drawn`, answers the questions of `asked`: a PNG, a .txt.

    Returns the text. Where pictures are codes: an .npy of them, (n, h, w).
    """
    tokenizer, sheet = shards.tokenizer, []
    texts = [shards.texts(sample)[0] for sample in drawn]
    if drawn:
        captions = [sample.question for sample in drawn]
        sheet.append(generate_image(model, tokenizer, captions, **drawing))
    if asked:
        codes = torch.stack([sample.codes for sample in asked])
        sheet.append(tokenizer.image.decode(codes))
        answers = generate_text(model, tokenizer, codes, [sample.question for sample in asked])
        for sample, answer in zip(asked, answers):
            question, right = shards.texts(sample)
            texts.append(f"{question} {answer} (right: {right})")
    if not texts:
        return "no captions and no questions: nothing to show"
    images, text = torch.cat(sheet), "\n".join(texts)
    write_text(path.with_suffix(".txt"), text + "\n")
    if images.dim() == 3:
        return f"{text}\n{write_codes(images, path.with_suffix('.npy'))}"
    scale = max(1, 128 // images.shape[1])
    return f"{text}\n{save_png(images, texts, path.with_suffix('.png'), scale)}"
