"""The same on a CUDA device as on the CPU: forward, cache, drawing, answers, training.

Skipped where there is none.
"""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_full as full
from helpers import BACKBONES, build, calls, plans, real, tiny
from test_observations import sample
from test_cache import cuts, feed
from test_full import TINY, data, run, rows  # noqa: F401 (data is a fixture)
from test_generate import make, pictures
from benchmarks import observations
from unimod_mini.train.distributed import Ranks
from unimod_mini.generate import generate_image, generate_text
from unimod_mini.train.cuda_graphs import Recorded
from unimod_mini.layer_switch import arank
from unimod_mini.objectives import Objective
from unimod_mini.plan import Plan
from unimod_mini.train.trainer import shares_of_step

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
both = pytest.mark.parametrize("backbone", BACKBONES)


def moved(inputs):
    return {name: x if x is None else x.to(DEVICE) for name, x in inputs.items()}


@settings(max_examples=40, deadline=None)
@given(backbone=st.sampled_from(BACKBONES), task=st.sampled_from(("t2i", "mmu")), plan=plans(), data=st.data(),
       rule=st.sampled_from(("topk", "predicted", "causal")))
def test_forward_is_that_of_the_cpu(backbone, task, plan, data, rule):
    """float64, any padding, spans and positions: the same members in every layer, the same logits
    (the rotary angles are float32, and their sines differ in the last bit).
    """
    model = build(tiny(backbone), plan)
    inputs = data.draw(calls(model.config))
    here, there = model(task=task, routing=rule, **inputs), copy.deepcopy(model).to(DEVICE)(task=task, routing=rule, **moved(inputs))
    ok = real(inputs)
    torch.testing.assert_close(there.logits.cpu()[ok], here.logits[ok], rtol=1e-5, atol=1e-5)
    for a, b in zip(here.routing, there.routing):
        assert a is b is None or torch.equal(a.selected, b.selected.cpu())


@settings(max_examples=40, deadline=None)
@given(backbone=st.sampled_from(BACKBONES), task=st.sampled_from(("t2i", "mmu")), plan=plans(), data=st.data())
def test_any_chunks_equal_the_full_forward(backbone, task, plan, data):
    """Behind a cache, whose ragged rows a GPU decodes side by side: the logits of one causal
    forward, and token by token where no span forbids it.
    """
    model = build(tiny(backbone), plan)
    inputs = data.draw(calls(model.config, places="default", padding=st.sampled_from(("none", "left", "holes"))))
    edges = range(1, inputs["ids"].shape[1]) if inputs["spans"] is None else cuts(inputs, data)
    ok, inputs, model = real(inputs), moved(inputs), model.to(DEVICE)
    full, (logits, _, _) = model(task=task, routing="causal", **inputs), feed(model, task, inputs, edges)
    torch.testing.assert_close(logits.cpu()[ok], full.logits.cpu()[ok], rtol=0, atol=1e-9)


@both
@pytest.mark.parametrize("rule", ("topk", "causal"))
def test_pictures_and_answers_are_those_of_the_cpu(backbone, rule):
    """float64 and the likeliest id everywhere, with guidance, rows of different lengths."""
    tokens, model = make(backbone)
    there = copy.deepcopy(model).to(DEVICE)
    prompts, images = ["a b", "c", "e d a"], pictures(tokens, 3)
    one, two = (generate_image(m, tokens, prompts, rule, temperature=0.0, guidance=2.0, steps=4) for m in (model, there))
    assert torch.equal(one, two.cpu())
    one, two = (generate_text(m, tokens, images, prompts, rule) for m in (model, there))
    assert one == two


@both
def test_a_switched_model_is_its_dense_parent_to_the_bit(backbone):
    """In bf16, through the routed path: keep of just under 1 keeps every token."""
    dense = build(tiny(backbone), dtype=torch.float32).to(DEVICE)
    inputs = moved(dict(ids=torch.randint(30, (3, 12), generator=torch.Generator().manual_seed(0))))
    switched = dense.with_plan(Plan({task: (0.999,) * 3 for task in ("t2i", "mmu")}))
    switched.precision = dense.precision = "bf16"
    with torch.no_grad():
        out = switched(**inputs)
        assert all(routing.selected.all() for routing in out.routing)
        assert torch.equal(out.logits, dense(**inputs).logits)


