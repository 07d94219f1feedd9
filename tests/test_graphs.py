"""graphs.py: a recording gives what its function gives. No CUDA here: a graph that runs the function once more, into the
same memory, stands in for CUDA's. tests/test_cuda.py does the same with real ones."""
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_unflatten

import test_full
from test_full import TINY, data, rows  # noqa: F401 (data is a fixture)
from unimod_mini import graphs, run
from unimod_mini.tokenizer import Batch


class Played(graphs.Recorded):
    """Whose graphs run the function once more and write into the memory of the first time."""

    def __init__(self, function, model, device):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs.dist, "is_initialized", lambda: False)
            super().__init__(function, model, torch.device("cuda"))
        self.device = device

    def record(self, given, structure):
        fakes = {"Stream": lambda: SimpleNamespace(wait_stream=lambda other: None), "stream": nullcontext,
                 "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
                 "CUDAGraph": lambda: SimpleNamespace(pool=lambda: "pool"), "graph": lambda graph, pool: nullcontext()}
        with pytest.MonkeyPatch.context() as patch:
            for name, fake in fakes.items():
                patch.setattr(torch.cuda, name, fake)
            graph, inputs, output, gradients = super().record(given, structure)

        def replay():
            self.forget()
            again = self.function(*tree_unflatten(inputs, structure))
            for mine, new in zip((*tree_leaves(output), *gradients), (*tree_leaves(again), *(p.grad for p in self.parameters))):
                assert (mine is None) == (new is None)
                if mine is not None:
                    mine.copy_(new)
        graph.replay = replay
        return graph, inputs, output, gradients


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.sampled_from(("topk", "predicted")), st.floats(-2, 2)),
                min_size=1, max_size=8))
def test_every_call_gives_what_the_function_gives(calls):
    """Shapes, absent tensors and texts make a recording of their own, numbers and values of tensors do not; what an
    earlier call returned stays as it was, and .grad is written, never added to."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("topk", "predicted")})

    def function(batches, part, rules):
        batch = batches["t2i"]
        out = model[rules["t2i"]](batch.ids) * part[0]
        loss = (out if batch.valid is None else out * batch.valid).square().sum() + part[1]
        loss.backward()
        return {"t2i": loss.detach()}

    recorded, kept, wanted = Played(function, model, torch.device("cpu")), [], []
    for length, padded, rule, number in calls:
        batch = Batch(torch.randn(2, length, 4), None, torch.rand(2, length, 1) if padded else None, None)
        given = {"t2i": batch}, (number, 1.0 - number), {"t2i": rule}
        model.zero_grad(set_to_none=True)
        wanted.append(function(*given))
        gradients = [p.grad for p in model.parameters()]
        kept.append(recorded(*given))
        for p, gradient in zip(model.parameters(), gradients):
            assert (p.grad is None) == (gradient is None)
            torch.testing.assert_close(p.grad, gradient)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)     # in place, as an optimiser does
        torch.testing.assert_close(kept, wanted)
    assert len(recorded.recordings) == len({call[:3] for call in calls})


def test_a_recorded_run_is_the_plain_run(data, tmp_path, monkeypatch):  # noqa: F811
    """train_full.py --graphs: the losses of the plain run, one recording for each pair of rules in each stage."""
    made = []
    monkeypatch.setattr(run, "Recorded", lambda *given: made.append(Played(*given)) or made[-1])
    given = [*TINY, "--steps", "8", "--dense", "0.5", "--optimizer", "muon", "--ema", "0.9", "--device", "cpu"]
    test_full.run(tmp_path / "plain", data["emu3"], *given)
    test_full.run(tmp_path / "graphs", data["emu3"], *given, "--graphs")
    names = "loss_t2i", "loss_mmu", "predictor_t2i", "predictor_mmu", "norm"
    one, two = (rows(tmp_path / name, *names) for name in ("plain", "graphs"))
    assert len(one) == len(two) == 8 and [len(recorded.recordings) for recorded in made] == [2, 2]
    for a, b in zip(one, two):
        assert b == pytest.approx(a, rel=1e-3)             # parts of a step are rounded to float32 in a recording


@pytest.mark.parametrize("more", ("--compile", "--activation-checkpointing", "--accumulate 2"))
def test_what_cannot_be_recorded_is_refused(data, tmp_path, more):  # noqa: F811
    """No CUDA, or settings that recordings do not serve: an error before anything is written."""
    with pytest.raises(ValueError, match="--graphs is for one process on a CUDA device, not for cpu"):
        test_full.run(tmp_path / "out", data["emu3"], *TINY, "--graphs", "--device", "cpu")
    with pytest.raises(ValueError, match="--graphs records whole eager steps"):
        test_full.run(tmp_path / "out", data["emu3"], *TINY, "--graphs", *more.split())
    assert not (tmp_path / "out").exists()


def test_several_processes_and_autocast_are_refused(monkeypatch):
    """DDP's hooks and a cast that autocast made before would not be part of a recording."""
    model = torch.nn.Linear(2, 2)
    recorded = Played(lambda x: model(x).sum().backward(), model, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="outside of autocast"):
        recorded(torch.ones(1, 2))
    assert not recorded.recordings
    monkeypatch.setattr(graphs.dist, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="not for torchrun"):
        graphs.Recorded(lambda: None, model, torch.device("cuda"))
