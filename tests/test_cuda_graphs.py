"""train/cuda_graphs.py: a recording gives what its function gives. There is no CUDA here: a graph
that runs the function once more, into the same memory, stands in for CUDA's. tests/test_cuda.py
does the same with real ones.
"""
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_unflatten

import test_full
from test_full import TINY, data, rows  # noqa: F401 (data is a fixture)
from unimod_mini.train import cuda_graphs as graphs, trainer as run
from unimod_mini.tokenizer import Batch

CPU = torch.device("cpu")


class Played(graphs.Recorded):
    """Whose graphs run the function once more and write into the memory of the first time.

    log: what was asked for.
    """

    def __init__(self, function, model, device):
        super().__init__(function, model, torch.device("cuda"))
        self.device, self.log = device, []

    def record(self, given, structure):
        def stream(name):
            return SimpleNamespace(wait_stream=lambda other: self.log.append(f"{name} waits"))

        @contextmanager
        def capture(graph, pool):
            assert all(p.grad is None for p in self.parameters)
            self.log.append(("recording into", pool))
            yield
        fakes = {"Stream": lambda: stream("side"), "stream": lambda other: nullcontext(),
                 "current_stream": lambda: stream("main"), "graph": capture,
                 "CUDAGraph": lambda: SimpleNamespace(pool=lambda: "pool")}
        with pytest.MonkeyPatch.context() as patch:
            for name, fake in fakes.items():
                patch.setattr(torch.cuda, name, fake)
            graph, inputs, output, gradients = super().record(given, structure)

        def replay():
            self.forget_gradients()
            again = self.function(*tree_unflatten(inputs, structure))
            new = *tree_leaves(again), *(p.grad for p in self.parameters)
            for mine, fresh in zip((*tree_leaves(output), *gradients), new, strict=True):
                assert (mine is None) == (fresh is None)
                if mine is not None:
                    mine.copy_(fresh)
            self.forget_gradients()  # a graph writes into memory, it sets no attribute
        graph.replay = replay
        return graph, inputs, output, gradients


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.sampled_from(("topk", "predicted")), st.sampled_from("ab"),
                          st.sampled_from((torch.float32, torch.float64)), st.floats(-2, 2, width=32)), min_size=1, max_size=8))
def test_every_call_gives_what_the_function_gives(calls):
    """Shapes, dtypes, absent tensors, names and texts make a recording of their own, floats and
    values of tensors do not; no argument changes, nor what an earlier call returned; .grad is
    written, never added to, None where there is none.
    """
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, dtype=torch.float64) for name in ("topk", "predicted")})

    def function(batches, part, rules):
        (name, batch), = batches.items()
        out = model[rules["t2i"]](batch.ids.double()) * part[0]
        loss = (out if batch.valid is None else out * batch.valid).square().sum() * (2 if name == "a" else 3) + part[1]
        loss.backward()
        return {name: loss.detach()}

    recorded, kept, wanted, batches = Played(function, model, CPU), [], [], []
    for length, padded, rule, name, dtype, number in calls + calls:
        batch = Batch(torch.randn(2, length, 4, dtype=dtype), None, torch.rand(2, length, 1) if padded else None, None)
        given = {name: batch}, (number, 1.0 - number), {"t2i": rule}
        batches.append((batch, batch.map(torch.clone)))
        model.zero_grad(set_to_none=True)
        wanted.append(function(*given))
        gradients = [p.grad for p in model.parameters()]  # still there when the recording is played
        kept.append(recorded(*given))
        for p, gradient in zip(model.parameters(), gradients):
            assert (p.grad is None) == (gradient is None)
            torch.testing.assert_close(p.grad, gradient, check_dtype=False, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)     # in place, as an optimiser does
        torch.testing.assert_close(kept, wanted, check_dtype=False, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(batch.ids, before.ids) for batch, before in batches)
    assert len(recorded.recordings) == len({call[:5] for call in calls})


def test_what_a_recording_asks_of_cuda():
    """Each: warm up on a stream of its own, both wait for each other, then record into the
    memory of the first.
    """
    model, calls = torch.nn.Linear(2, 2), []
    recorded = Played(lambda x: calls.append(x) or model(x).sum().backward(), model, CPU)
    for length in (1, 2, 1):
        recorded(torch.ones(length, 2))
    assert recorded.log == [x for pool in (None, "pool") for x in ("side waits", "main waits", ("recording into", pool))]
    assert len(calls) == 2 * (graphs.WARM + 1) + 3         # the last three: the stand-in's own


def test_a_recorded_run_is_the_plain_run(data, tmp_path, monkeypatch):  # noqa: F811
    """train_full.py --graphs: the losses of the plain run; one recording while dense, then one
    for each rule of t2i.
    """
    made = []
    monkeypatch.setattr(run, "Recorded", lambda *given: made.append(Played(*given)) or made[-1])
    monkeypatch.setattr(graphs, "check_device", lambda device: None)
    given = [*TINY, "--steps", "8", "--dense", "0.5", "--optimizer", "muon", "--ema", "0.9", "--device", "cpu"]
    test_full.run(tmp_path / "plain", data["emu3"], *given)
    test_full.run(tmp_path / "graphs", data["emu3"], *given, "--graphs")
    names = "loss_t2i", "loss_mmu", "predictor_t2i", "predictor_mmu", "norm"
    one, two = (rows(tmp_path / name, *names) for name in ("plain", "graphs"))
    assert len(one) == len(two) == 8 and [len(recorded.recordings) for recorded in made] == [1, 2]
    for a, b in zip(one, two):
        # parts of a step are rounded to float32 in a recording
        assert b == pytest.approx(a, rel=1e-3)


@pytest.mark.parametrize("more", ("--compile", "--activation-checkpointing", "--accumulate 2"))
def test_settings_that_cannot_be_recorded_are_refused(data, tmp_path, more):  # noqa: F811
    """An error before anything is written."""
    with pytest.raises(ValueError, match="--graphs records whole eager steps"):
        test_full.run(tmp_path / "out", data["emu3"], *TINY, "--graphs", *more.split())
    assert not (tmp_path / "out").exists()


def test_other_devices_several_processes_and_autocast_are_refused(data, tmp_path, monkeypatch):  # noqa: F811
    """No CUDA; DDP's hooks, and a cast that autocast made before, which would not be part of a
    recording.
    """
    with pytest.raises(ValueError, match="--graphs is for one process on a CUDA device, .* not for cpu"):
        test_full.run(tmp_path / "out", data["emu3"], *TINY, "--graphs", "--device", "cpu")
    assert not (tmp_path / "out").exists()
    # before the data is read, which would be missed
    with pytest.raises(ValueError, match="not for cpu"):
        test_full.run(tmp_path / "out", tmp_path / "nowhere", *TINY, "--graphs", "--device", "cpu")
    model = torch.nn.Linear(2, 2)
    recorded = Played(lambda x: model(x).sum().backward(), model, CPU)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="outside of autocast"):
        recorded(torch.ones(1, 2))
    assert not recorded.recordings
    monkeypatch.setattr(graphs.dist, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="not for torchrun"):
        graphs.Recorded(lambda: None, model, torch.device("cuda"))
