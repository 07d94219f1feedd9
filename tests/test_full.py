"""train_full.py: the same numbers in one process and in many, runs that survive anything, and
errors that say what to do.
"""
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_full as full
from helpers import build, plans, tiny
from launch import changed, finish, start
from unimod_mini import (ByteText, Palette, Plan, Tokenizer, UnifiedTransformer, WordText,
                         count_flops, flops_ratio, generate_image, load_checkpoint, save_checkpoint)
from unimod_mini.train import checkpoints, metrics
from unimod_mini.console import command
from unimod_mini.train.distributed import Ranks, freeze_unused
from unimod_mini.train.metrics import MetricsLog, cut_back
from unimod_mini.objectives import IGNORE, TASK_WEIGHTS, Objective, task_losses
from unimod_mini.train.trainer import Trainer, shares_of_step
from unimod_mini.data.shards import write_shards
from unimod_mini.tokenizer import Batch

TINY = ["--preset", "tiny", "--t2i", "4", "--mmu", "4", "--log-every", "1", "--eval-samples", "8",
        "--precision", "float32"]
SHORT = [*TINY, "--steps", "10", "--dense", "0.6"]
STOP = [*TINY, "--steps", "6", "--dense", "0.5", "--ema", "0.9"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small data set of each backbone: pictures of 2 x 2 codes, captions, and questions that
    name one of them.
    """
    made, words = {}, "a b c d e f g".split()
    for backbone in ("showo", "emu3"):
        made[backbone] = tmp_path_factory.mktemp(backbone) / "data"
        tokenizer = Tokenizer(backbone, WordText([*words, "USER:", "ASSISTANT:", "2*2"]), Palette(torch.arange(84).view(7, 2, 2, 3)),
                              (2, 2), 6, "USER:", "ASSISTANT:")
        samples = {}
        for split, n in (("train", 60), ("held", 10)):
            pictures = torch.randint(7, (n, 2, 2), generator=torch.Generator().manual_seed(n))
            named = [[words[code] for code in picture.flatten()] for picture in pictures]
            samples[split] = {"t2i": [(" ".join(name), "", codes) for name, codes in zip(named, pictures)],
                              "mmu": [(name[0], name[3], codes) for name, codes in zip(named, pictures)]}
        samples["train"]["lm"] = [(" ".join(name), "", None) for name in named]
        write_shards(made[backbone], tokenizer, samples)
    return made


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing stopped, with dropout and an average of the weights, and a checkpoint
    after every step.
    """
    out = tmp_path_factory.mktemp("whole") / "out"
    run(out, data["showo"], *STOP, "--save-every", "1", "--keep-checkpoints", "9", changes=["dropout"])
    return out


def run(out, data, *more, changes=()):
    """train_full.main in this process, in float32."""
    with changed(*changes):
        return full.main(["--data", str(data), "--out", str(out), *more])


def rows(out, *names):
    """The figures of these names in metrics.jsonl, in order."""
    read = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[name] for name in names) for row in read if names[0] in row]


def same_weights(one, two):
    first, second = (torch.load(Path(out) / "model.pt", weights_only=True) for out in (one, two))
    return first["plan"] == second["plan"] and first["model"].keys() == second["model"].keys() and all(
        torch.equal(first["model"][name], second["model"][name]) for name in first["model"])



@pytest.fixture(scope="module")
def many(data, tmp_path_factory):
    """All that two processes have to do, in one launch: {name: folder}."""
    root, jobs = tmp_path_factory.mktemp("many"), []

    def job(name, given, backbone="emu3", changes=()):
        argv = ["--data", data[backbone], "--out", root / name, "--resume", "auto", *given]
        jobs.append((list(map(str, argv)), changes))

    job("emu3-ddp", SHORT)
    job("emu3-fsdp", [*SHORT, "--parallel", "fsdp"])
    job("emu3-accumulate", [*SHORT, "--accumulate", "2"])
    job("showo-accumulate", [*SHORT, "--accumulate", "2", "--parallel", "fsdp"], "showo")
    # in the dense stage, and after the layer switch
    for parallel, step in (("ddp", 2), ("fsdp", 4)):
        stop = [*STOP, "--parallel", parallel]
        job(f"{parallel}-whole", stop, changes=["dropout"])
        job(f"{parallel}-stopped", stop, changes=["dropout", ("term", [step], 1)])
        job(f"{parallel}-stopped", stop, changes=["dropout"])
    job("nan", [*TINY, "--steps", "4"], changes=[("nan", [2, 3], 1)])
    assert finish(start(2, jobs), 300) == [0, 0], max(root.glob("*/rank-*.log"), key=os.path.getmtime).read_text()[-3000:]
    return root


@pytest.mark.parametrize("backbone, names", (("emu3", ("ddp", "fsdp", "accumulate")), ("showo", ("accumulate",))))
def test_one_process_ddp_fsdp_and_accumulation_give_the_same_losses(data, many, tmp_path, backbone, names):
    """Ten steps with the layer switch in the middle: every loss, norm and held-out loss to 1e-5,
    and the same plan.
    """
    run(tmp_path / "one", data[backbone], *SHORT)
    run(tmp_path / "two", data[backbone], *SHORT, "--accumulate", "2")
    run(tmp_path / "again", data[backbone], *SHORT, "--activation-checkpointing")
    others = [tmp_path / "two", tmp_path / "again", *(many / f"{backbone}-{name}" for name in names)]
    names = "loss_t2i", "loss_mmu", "predictor_t2i", "predictor_mmu", "norm", "lr", "step"
    steps, held = rows(tmp_path / "one", *names), rows(tmp_path / "one", "held_t2i", "held_mmu")
    assert [step[-1] for step in steps] == list(range(1, 11)) and len(held) == 1
    # dense, then routed; it learns
    assert steps[0][2] == 0 < steps[-1][2] and steps[-1][0] < steps[0][0]
    for other in others:
        for one, two in zip(steps + held, rows(other, *names) + rows(other, "held_t2i", "held_mmu"), strict=True):
            assert two == pytest.approx(one, abs=1e-5, rel=1e-5), other
        assert (other / "plan.json").read_text() == (tmp_path / "one" / "plan.json").read_text()


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from(("showo", "emu3")))
def test_losses_of_micro_batches_add_up_to_those_of_the_step(seed, pieces, backbone):
    """However labels and padding are spread over micro-batches: losses and gradients are those
    of one batch.
    """
    config = tiny(backbone)
    generator = torch.Generator().manual_seed(seed)
    model = build(config, Plan({"t2i": (1, .5, 1), "mmu": (.4, 1, 1), "lm": (1, 1, .5)}), seed)
    objective, micros = Objective(model), []
    for _ in range(pieces):
        micro = {}
        for task in ("t2i", "mmu", "lm"):
            ids = torch.randint(20, (2, 6), generator=generator)
            valid = torch.arange(6) < torch.randint(1, 7, (2, 1), generator=generator)
            hidden = torch.rand(2, 6, generator=generator) < 0.5
            micro[task] = Batch(ids, None, valid, ids.masked_fill(hidden | ~valid, IGNORE))
        micros.append(micro)
    parts = shares_of_step(micros)
    whole = {task: Batch(*(None if fields[0] is None else torch.cat(fields) for fields in zip(*(m[task] for m in micros))))
             for task in micros[0]}
    expected = {task: task_losses(model, batch, task) for task, batch in whole.items()}
    loss = sum(TASK_WEIGHTS[task] * losses.task + losses.predictor for task, losses in expected.items())
    wanted = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    shown = [objective(micro, part) for micro, part in zip(micros, parts)]
    got = torch.autograd.grad(sum(one[0] for one in shown), list(model.parameters()), allow_unused=True, materialize_grads=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(got, wanted, strict=True))
    for task, losses in expected.items():
        assert torch.allclose(sum(one[1][task] for one in shown), torch.stack(losses).detach(), rtol=1e-5)


