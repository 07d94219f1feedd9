"""What a run tells: one line a few steps in the terminal, every figure in metrics.jsonl and, if it is there, TensorBoard.

metrics.jsonl is only ever appended to, one JSON object a line. A run that resumes at step s first cuts it back to the
rows of step s and before (and drops a last line that a kill tore), so that every step has one row in the end.
"""

import json
import os
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch


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
        self.file.write(json.dumps(row) + "\n")
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
    Path(f"{path}.tmp").write_text("".join(kept))
    os.replace(f"{path}.tmp", path)


class Clock:
    """Seconds of training steps alone: evaluating, drawing and saving happen while it is paused."""

    def __init__(self, step: int):
        self.start, self.step = time.perf_counter(), step

    def lap(self, step: int) -> float:
        """Seconds a step since the last lap."""
        now = time.perf_counter()
        seconds = (now - self.start) / max(1, step - self.step)
        self.start, self.step = now, step
        return seconds

    @contextmanager
    def paused(self):
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began


def memory_gb(device: torch.device) -> float:
    """Peak gigabytes: of tensors on a CUDA device, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def line(row: dict, steps: int) -> str:
    """A row of training as one line of the terminal."""
    losses = "  ".join(f"{task} {row[f'loss_{task}']:.4f}" + (f" (+{row[f'predictor_{task}']:.3f})" if row[f"predictor_{task}"]
                                                              else "") for task in row["kept"])
    kept = " ".join(f"{task} {share:.0%}" for task, share in row["kept"].items())
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%} (dense-equivalent {row['mfu_dense_equivalent']:.1%})"
    left = time.strftime("%H:%M:%S", time.gmtime(row["seconds_left"] % 86400))
    days = f"{int(row['seconds_left'] // 86400)}d " if row["seconds_left"] >= 86400 else ""
    skipped = f"  skipped {row['skipped']}" if row["skipped"] else ""
    return (f"step {row['step']}/{steps} {row['stage']}  {losses}  lr {row['lr']:.2e}  norm {row['norm']:.3f}  "
            f"{row['tokens_per_second']:,.0f} tok/s  MFU {mfu}  {row['memory_gb']:.2f} GB  kept {kept}{skipped}  "
            f"{days}{left} left")
