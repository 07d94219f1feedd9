"""Processes for the tests of train_full.py, started as torchrun starts them: forked from a
server that has torch loaded.
"""
import multiprocessing
import os
import random
import signal
import socket
from contextlib import closing, contextmanager, suppress
from dataclasses import replace

import torch

import train_full as full
from unimod_mini.objectives import Objective
from unimod_mini.train.trainer import Trainer

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train_full", "launch"])


def free_ports(n):
    """n ports that are free, below those that outgoing connections are given: some are used only
    a minute later.
    """
    found = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1_000):
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == n:
            return found
    raise OSError("no free ports")


@contextmanager
def changed(*changes, rank=0):
    """Few samples everywhere, and what a test wants: "dropout", or ("term", "fail" or "nan", steps,
    rank).

    term, int: this rank gets a SIGTERM, a Ctrl-C after the step; fail: an error; nan: the loss of
    that step is no number on this rank.
    """
    advanced, sized, passed = Trainer.train_step, full.model_config, Objective.forward
    numbers = full.SWITCH, full.SHOWN, full.CALIBRATION
    full.SWITCH, full.SHOWN, full.CALIBRATION = {"t2i": 6, "mmu": 6, "lm": 6}, 1, 4
    here, now = {what: steps for what, steps, on in (c for c in changes if c != "dropout") if on == rank}, [0]

    def advance(run, *given):
        now[0] = run.step + 1
        out = advanced(run, *given)
        for name, number in (("term", signal.SIGTERM), ("int", signal.SIGINT)):
            if run.step in here.get(name, ()):
                os.kill(os.getpid(), number)
        if run.step in here.get("fail", ()):
            raise ValueError("this rank fails")
        return out

    def forward(objective, *given):
        loss, shown = passed(objective, *given)
        return loss * (torch.nan if objective.training and now[0] in here.get("nan", ()) else 1.0), shown

    Trainer.train_step, Objective.forward = advance, forward
    if "dropout" in changes:
        full.model_config = lambda *given: replace(sized(*given), attention_dropout=0.2)
    try:
        yield
    finally:
        Trainer.train_step, full.model_config, Objective.forward = advanced, sized, passed
        full.SWITCH, full.SHOWN, full.CALIBRATION = numbers


def work(rank, world, ports, jobs):
    """One process: every job after the other, (argv, changes).

    What it prints goes to OUT/rank-0.log ..
    """
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    for port, (argv, changes) in zip(ports, jobs):
        os.environ["MASTER_PORT"] = str(port)
        out = argv[argv.index("--out") + 1]
        os.makedirs(out, exist_ok=True)
        log = os.open(os.path.join(out, f"rank-{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        with changed(*changes, rank=rank):
            full.main(argv)


def start(world, jobs):
    """The running processes of `world` ranks."""
    ports = free_ports(len(jobs))
    processes = [CONTEXT.Process(target=work, args=(rank, world, ports, jobs), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def finish(processes, seconds=120):
    """Their exit codes; AssertionError for one that hangs."""
    for process in processes:
        process.join(seconds)
        assert process.exitcode is not None, "a process hangs"
    return [process.exitcode for process in processes]