@settings(max_examples=40)
@given(plans(), st.sampled_from(("predictor", "router")), st.integers(1, 9), st.booleans())
def test_what_is_not_frozen_has_a_gradient(plan, membership, length, both):
    """For every plan: requires_grad exactly where a backward of all tasks leaves a gradient, so
    plain DDP never waits.
    """
    tasks = ("t2i", "mmu") if both else ("mmu",)
    model = UnifiedTransformer(tiny("emu3", membership=membership), plan)
    freeze_unused(model, dict.fromkeys(tasks, length))
    ids = torch.randint(20, (2, length))
    loss, _ = Objective(model)({task: Batch(ids, None, None, ids) for task in tasks}, dict.fromkeys(tasks, (1.0, 1.0)))
    loss.backward()
    assert [p.requires_grad for p in model.parameters()] == [p.grad is not None for p in model.parameters()]


# ---------------------------------------------------------------- stopping, and going on

def test_stopped_anywhere_and_resumed_gives_the_same_bits(data, whole, tmp_path):
    """One process that lost all after step s goes on to the weights, bit by bit, and the rows of
    metrics of the run that nothing stopped.
    """
    names = "loss_t2i", "loss_mmu", "norm", "lr", "step"
    assert len(list((whole / "checkpoints").iterdir())) == 6 and len(rows(whole, *names)) == 6
    for step in range(1, 7):
        out = tmp_path / str(step)
        shutil.copytree(whole, out, ignore=lambda _, names: [n for n in names if n.startswith("step-") and int(n[5:13]) > step])
        (out / "model.pt").unlink()
        result = run(out, data["showo"], *STOP, "--resume", "auto", changes=["dropout"])
        assert result["step"] == 6 and same_weights(out, whole) and rows(out, *names) == rows(whole, *names)