def test_a_step_does_not_wait_for_the_device(data):  # noqa: F811
    """After warming up, a whole step with accumulation runs under torch's sync alarm."""
    config = full.parse(["--data", str(data["emu3"]), *TINY, "--accumulate", "2", "--ema", "0.9"])
    job = full.make_job(config, Ranks(0, 1, 0), torch.device(DEVICE))
    run = full.start(job)
    for step in range(3):
        batches = job.loader.batches(step)
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        run.train_step(batches, shares_of_step(batches))
        torch.cuda.set_sync_debug_mode("default")


@both
@pytest.mark.parametrize("rule", ("topk", "predicted"))
def test_recorded_losses_and_gradients_are_those_of_a_plain_pass(backbone, rule):
    """Another batch in every replay, weights that move between them; float64, so that nothing
    hides in rounding.
    """
    model = build(tiny(backbone), Plan({"t2i": (1.0, .4, .6), "mmu": (.5, 1.0, 0.0)})).to(DEVICE)
    objective, weights = Objective(model), list(model.parameters())

    def passes(batches, parts, rules):
        loss, shown = objective(batches, parts, rules)
        loss.backward()
        return shown

    recorded = Recorded(passes, model, torch.device(DEVICE))
    for turn in range(6):
        batches = {task: sample(model.config, 3, 12, turn + 9 * (task == "mmu"), "left", backbone == "showo").to(DEVICE)
                   for task in ("t2i", "mmu")}
        # the same in float32, as a recording has it
        parts = {"t2i": (1.0, 0.5 + turn), "mmu": (0.5**turn, 3.0)}
        rules = {"t2i": rule if turn % 2 else "topk", "mmu": "topk"}
        found = []
        for function in (passes, recorded):
            model.zero_grad(set_to_none=True)
            shown = function(batches, parts, rules)
            found.append((shown, [None if p.grad is None else p.grad.clone() for p in weights]))
        (one, here), (two, there) = found
        torch.testing.assert_close(two, one)
        torch.testing.assert_close(there, here)
        with torch.no_grad():
            for p, gradient in zip(weights, here):
                if gradient is not None:
                    p -= 0.1 * gradient
    assert len(recorded.recordings) == (1 if rule == "topk" else 2)


@both
@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_a_run_learns_what_it_learns_on_the_cpu(data, tmp_path, backbone, optimizer):  # noqa: F811
    """Dense, switch, UniMoD in float32: losses near those of the CPU, stopped and resumed too."""
    given = [*TINY, "--steps", "6", "--dense", "0.5", "--optimizer", optimizer, "--save-every", "2"]
    for device in ("cpu", DEVICE):
        run(tmp_path / device, data[backbone], *given, "--device", device)
    run(tmp_path / "graphs", data[backbone], *given, "--device", DEVICE, "--graphs")
    for step in (4, 6):  # the last checkpoints are gone: it goes on from step 2
        for file in (tmp_path / DEVICE / "checkpoints" / f"step-{step:08d}").iterdir():
            file.unlink()
    run(tmp_path / DEVICE, data[backbone], *given, "--device", DEVICE, "--resume", "auto")
    names = "loss_t2i", "loss_mmu", "norm"
    one, *others = (rows(tmp_path / out, *names) for out in ("cpu", DEVICE, "graphs"))
    for two in others:
        assert len(one) == len(two) == 6
        for a, b in zip(one, two):
            # Muon: bf16 on CUDA
            assert b == pytest.approx(a, rel=3e-2 if optimizer == "muon" else 1e-3)


@both
def test_a_dense_model_is_looked_at_there(backbone):
    """ARank, attention received and the competition of tasks run on the device, the first two
    with the CPU's numbers.
    """
    model = build(tiny(backbone))
    batch = sample(model.config, 3, 12, 0, "left", backbone == "showo")
    here = observations.attention_received(model, batch, "mmu"), arank(model, batch, "mmu")
    model, batch = model.to(DEVICE), batch.to(DEVICE)
    torch.testing.assert_close(observations.attention_received(model, batch, "mmu"), here[0], check_device=False)
    torch.testing.assert_close(arank(model, batch, "mmu"), here[1], check_device=False)
    won = observations.competition(model, lambda: {"t2i": batch, "mmu": batch}, 2, {"t2i": 1.0, "mmu": 1.0}, counted=2)
    assert won["t2i"][1] + won["mmu"][1] == pytest.approx(1)
