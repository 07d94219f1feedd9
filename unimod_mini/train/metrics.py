"""What a run tells: a line every few steps, every figure in metrics.jsonl and, if it is there, TensorBoard; samples.

metrics.jsonl is only ever appended to, one JSON object a line (null: a number that is not finite). A run that resumes at step s first cuts it back to the
rows of step s and before (and drops a last line that a kill tore), so that every step has one row in the end.
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


class Journal:
    """Writes rows {"step": s, name: number ..}; the first rank has one, the others have None."""

    def __init__(self, out: Path, step: int):
        self.path = out / "metrics.jsonl"
        cut_back(self.path, step)
        self.file = open(self.path, "a")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:                                # an optional extra: pip install tensorboard
            self.board = None
        else:
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


class Clock:
    """Seconds of training steps alone: evaluating, drawing and saving happen while it is paused."""

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
        if self.device.type == "cuda":                     # what the device still has to do belongs to the steps
            torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began


def memory_gb(device: torch.device, graphs: bool = False) -> float:
    """Peak gigabytes: of tensors on a CUDA device (graphs: of all that is reserved there, recordings hold no tensors),
    of the whole process on a CPU."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_reserved if graphs else torch.cuda.max_memory_allocated)(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def figures(run, counts: dict, lengths: dict, losses, norm, seconds: float, world: int) -> dict:
    """The row of a step of `seconds`, counts[task] samples of lengths[task] tokens. Waits for the device.

    MFU: training FLOPs (full n x n attention) a second over the peak of all devices, None where that is not known. It
    counts the plan's own FLOPs, so skipped tokens as skipped; dense-equivalent, as if no token were skipped.
    """
    config, plan, device = run.model.config, run.model.plan, run.device
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    mfu = [batch_flops(config, which, lengths, "train", counts) / (seconds * world * peak) if peak else None
           for which in (plan, None)]
    pairs = dict(zip(run.tasks, losses.tolist()))
    return {"step": run.step, "stage": run.stage, **{f"loss_{task}": pair[0] for task, pair in pairs.items()},
            **{f"predictor_{task}": pair[1] for task, pair in pairs.items()},
            "lr": run.optimizers[-1].param_groups[0]["lr"], "norm": norm.item(), "skipped": int(run.skipped[1]),
            "tokens_per_second": sum(counts[task] * lengths[task] for task in counts) / seconds,
            "mfu": mfu[0], "mfu_dense_equivalent": mfu[1], "memory_gb": memory_gb(device, run.config.graphs),
            "kept": {task: sum(plan.keep[task]) / plan.n_layer for task in run.tasks},
            "seconds_left": (run.config.steps - run.step) * seconds}


def line(row: dict, steps: int) -> str:
    """A row of training as one line of the terminal."""
    losses = "  ".join(f"{task} {row[f'loss_{task}']:.4f}"
                       + (f" (+{row[f'predictor_{task}']:.3f})" if row[f"predictor_{task}"] else "")
                       for task in row["kept"])
    kept = " ".join(f"{task} {share:.0%}" for task, share in row["kept"].items())
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%} (dense-equivalent {row['mfu_dense_equivalent']:.1%})"
    left = time.strftime("%H:%M:%S", time.gmtime(row["seconds_left"] % 86400))
    days = f"{int(row['seconds_left'] // 86400)}d " if row["seconds_left"] >= 86400 else ""
    skipped = f"  skipped {row['skipped']}" if row["skipped"] else ""
    return (f"step {row['step']}/{steps} {row['stage']}  {losses}  lr {row['lr']:.2e}  norm {row['norm']:.3f}  "
            f"{row['tokens_per_second']:,.0f} tok/s  MFU {mfu}  {row['memory_gb']:.2f} GB  kept {kept}{skipped}  "
            f"{days}{left} left")


def samples(model, tokenizer, drawn: list, asked: list, drawing: dict, path: Path) -> str:
    """Draw the captions of the samples `drawn`, answer the questions of `asked`: a PNG and a .txt. Returns the text.
    Where pictures are codes: an .npy of them, (n, h, w), for the tokenizer that they are of."""
    sheet, texts = [], [sample.question for sample in drawn]
    if drawn:
        sheet.append(generate_image(model, tokenizer, texts, **drawing))
    if asked:
        codes = torch.stack([sample.codes for sample in asked])
        sheet.append(tokenizer.image.decode(codes))
        answers = generate_text(model, tokenizer, codes, [sample.question for sample in asked])
        texts = texts + [f"{one.question} {answer} (right: {one.answer})" for one, answer in zip(asked, answers)]
    if not texts:
        return "no captions and no questions: nothing to show"
    path.parent.mkdir(parents=True, exist_ok=True)
    images, text = torch.cat(sheet), "\n".join(texts)
    write_text(path.with_suffix(".txt"), text + "\n")
    if images.dim() == 3:
        return f"{text}\n{write_codes(images, path.with_suffix('.npy'))}"
    return f"{text}\n{save_png(images, texts, path.with_suffix('.png'), max(1, 128 // images.shape[1]))}"