@pytest.mark.parametrize("kind", ("term", "int"))
def test_a_signal_saves_the_step_at_hand(data, whole, tmp_path, capsys, kind):
    """SIGTERM or Ctrl-C: nothing is lost, model.pt is not written yet, and the run that goes on
    ends as the one that nothing stopped. Behind the run Ctrl-C is Python's again.
    """
    stopped = run(tmp_path, data["showo"], *STOP, changes=["dropout", (kind, [3], 0)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert stopped["step"] == 3 and not (tmp_path / "model.pt").exists()
    assert "stopped by a signal after 3 steps and saved: --resume auto goes on" in capsys.readouterr().out
    run(tmp_path, data["showo"], *STOP, "--resume", "auto", changes=["dropout"])
    assert same_weights(tmp_path, whole)


def test_a_sigterm_in_the_last_dense_step_does_not_wait_for_the_switch(data, whole, tmp_path):
    """The checkpoint is that of the dense stage; the run that goes on switches and ends as the
    one that nothing stopped.
    """
    assert run(tmp_path, data["showo"], *STOP, changes=["dropout", ("term", [3], 0)])["stage"] == "dense"
    assert not (tmp_path / "plan.json").exists()
    run(tmp_path, data["showo"], *STOP, "--resume", "auto", changes=["dropout"])
    assert same_weights(tmp_path, whole)


@pytest.mark.parametrize("parallel, step", (("ddp", 2), ("fsdp", 4)))
def test_two_processes_stopped_and_resumed_give_the_same_bits(many, parallel, step):
    """A SIGTERM of one rank stops both after the same step; each goes on with its own dropout."""
    assert f"stopped by a signal after {step} steps" in (many / f"{parallel}-stopped" / "rank-0.log").read_text()
    assert same_weights(many / f"{parallel}-stopped", many / f"{parallel}-whole")
    assert rows(many / f"{parallel}-stopped", "loss_t2i", "norm") == rows(many / f"{parallel}-whole", "loss_t2i", "norm")


def test_a_checkpoint_of_two_ranks_goes_on_in_one(data, many, tmp_path):
    """Ten steps in two processes, with FSDP or DDP, or in one, and two more in one: the same
    losses.
    """
    run(tmp_path / "one", data["emu3"], *SHORT)
    shutil.copytree(many / "emu3-fsdp", tmp_path / "fsdp")
    shutil.copytree(many / "emu3-ddp", tmp_path / "ddp")
    for out in (tmp_path / "one", tmp_path / "fsdp", tmp_path / "ddp"):
        assert run(out, data["emu3"], *SHORT[:-4], "--steps", "12", "--dense", "0.6", "--resume", "auto")["step"] == 12
        losses = sum(rows(out, "loss_t2i", "loss_mmu", "norm")[10:] + rows(out, "held_t2i", "held_mmu")[1:], ())
        assert len(losses) == 8 and losses == pytest.approx(losses if out.name == "one" else expected, abs=1e-5)
        expected = losses


# ---------------------------------------------------------------- killed

def test_kill_at_random_moments(data, tmp_path):
    """Two processes; one of them or both are killed at a random moment (SOAK=20: that often, else 3
    times). One that is left ends by itself with an error; the next start goes on; in the end the
    weights and the metrics are those of a run that nobody touched.
    """
    argv = [*TINY, "--steps", "12", "--dense", "0.5", "--save-every", "2", "--resume", "auto", "--timeout", "0.2"]

    def job(name):
        return [(["--data", str(data["emu3"]), "--out", str(tmp_path / name), *argv], ())]

    began = time.perf_counter()
    assert finish(start(2, job("whole"))) == [0, 0]
    seconds, rng = time.perf_counter() - began, random.Random()
    for number in range(int(os.environ.get("SOAK", 3))):
        processes = start(2, job("killed"))
        time.sleep(rng.uniform(0, seconds))
        victims = rng.sample(processes, rng.choice((1, 2)))
        for victim in victims:
            victim.kill()
        for process, code in zip(processes, finish(processes, 60)):
            # 0: it was over already
            assert code in (0, -signal.SIGKILL if process in victims else 1)
    assert finish(start(2, job("killed"))) == [0, 0]
    assert same_weights(tmp_path / "killed", tmp_path / "whole")
    names = "loss_t2i", "loss_mmu", "norm", "step"
    assert rows(tmp_path / "killed", *names) == rows(tmp_path / "whole", *names)
    assert not list((tmp_path / "killed").glob("**/*.tmp"))


def test_a_rank_that_fails_ends_the_job(data, tmp_path):
    """An error on one rank: both processes end soon, with a code that is not 0, and the error is
    in that rank's output.
    """
    argv = ["--data", str(data["emu3"]), "--out", str(tmp_path), *SHORT]
    assert finish(start(2, [(argv, [("fail", [2], 1)])]), 60) == [1, 1]
    assert "this rank fails" in (tmp_path / "rank-1.log").read_text()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
@pytest.mark.parametrize("target, code", (("process", 0), ("launcher", 1), ("terminal", 1)))
def test_torchrun_and_a_signal(data, tmp_path, target, code):
    """torchrun train_full.py: a SIGTERM of one of its two processes, or of torchrun itself, or a
    Ctrl-C, which a terminal sends to all of them, saves a checkpoint. The processes end with 0;
    torchrun says 1 of a signal that it got itself.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_full.py", "--data",
               str(data["showo"]), "--out", str(tmp_path), *TINY, "--steps", "100000", "--dense", "1"]
    process = subprocess.Popen(command, cwd=Path(full.__file__).parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    shown = []
    for text in process.stdout:
        shown.append(text)
        if text.startswith("step 2/") and target == "terminal":
            os.killpg(process.pid, signal.SIGINT)
        elif text.startswith("step 2/"):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(process.pid if target == "launcher" else int(children[-1]), signal.SIGTERM)
    assert process.wait(60) == code, "".join(shown)
    stopped = next(text for text in shown if text.startswith("stopped by a signal after"))
    assert checkpoints.broken(tmp_path / "checkpoints" / f"step-{int(stopped.split()[5]):08d}") is None


# ---------------------------------------------------------------- checkpoints

def damage(path, how):
    """Cut a file of a checkpoint short, take one away, or leave the random state's size alone,
    as a power cut does.
    """
    if how == "zeros":
        return (path / "rng-0.pt").write_bytes(bytes((path / "rng-0.pt").stat().st_size))
    file = path / how if (path / how).exists() else next(path.glob("*.distcp"))
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])


@pytest.mark.parametrize("how", ("run.json", "rng-0.pt", ".metadata", "tensors", "gone", "zeros"))
def test_a_checkpoint_cut_short_is_passed_over(data, whole, tmp_path, capsys, how):
    """The newest checkpoint lacks bytes or a file: a warning names it, the one before it is
    taken, and the end is the same.
    """
    shutil.copytree(whole, tmp_path / "out")
    damage(tmp_path / "out" / "checkpoints" / "step-00000006", how)
    run(tmp_path / "out", data["showo"], *STOP, "--resume", "auto", changes=["dropout"])
    out, err = capsys.readouterr()
    assert "warning: " in err and "step-00000006 was cut short" in err and "step-00000005, 5 of 6 steps done" in out
    assert same_weights(tmp_path / "out", whole)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="a limit on a file's size stands for the full disk")
def test_a_full_disk_ends_a_run_in_one_line(data, whole, tmp_path):
    """It is said so; the checkpoints that were whole are, and nothing of the new one takes room."""
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000006")
    before, limits = set((tmp_path / "out").rglob("*")), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match="error: .*step-00000006.tmp: File too large$"), command():
            run(tmp_path / "out", data["showo"], *STOP, "--resume", "auto", changes=["dropout"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set((tmp_path / "out").rglob("*")) == before
    run(tmp_path / "out", data["showo"], *STOP, "--resume", "auto", changes=["dropout"])
    assert same_weights(tmp_path / "out", whole)


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    """prune leaves the last `keep` and the lowest held-out loss; unfinished folders are swept
    away by newest.
    """
    for step, held in enumerate((3.0, 1.0, None, float("nan"), 2.0, 2.5)):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        (path / "run.json").write_text(json.dumps({"step": step, "held": held, "sizes": {}}))
    (tmp_path / "step-00000009.tmp").mkdir()
    checkpoints.prune(tmp_path, 2)
    assert checkpoints.newest(tmp_path).name == "step-00000005"
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["1", "4", "5"]


def test_a_drawing_that_fails_loses_no_step(data, tmp_path, monkeypatch):
    """Step 2 is saved before it is drawn."""
    monkeypatch.setattr(full, "draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, data["emu3"], *TINY, "--steps", "4", "--save-every", "2", "--sample-every", "2")
    assert checkpoints.broken(tmp_path / "checkpoints" / "step-00000002") is None


def test_a_checkpoint_over_what_an_older_call_left(whole, tmp_path):
    """A broken step-00000006 beside a step-00000006.tmp: both give way to the new one."""
    shutil.copytree(whole / "checkpoints" / "step-00000005", tmp_path / "step-00000006")
    damage(tmp_path / "step-00000006", ".metadata")
    (tmp_path / "step-00000006.tmp").mkdir()
    (tmp_path / "step-00000006.tmp" / "x").write_text("x")
    checkpoints.save(tmp_path, 6, {"a": torch.ones(1)}, {}, Ranks(0, 1, 0))
    assert checkpoints.broken(tmp_path / "step-00000006") is None and [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_without_a_whole_checkpoint_nothing_is_overwritten(data, whole, tmp_path):
    """When every checkpoint is damaged, as no kill leaves them, --resume auto stops and the
    metrics stay.
    """
    shutil.copytree(whole, tmp_path / "out")
    for path in (tmp_path / "out" / "checkpoints").iterdir():
        damage(path, "run.json")
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="no checkpoint in .* is whole: bring one back, or delete them all"):
        run(tmp_path / "out", data["showo"], *STOP, "--resume", "auto")
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == metrics and (tmp_path / "out" / "model.pt").exists()


def test_a_checkpoint_that_does_not_fit_and_a_full_disk(whole, tmp_path, monkeypatch):
    """A tensor that the checkpoint lacks, and a writer that fails: one line with the folder, no
    traceback of ranks.
    """
    path = whole / "checkpoints" / "step-00000006"
    with pytest.raises(ValueError, match=r"step-00000006 does not fit this run: .*other") as error:
        checkpoints.read(path, {"other": torch.zeros(2)})
    assert "\n" not in str(error.value)

    def full_disk(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data", full_disk)
    with pytest.raises(OSError, match=r"step-00000001.tmp: .*No space left on device"):
        checkpoints.save(tmp_path, 1, {"x": torch.zeros(2)}, {}, Ranks(0, 1, 0))
    assert not list(tmp_path.glob("step-????????"))


def test_the_dense_stage_leaves_memory_at_the_switch(data, tmp_path, monkeypatch):
    """While UniMoD trains, the dense model, its optimiser and its average are gone."""
    real, old, alive = full.switch, [], []

    def switch(run, job):
        old.extend(map(weakref.ref, (run.model, run.optimizers[0], *run.average.values())))
        real(run, job)
        alive.append([ref() is not None for ref in old])

    monkeypatch.setattr(full, "switch", switch)
    run(tmp_path, data["emu3"], *SHORT, "--ema", "0.9", "--activation-checkpointing")
    assert len(old) > 9 and not any(alive[0])


def test_the_last_model_is_a_model(data, tmp_path):
    """model.pt: what load_checkpoint reads, with the tokenizer and what drawing needs;
    calibrated for causal routing.
    """
    run(tmp_path, data["showo"], *SHORT)
    model, stored = load_checkpoint(tmp_path / "model.pt")
    tokenizer = Tokenizer.from_state(stored["tokenizer"])
    assert model.plan == Plan.load(tmp_path / "plan.json") and any(threshold != 0 for threshold in model.buffers())
    assert generate_image(model, tokenizer, "a b", **stored["drawing"] | {"steps": 2}).dtype == torch.uint8
    rows = {(row["task"], row["layer"]) for row in stored["predictor"]["by_layer"]}
    assert rows == {(task, layer) for layer in range(2) for task in model.plan.routed(layer)} and 0 < stored["predictor"]["accuracy"] <= 1
    assert json.loads((tmp_path / "settings.json").read_text())["steps"] == 10
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())][-1] == "step-00000010.txt"


def test_other_mixtures_of_tasks(data, tmp_path):
    """Text alone beside questions, no drawing: dense, switched and written; the plan knows these
    two tasks.
    """
    result = run(tmp_path, data["emu3"], *TINY[:2], "--t2i", "0", "--mmu", "4", "--lm", "2", "--steps", "4", "--log-every", "1")
    assert result["stage"] == "unimod" and load_checkpoint(tmp_path / "model.pt")[0].plan.tasks == ("mmu", "lm")
    assert [row[0] > 0 for row in rows(tmp_path, "loss_lm", "loss_mmu")] == [True] * 4


def test_compiled_blocks_and_recomputation_change_no_loss(data, tmp_path, monkeypatch):
    """--compile --activation-checkpointing, traced by dynamo and run by eager torch: the losses
    of the plain run.
    """
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: original(self, backend="eager", **given))
    Plan({"mmu": (.4, 1)}).save(tmp_path / "plan.json")
    given = ["--preset", "tiny", "--t2i", "0", "--steps", "2", "--log-every", "1", "--plan", str(tmp_path / "plan.json")]
    run(tmp_path / "plain", data["emu3"], *given)
    run(tmp_path / "compiled", data["emu3"], *given, "--compile", "--activation-checkpointing", "true")
    names = "loss_mmu", "predictor_mmu", "norm"
    assert rows(tmp_path / "compiled", *names)[1] == pytest.approx(rows(tmp_path / "plain", *names)[1], abs=1e-5)


def test_every_other_step_draws_with_the_predictors_choice(data, tmp_path):
    """The number of a step reaches a routed model as its rule, in every micro-batch; an
    evaluation ranks by the router.
    """
    Plan({"t2i": (.4, 1), "mmu": (.4, 1)}).save(tmp_path / "plan.json")
    config = full.parse(["--data", str(data["emu3"]), *TINY, "--accumulate", "2", "--out", str(tmp_path), "--plan",
                         str(tmp_path / "plan.json")])
    job, rules = full.make_job(config, Ranks(0, 1, 0), torch.device("cpu")), {"t2i": [], "mmu": []}
    run = full.start(job)
    run.model.register_forward_pre_hook(lambda _, __, given: rules[given["task"]].append(given["routing"]), with_kwargs=True)
    for step in range(2):
        batches = job.loader.batches(step)
        run.train_step(batches, shares_of_step(batches))
    assert rules == {"t2i": ["topk"] * 2 + ["predicted"] * 2, "mmu": ["topk"] * 4}
    run.evaluate(job.held, job.held_shares)
    assert set(rules["t2i"][4:]) == set(rules["mmu"][4:]) == {"topk"}


@pytest.mark.parametrize("backbone, init", (("showo", "run/model.pt"), ("emu3", "run/model.pt"), ("emu3", "run")))
def test_init_takes_the_weights_and_nothing_else(data, tmp_path, backbone, init):
    """--init with --plan: every weight but the routers' is the checkpoint's, bit by bit, the plan
    is the given one. The folder of a run stands for its model.pt.
    """
    with changed():
        shards = full.Shards(data[backbone])
        old = build(full.model_config("tiny", shards.tokenizer), Plan({"t2i": (.3, 1), "mmu": (1, 1)}), dtype=torch.float32)
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        save_checkpoint(tmp_path / "run" / "model.pt", old)
        plan = Plan({"t2i": (.5, 1), "mmu": (.4, 0)})
        plan.save(tmp_path / "plan.json")
        config = full.parse(["--data", str(data[backbone]), "--out", str(tmp_path / "out"), *TINY, "--init",
                             str(tmp_path / init), "--plan", str(tmp_path / "plan.json")])
        run = full.start(full.make_job(config, Ranks(0, 1, 0), torch.device("cpu")))
    assert run.stage == "unimod" and run.model.plan == plan
    for name, weight in run.model.state_dict().items():
        if name.startswith("routers."):
            assert "score" not in name or not weight.any()
        else:
            assert torch.equal(weight, old.state_dict()[name])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_init_trains_in_float32_whatever_the_file(data, tmp_path, dtype):
    """Half-precision weights as --init: the model is float32, so that a run that was stopped
    ends as one that was not.
    """
    with changed():
        old = build(full.model_config("tiny", full.Shards(data["emu3"]).tokenizer), dtype=torch.float32).to(dtype)
    save_checkpoint(tmp_path / "old.pt", old)
    given = [*TINY, "--steps", "4", "--dense", "0.5", "--init", str(tmp_path / "old.pt")]
    run(tmp_path / "whole", data["emu3"], *given)
    run(tmp_path / "stopped", data["emu3"], *given, changes=[("term", [1], 0)])
    run(tmp_path / "stopped", data["emu3"], *given, "--resume", "auto")
    model, _ = load_checkpoint(tmp_path / "whole" / "model.pt")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32} and same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_init_takes_a_folder_of_checkpoints_too(data, whole, tmp_path):
    """--init checkpoints/step-..: the weights of that step under a new plan; a damaged one and
    another size are refused.
    """
    folder = tmp_path / "step-00000006"
    shutil.copytree(whole / "checkpoints" / folder.name, folder)
    plan = Plan({"t2i": (.5, 1), "mmu": (1, .5)})
    plan.save(tmp_path / "plan.json")
    given = ["--data", str(data["showo"]), "--out", str(tmp_path / "out"), *TINY, "--plan", str(tmp_path / "plan.json"), "--init",
             str(folder)]
    with changed("dropout"):
        new = full.start(full.make_job(full.parse(given), Ranks(0, 1, 0), torch.device("cpu"))).model
        stored = {f"model.{name}": torch.empty_like(weight) for name, weight in new.state_dict().items() if "routers" not in name}
        checkpoints.read(folder, stored)
        assert new.plan == plan and all(torch.equal(new.state_dict()[name[6:]], weight) for name, weight in stored.items())
        with pytest.raises(ValueError, match="step-00000006 is another model than the preset .*n_layer 2 instead of 8.* Without --preset its own"):
            full.start(full.make_job(full.parse([*given[:4], "--preset", "laptop", "--init", str(folder)]),
                                     Ranks(0, 1, 0), torch.device("cpu")))
        damage(folder, ".metadata")
        with pytest.raises(ValueError, match="is no whole checkpoint: .metadata has"):
            full.start(full.make_job(full.parse(given), Ranks(0, 1, 0), torch.device("cpu")))


@pytest.mark.parametrize("plan, label", [(Plan.dense(2), "held out  t2i"), (Plan.interleaved(2), "held out  t2i"),
                                         (Plan.mod(2), "held out, top-k (non-causal)  t2i")])
def test_losses_of_topk_say_that_they_are(capsys, plan, label):
    """The line of an evaluation is labelled non-causal where a layer chooses among tokens, and
    nowhere else.
    """
    run = SimpleNamespace(step=3, model=SimpleNamespace(plan=plan), evaluate=lambda *held: {"t2i": 1.5})
    job = SimpleNamespace(held=[], held_shares=[], ranks=Ranks(0, 1, 0), say=print)
    assert full.evaluate_held_out(run, job, SimpleNamespace(write=lambda row: None)) == {"t2i": 1.5, "all": 1.5}
    assert capsys.readouterr().out == f"{label} 1.5000  all 1.5000\n"


# ---------------------------------------------------------------- steps that are no numbers

@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_a_step_that_is_not_finite_changes_nothing(data, optimizer):
    """Weights, optimisers' state, average and the count of updates stay as they are, to the bit;
    the next step works.
    """
    config = full.parse(["--data", str(data["emu3"]), *TINY, "--optimizer", optimizer, "--seed", "5", "--ema", "0.9"])
    with changed(("nan", [2, 3], 0)):
        job = full.make_job(config, Ranks(0, 1, 0), torch.device("cpu"))
        run = full.start(job)
        states = []
        for step in range(4):
            batches = job.loader.batches(step)
            run.train_step(batches, shares_of_step(batches))
            states.append({name: tensor.clone() for name, tensor in run.tensors().items() if not name.startswith("count.")})
            assert run.skipped.tolist() == [[0, 0], [1, 1], [2, 2], [0, 2]][step]
    same = [all(torch.equal(one[name], two[name]) for name in one) for one, two in zip(states, states[1:])]
    assert same == [True, True, False] and all(tensor.isfinite().all() for tensor in states[-1].values())


def test_ranks_skip_the_same_steps(many):
    """A loss that is no number on the second rank alone: both skip, count it once, and go on
    alike.
    """
    assert [row[0] for row in rows(many / "nan", "skipped")] == [0, 1, 2, 2]
    assert all(value == value for row in rows(many / "nan", "held_t2i", "held_mmu") for value in row)


def test_a_run_of_skipped_steps_ends_with_what_to_look_at(data, tmp_path):
    """After five in a row the run stops; its checkpoint is from before."""
    with pytest.raises(full.Diverged, match=r"the last 5 steps had a loss .* not finite .* those of step 2\. Look at --lr"):
        run(tmp_path, data["emu3"], *SHORT, "--save-every", "2", changes=[("nan", range(3, 99), 0)])
    assert rows(tmp_path, "skipped")[-1] == (5,)


# ---------------------------------------------------------------- settings, and every bad input

def test_the_settings_are_frozen():
    """Names, types and defaults of the command line."""
    assert {field.name: (field.type, field.default) for field in fields(full.Config)} == {
        "data": (str, ""), "out": (str, "out/full"), "preset": (str, "laptop"), "init": (str, ""), "plan": (str, ""),
        "resume": (str, "no"), "steps": (int, 2000), "dense": (float, 0.67), "method": (str, "unimod"), "budget": (float, 0.6),
        "t2i": (int, 8), "mmu": (int, 8), "lm": (int, 0), "accumulate": (int, 1), "drop": (float, 0.1), "seed": (int, 0),
        "optimizer": (str, "adamw"), "lr": (float, 1e-3), "muon_lr": (float, 0.02), "weight_decay": (float, 0.1),
        "warmup": (int, 100), "decay": (str, "cosine"), "clip": (float, 1.0), "ema": (float, 0.0), "parallel": (str, "ddp"),
        "compile": (bool, False), "graphs": (bool, False), "activation_checkpointing": (bool, False), "device": (str, ""),
        "precision": (str, "auto"), "timeout": (float, 30.0), "log_every": (int, 10), "eval_every": (int, 500), "eval_samples": (int, 256),
        "sample_every": (int, 500), "save_every": (int, 500), "keep_checkpoints": (int, 3)}
    argv = "--preset tiny --data D --out O --steps 7 --save-every 3 --seed 2 --resume auto --plan P".split()
    config = full.parse(argv)
    assert (config.preset, config.data, config.out, config.steps, config.save_every, config.seed, config.resume,
            config.plan) == ("tiny", "D", "O", 7, 3, 2, "auto", "P") and config.lr == full.SIZES["tiny"][1]["lr"]


values = {str: st.sampled_from(("a", "b c", "x=y")), int: st.integers(),
          float: st.floats(0, allow_nan=False), bool: st.booleans()}


@given(st.fixed_dictionaries({}, optional={one.name: values[one.type]
                                           for one in fields(full.Config)}), st.booleans())
def test_every_value_comes_back_typed(chosen, joined):
    """--key value and --key=value: each value comes back equal and with its field's type."""
    argv = []
    for name, value in chosen.items():
        key = "--" + name.replace("_", "-")
        argv += [f"{key}={value}"] if joined else [key, str(value)]
    assert full.parser().parse_given(argv) == chosen
    assert full.parser().parse_given(["--compile"]) == {"compile": True}


@pytest.mark.parametrize("argv, message", [
    (["--step", "3"], "unknown setting --step: did you mean --steps?"),
    (["--steps"], "argument --steps: expected one argument"),
    (["--compile", "yes"], "argument --compile: expected true or false, got yes"),
    (["--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["steps", "3"], "unknown setting steps: did you mean --steps?"),
    (["--steps", "0"], "--steps 0: expected 1 or more"),
    (["--lr", "0"], "--lr 0.0: expected"),
    (["--lr", "nan"], "--lr nan: expected"),
    (["--dense", "1.5"], "--dense 1.5: expected 0 to 1"),
    (["--preset", "basis"], "--preset basis: did you mean base?"),
    (["--decay", "step"], "--decay step: choose from cosine, linear"),
    (["--parallel", "fsdp", "--optimizer", "muon"], "--optimizer muon needs whole matrices"),
])
def test_bad_settings(argv, message):
    """One line that names the setting, what was given and what would do."""
    with pytest.raises(ValueError) as error:
        full.parse(["--data", "D", *argv])
    assert message in str(error.value)
    with pytest.raises(ValueError, match="--data is missing"):
        full.parse([])


def test_bad_inputs(data, tmp_path):
    """Data, plans and weights that do not fit: ValueError or FileNotFoundError that says what
    was found and what to do.
    """
    Plan.dense(3).save(tmp_path / "deep.json")
    Plan({"t2i": (1, .5)}).save(tmp_path / "t2i.json")
    (tmp_path / "no.json").write_text("{}")
    save_checkpoint(tmp_path / "other.pt", UnifiedTransformer(tiny("emu3")))
    shutil.copytree(data["emu3"], tmp_path / "cut")
    shard = next((tmp_path / "cut").glob("train-mmu-*.shard"))
    shard.write_bytes(shard.read_bytes()[:-2])
    for argv, message in (
            (["--t2i", "5", "--accumulate", "2"], "5 samples of t2i in a step do not divide"), (["--data", str(data["emu3"]), "--t2i", "0", "--mmu", "0"], "a step without samples"),
            (["--preset", "toy-showo"], "--preset toy-showo is of the showo backbone, the shards are of emu3"),
            (["--plan", str(tmp_path / "deep.json")], "the plan has 3 layers, the model 2"),
            (["--plan", str(tmp_path / "t2i.json")], "has no row for mmu"), (["--plan", str(tmp_path / "no.json")], "is not a plan"),
            (["--init", str(tmp_path / "no.json")], "no.json is not a checkpoint"),
            (["--init", str(tmp_path / "other.pt")], "is another model than the preset and the data make: n_layer 3 instead of 2"),
            (["--data", str(tmp_path / "cut")], shard.name)):
        given = ["--preset", "tiny", "--out", str(tmp_path / "out")] if "--preset" not in argv else ["--out", str(tmp_path / "out")]
        given += [] if "--data" in argv else ["--data", str(data["emu3"])]
        with changed(), pytest.raises(ValueError) as error:
            full.main([*given, *argv])
        assert message in str(error.value)
    with pytest.raises(FileNotFoundError, match="unimod_mini.prepare"):
        run(tmp_path / "out", tmp_path / "nowhere")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_another_run_is_not_continued(data, tmp_path):
    """A folder that holds a run is not overwritten, nor continued with other settings, data or
    plan; an empty one is new.
    """
    out = tmp_path / "out"
    Plan({"t2i": (1, .5), "mmu": (1, 1)}).save(tmp_path / "plan.json")
    run(out, data["emu3"], *TINY, "--steps", "1", "--plan", str(tmp_path / "plan.json"), "--resume", "auto")
    Plan({"t2i": (1, .4), "mmu": (1, 1)}).save(tmp_path / "plan.json")
    again = [*TINY, "--steps", "2", "--plan", str(tmp_path / "plan.json")]
    shutil.copytree(data["emu3"], tmp_path / "fewer", ignore=lambda *_: ["dataset.json", *(p.name for p in data["emu3"].glob("held*"))])
    about = json.loads((data["emu3"] / "dataset.json").read_text())
    del about["counts"]["held"]
    (tmp_path / "fewer" / "dataset.json").write_text(json.dumps(about))
    for folder, argv, message in (
            (data["emu3"], again, "holds a run already: --resume auto goes on with it"),
            (data["emu3"], [*again, "--resume", "auto"], "belongs to a run with another plan"),
            (data["emu3"], [*again, "--resume", "auto", "--seed", "7"], "other settings: --seed 0, now 7. Give the same"),
            (data["emu3"], [*again, "--resume", "auto", "--budget", "0.9"], "other settings: --budget 0.6, now 0.9"),
            (tmp_path / "fewer", [*again, "--resume", "auto"], "was trained on other shards"),
            (data["showo"], [*again, "--resume", "auto"], "was trained on other shards")):
        with pytest.raises(ValueError) as error:
            run(out, folder, *argv)
        assert message in str(error.value)


def test_what_a_run_that_goes_on_may_change(data, tmp_path, capsys):
    """Rates at any time, what the layer switch will do until it is done; both are said."""
    run(tmp_path, data["emu3"], *TINY, "--steps", "2", "--dense", "1")
    new = ["--resume", "auto", "--steps", "4", "--dense", "0.6", "--budget", "0.8", "--lr", "0.001"]
    assert run(tmp_path, data["emu3"], *TINY, *new)["stage"] == "unimod"
    out = capsys.readouterr().out
    for text in ("--dense 1.0, now 0.6", "--budget 0.6, now 0.8", "--lr 0.003, now 0.001"):
        assert f"changed since step-00000002: {text}" in out
    assert rows(tmp_path, "lr")[2][0] <= 0.001
    plan, shards = Plan.load(tmp_path / "plan.json"), full.Shards(data["emu3"])
    lengths = {task: shards.tokenizer.length(task) for task in plan.tasks}
    assert 0.75 < flops_ratio(full.model_config("tiny", shards.tokenizer), plan, lengths) <= 0.8


def test_a_budget_out_of_reach_is_refused_at_once(data, tmp_path):
    """What the head alone costs is known before the first step, not at the layer switch."""
    with pytest.raises(ValueError, match=r"--budget 0.02 is out of reach: the head alone costs 0\.\d+ of dense with \d+ ids"):
        run(tmp_path, data["emu3"], *SHORT, "--budget", "0.02")
    run(tmp_path, data["emu3"], *TINY, "--steps", "1", "--dense", "1", "--budget", "0.02")
    # a run that goes on, too
    with pytest.raises(ValueError, match="--budget 0.02 is out of reach"):
        run(tmp_path, data["emu3"], *TINY, "--steps", "4", "--dense", "0.8", "--budget", "0.02", "--resume", "auto")


def test_fewer_steps_than_are_done_are_refused(data, whole, tmp_path):
    """Neither a stage that has not ended, nor one step of UniMoD, is called finished; a finished
    run may be asked again.
    """
    shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(ValueError, match="step-00000006 is past --steps 5, in stage unimod: ask for more steps"):
        run(tmp_path / "out", data["showo"], *TINY, "--steps", "5", *STOP[-4:], "--resume", "auto", changes=["dropout"])
    run(tmp_path / "out", data["showo"], *STOP, "--resume", "auto", changes=["dropout"])
    run(tmp_path / "dense", data["showo"], *STOP, changes=[("term", [2], 0)])
    with pytest.raises(ValueError, match="step-00000002 is past --steps 2, in stage dense"):
        run(tmp_path / "dense", data["showo"], *TINY, "--steps", "2", *STOP[-4:], "--resume", "auto")


def test_a_task_without_held_out_samples_is_reported_on_those_of_training(data, tmp_path):
    """lm has none: its predictors are judged all the same."""
    run(tmp_path, data["emu3"], *TINY, "--lm", "4", "--steps", "2", "--dense", "0.5")
    model, stored = load_checkpoint(tmp_path / "model.pt")
    routed = {task for layer in range(model.plan.n_layer) for task in model.plan.routed(layer)}
    assert {row["task"] for row in stored["predictor"]["by_layer"]} == routed and "lm" in routed


def test_a_switch_is_never_rounded_away(data, tmp_path):
    """A share of dense steps below 1 leaves at least one step for UniMoD."""
    result = run(tmp_path, data["emu3"], *TINY, "--steps", "2", "--dense", "0.9")
    assert result["stage"] == "unimod" and rows(tmp_path, "stage") == [("dense",), ("unimod",)]


def test_the_budget_is_that_of_the_mixture(data, tmp_path):
    """--budget counts a step as it is: seven samples of one task and one of the other."""
    run(tmp_path, data["emu3"], *SHORT[:2], "--t2i", "7", "--mmu", "1", "--steps", "2", "--dense", "0.5", "--budget", "0.8")
    model, stored = load_checkpoint(tmp_path / "model.pt")
    lengths = {task: Tokenizer.from_state(stored["tokenizer"]).length(task) for task in ("t2i", "mmu")}
    assert 0.78 < flops_ratio(model.config, model.plan, lengths, "train", {"t2i": 7, "mmu": 1}) <= 0.8


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.sampled_from((1, 2)), st.sampled_from((1, 2)))
def test_the_held_out_samples_are_as_many_as_asked(data, asked, n, accumulate, world):
    """Whole steps' worth of at most --eval-samples, none twice; how often a step accumulates
    does not matter.
    """
    n, shards = n * accumulate * world, full.Shards(data["emu3"])
    config = full.Config(eval_samples=asked, accumulate=accumulate, t2i=n, mmu=0)
    ids = [batch.ids for rank in range(world)
           for micro in full.held_out(config, shards, {"t2i": n}, Ranks(rank, world, rank)) for batch in micro.values()]
    judged, there = len(torch.cat(ids)), min(asked, 10)
    assert judged == (there // n * n if there >= n else max(1, there // world) * world)
    once = full.Loader(shards, {"t2i": judged}, 0, drop=0.0, split="held").batches(0)[0]["t2i"].ids.tolist()
    assert sorted(torch.cat(ids).tolist()) == sorted(once)


# ---------------------------------------------------------------- schedule and journal

def test_the_figures_of_a_line(data, monkeypatch):
    """Tokens a second, MFU with skipped tokens as skipped, its dense-equivalent, kept shares and
    time left, by hand.
    """
    config = full.parse(["--data", str(data["emu3"]), *TINY, "--steps", "10"])
    job = full.make_job(config, Ranks(0, 1, 0), torch.device("cpu"))
    run = full.start(job)
    plan = Plan({"t2i": (1, .25), "mmu": (.5, 1)})
    run.enter("unimod", run.model.with_plan(plan), 0)
    run.step, lengths, counts = 4, {"t2i": 9, "mmu": 13}, {"t2i": 3, "mmu": 5}
    row = metrics.step_row(run, counts, lengths, torch.ones(2, 2), torch.tensor(1.0), 0.5, world=2)
    assert row["tokens_per_second"] == (3 * 9 + 5 * 13) / 0.5 and row["seconds_left"] == 6 * 0.5
    assert row["kept"] == {"t2i": 0.625, "mmu": 0.75} and row["mfu"] is None and "MFU n/a" in metrics.row_text(row, 10)
    monkeypatch.setattr(metrics, "peak_flops", lambda name: 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "known")
    run.device = torch.device("cuda")
    monkeypatch.setattr(metrics, "memory_gb", lambda *device: 0.0)
    row = metrics.step_row(run, counts, lengths, torch.ones(2, 2), torch.tensor(1.0), 0.5, world=2)
    for name, which in (("mfu", plan), ("mfu_dense_equivalent", None)):
        flops = sum(counts[task] * count_flops(run.model.config, which, task, lengths[task], "train").total for task in counts)
        assert row[name] == pytest.approx(flops / (0.5 * 2 * 1e9))
    assert row["mfu"] < row["mfu_dense_equivalent"]


def test_the_clock_counts_steps_alone(monkeypatch):
    """Time that is paused counts for no step; a CUDA device finishes its steps before the pause
    begins.
    """
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])

    def finish_queue(device):
        now[0] += 3.0
    monkeypatch.setattr(torch.cuda, "synchronize", finish_queue)
    for kind, seconds in (("cpu", 2.0), ("cuda", 5.0)):
        clock = metrics.StepClock(10, torch.device(kind))
        now[0] += 4.0
        with clock.paused():
            now[0] += 100.0
        assert clock.lap(12) == pytest.approx(seconds if kind == "cpu" else (4 + 3) / 2)


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 50), st.sampled_from(("cosine", "linear")), st.floats(0, 1))
def test_the_rate_rises_and_falls(steps, warmup, decay, share):
    """In (0, 1] at every step, at most 1 / warmup in the first step of a stage. The last stage,
    UniMoD or dense to the end, falls from the peak after its warm-up to about 0; a dense stage
    before a switch stays at the peak.
    """
    run, since = Trainer.__new__(Trainer), round(share * (steps - 1))
    for run.stage, dense, run.since in (("unimod", 0.5, since), ("dense", 1.0, 0), ("dense", 0.5, 0)):
        run.config, rates = full.Config(steps=steps, warmup=warmup, decay=decay, dense=dense), []
        for run.step in range(run.since, steps):
            rates.append(run.rate())
        assert all(0 < rate <= 1 for rate in rates) and rates[0] <= 1 / warmup
        if dense == 0.5 and run.stage == "dense":
            assert set(rates[warmup:]) <= {1.0}
        else:
            assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1:]))
            assert rates[-1] <= 1 / len(rates) + 1e-9


def test_figures_that_are_not_finite_are_null(data, tmp_path):
    """Every line of metrics.jsonl is JSON for strict readers, and so is the run.json of a
    checkpoint.
    """
    run(tmp_path, data["emu3"], *TINY, "--steps", "3", "--dense", "1", changes=[("nan", [2], 0)])
    held = MetricsLog(tmp_path, 3)
    held.write({"step": 3, "held_all": float("nan"), "more": [float("inf")]}), held.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = [json.loads(line, parse_constant=lambda name: 1 / 0) for line in lines]
    assert [row["norm"] is None for row in read if "norm" in row] == [False, True, False]
    assert read[-1] == {"step": 3, "held_all": None, "more": [None]}


@pytest.mark.parametrize("encoding", ("latin-1", "ascii"))
def test_captions_that_the_terminal_cannot_print(tmp_path, monkeypatch, encoding):
    """A sheet of samples ends no run: escapes in the terminal, the letters themselves in its
    .txt.
    """
    tokenizer = Tokenizer("emu3", ByteText(), Palette(torch.arange(84).view(7, 2, 2, 3)), (2, 2), 16, "U: ", " A: ")
    write_shards(tmp_path / "data", tokenizer, {"train": {"t2i": [(f"猫 {i}", "", torch.full((2, 2), i)) for i in range(7)]}})
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with command():
        run(tmp_path / "out", tmp_path / "data", *TINY[:2], "--t2i", "2", "--mmu", "0", "--steps", "2", "--dense", "1", "--sample-every", "1")
    assert rb"\u732b" in sys.stdout.buffer.getvalue() and (tmp_path / "out" / "model.pt").exists()
    assert "猫" in (tmp_path / "out" / "samples" / "step-00000001.txt").read_text(encoding="utf-8")


@given(st.lists(st.integers(0, 9)), st.integers(0, 9), st.booleans())
def test_metrics_are_cut_back_to_the_step(tmp_path_factory, steps, step, torn):
    """Rows up to the step stay, in order; later rows and a torn last line go."""
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in steps) + '{"step": 0, "lo' * torn)
    cut_back(path, step)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [n for n in steps if n <= step]


def test_tensorboard_gets_every_number_when_it_is_there(tmp_path, monkeypatch):
    """With the package, a scalar for every figure; without it, metrics.jsonl alone."""
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step): written.append(purge_step)
        def add_scalar(self, *given): written.append(given)
        def close(self): written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = SummaryWriter
    one = MetricsLog(tmp_path, 4)
    one.write({"step": 5, "stage": "dense", "loss_t2i": 1.5, "mfu": None, "kept": {"t2i": 1}})
    one.close()
    assert written == [5, ("loss_t2i", 1.5, 5), "closed"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert MetricsLog(tmp_path, 4).board is None and not (tmp_path / "metrics.jsonl").read_text()
