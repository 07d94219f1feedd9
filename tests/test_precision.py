"""One precision, chosen by name and kept by the model: what must hold in bf16 holds by force on
every CPU.
"""
import copy
import json

import pytest
import torch

import train_toy as toy
from helpers import build, call, tiny
from launch import finish, start
from test_full import STOP, TINY, data, rows, run, same_weights  # noqa: F401
from unimod_mini import (Cache, Plan, Tokenizer, UnifiedTransformer, calibrate, draw_and_ask,
                         generate_image, load_checkpoint, make_optimizers, predictor_report,
                         save_checkpoint, train_step)
from unimod_mini.generate import generate_codes
from unimod_mini.layer_switch import arank
from unimod_mini.device import find_precision

both = pytest.mark.parametrize("backbone", ("showo", "emu3"))
PLAN = Plan({"t2i": (1, .5, .3), "mmu": (.4, 1, .6)})


def bf16(argv):
    """The same settings in bf16."""
    return ["bf16" if word == "float32" else word for word in argv]


def routed(backbone, precision, **changes):
    model = build(tiny(backbone, **changes), PLAN, dtype=torch.float32)
    model.precision = precision
    return model


# ---------------------------------------------------------------- which one

@pytest.mark.parametrize("multiplies", (True, False))
def test_auto_takes_what_the_hardware_multiplies(monkeypatch, multiplies):
    """auto: bf16 (or what a model was trained in) where the CPU multiplies it; a name is taken
    at its word.
    """
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    cpu = torch.device("cpu")
    assert find_precision("auto", cpu) == ("bf16" if multiplies else "float32")
    assert find_precision("auto", cpu, trained="float32") == "float32"
    assert find_precision("auto", torch.device("mps")) == "float32"
    assert [find_precision(name, cpu) for name in ("float32", "bf16")] == ["float32", "bf16"]
    with pytest.raises(ValueError, match="no precision 'bf61': choose from auto, float32, bf16"):
        find_precision("bf61", cpu)


@pytest.mark.parametrize("multiplies", (True, False))
def test_a_checkpoint_brings_its_precision(tmp_path, monkeypatch, multiplies):
    """What a model was trained in is loaded again, float32 where the device does not multiply
    it, or what is asked for.
    """
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    for trained in ("float32", "bf16"):
        save_checkpoint(tmp_path / "a.pt", routed("emu3", trained))
        assert load_checkpoint(tmp_path / "a.pt")[0].precision == (trained if multiplies else "float32")
        assert load_checkpoint(tmp_path / "a.pt", precision="bf16")[0].precision == "bf16"
        assert load_checkpoint(tmp_path / "a.pt", precision="float32")[0].precision == "float32"
    stored = torch.load(tmp_path / "a.pt", weights_only=True)
    del stored["precision"]                                # older checkpoints have none
    torch.save(stored, tmp_path / "old.pt")
    assert load_checkpoint(tmp_path / "old.pt")[0].precision == "float32"


def test_copies_keep_it():
    """with_plan and copies compute as their parent; a new model computes in float32."""
    model = routed("showo", "bf16")
    assert {m.precision for m in (model.with_plan(None), copy.copy(model), copy.deepcopy(model))} == {"bf16"}
    assert UnifiedTransformer(tiny("showo")).precision == "float32"


@pytest.mark.parametrize("precision", ("float32", "bf16"))
def test_both_scripts_print_and_save_it(data, tmp_path, capsys, precision):  # noqa: F811
    """--precision reaches the log, the settings, the metrics and the checkpoint."""
    run(tmp_path / "full", data["emu3"], *(TINY if precision == "float32" else bf16(TINY)), "--steps", "2", "--dense", "1")
    log = capsys.readouterr().out
    assert f"torch {torch.__version__}, {precision}" in log and f"--precision                 {precision}" in log
    assert json.loads((tmp_path / "full" / "settings.json").read_text())["precision"] == precision
    assert load_checkpoint(tmp_path / "full" / "model.pt", precision="auto")[1].keys() >= {"tokenizer"}
    assert torch.load(tmp_path / "full" / "model.pt", weights_only=True)["precision"] == precision



@both
def test_scores_stay_float32_and_exactly_k_are_kept(backbone):
    """Products are bf16, scores, weights and logits' losses are not: the router's ranking has no
    ties of rounding.
    """
    model, plain = routed(backbone, "bf16"), routed(backbone, "float32")
    inputs = call(model.config, 3, 14, seed=1, padding="left", spans=backbone == "showo")
    out, exact = model(**inputs, task="mmu"), plain(**inputs, task="mmu")
    assert out.logits.dtype == torch.bfloat16 and exact.logits.dtype == torch.float32
    for decision, twin in zip(out.routing, exact.routing):
        if decision is not None:
            assert decision.scores.dtype == torch.float32
            assert torch.equal(decision.selected.sum(1), twin.selected.sum(1))
    assert 0 < (out.logits.float() - exact.logits).abs().max() < 0.2 * exact.logits.abs().max()


@both
def test_an_outer_autocast_changes_nothing(backbone):
    """A model under the caller's own bf16 autocast is a model whose precision is bf16."""
    model, plain = routed(backbone, "bf16"), routed(backbone, "float32")
    inputs = call(model.config, 2, 10, seed=0, spans=backbone == "showo")
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(**inputs, task="t2i").logits
        assert torch.equal(model(**inputs, task="t2i").logits, expected)
    assert torch.equal(model(**inputs, task="t2i").logits, expected)


@both
def test_arank_is_measured_in_float32(backbone):
    """A plan does not depend on the precision of the model that it is made for."""
    world, tokenizer = toy.make_world(toy.parse(["--backbone", backbone]))
    batch = toy.Sampler(world, tokenizer, 0, 4, 4)()["mmu"]
    model = toy.dense_model(toy.toy_config(backbone, tokenizer), "cpu", "bf16")
    measured = arank(model, batch, "mmu")
    model.precision = "float32"
    assert torch.equal(arank(model, batch, "mmu"), measured)


@both
def test_a_toy_step_in_bf16(backbone):
    """Weights stay float32 and finite, the losses are those of float32 to 1 %, every weight but
    idle ones moves.
    """
    losses = {}
    for precision in ("float32", "bf16"):
        toy.torch.manual_seed(0)
        world, tokenizer = toy.make_world(toy.parse(["--backbone", backbone]))
        batches = toy.Sampler(world, tokenizer, 0, 8, 8)()
        model = toy.dense_model(toy.toy_config(backbone, tokenizer), "cpu", precision)
        model = model.with_plan(Plan({task: (1, .5) + (.3,) * 6 for task in ("t2i", "mmu")}))
        before = copy.deepcopy(model.state_dict())
        losses[precision] = train_step(model, make_optimizers(model), batches, 0, 1.0)
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
        assert not torch.equal(model.blocks[3].mlp.up.weight, before["blocks.3.mlp.up.weight"])
    for task, loss in losses["bf16"].items():
        assert loss.item() == pytest.approx(losses["float32"][task].item(), rel=1e-2)


@both
def test_thresholds_hold_in_the_precision_that_they_serve_in(backbone):
    """Calibrated in bf16, causal routing keeps in bf16 as many tokens as top-k, to one in
    twenty.
    """
    toy.torch.manual_seed(0)
    world, tokenizer = toy.make_world(toy.parse(["--backbone", backbone]))
    model = toy.dense_model(toy.toy_config(backbone, tokenizer), "cpu", "bf16")
    model = model.with_plan(Plan({task: (1, .5) + (.3,) * 6 for task in ("t2i", "mmu")}))
    batches = toy.Sampler(world, tokenizer, 0, 16, 16)()
    for step in range(4):
        train_step(model, make_optimizers(model), batches, step, 1.0)
    calibrate(model, batches)
    report = predictor_report(model, batches)
    assert report["capacity_realised"] == pytest.approx(report["capacity_trained"], abs=0.05)


@both
def test_a_cache_in_bf16_holds_what_one_forward_computes(backbone):
    """Chunks behind a cache and the whole at once: the same logits to the rounding of bf16."""
    model = routed(backbone, "bf16").with_plan(None)
    ids = call(model.config, 2, 12, seed=3)["ids"]
    cache = Cache(model, "mmu", 2, 12)
    with torch.no_grad():
        whole = model(ids, task="mmu", routing="causal").logits.float()
        parts = [model(part, task="mmu", routing="causal", cache=cache).logits.float() for part in ids.split(5, 1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 0.05 * whole.abs().max()


@both
@pytest.mark.parametrize("precision", ("float32", "bf16"))
def test_python_draws_what_the_command_line_draws(tmp_path, monkeypatch, backbone, precision):
    """The same seed, the same picture and the same answer: the precision is the model's, not the
    caller's.
    """
    toy.torch.manual_seed(0)
    world, tokenizer = toy.make_world(toy.parse(["--backbone", backbone]))
    model = toy.dense_model(toy.toy_config(backbone, tokenizer), "cpu", precision)
    drawing = {"temperature": 1.0, "guidance": 1.0, "steps": 4}
    save_checkpoint(tmp_path / "a.pt", model, tokenizer=tokenizer.state(), drawing=drawing)
    drawn = []
    monkeypatch.setattr(draw_and_ask, "generate_codes", lambda *given, **options: drawn.append(generate_codes(*given, **options)) or drawn[-1])
    draw_and_ask.main(["--checkpoint", str(tmp_path / "a.pt"), "--precision", precision, "--prompt", "a green ring",
                   "--out", str(tmp_path / "a.png"), "--device", "cpu"])
    loaded, stored = load_checkpoint(tmp_path / "a.pt", precision=precision)
    image = generate_image(loaded, Tokenizer.from_state(stored["tokenizer"]), "a green ring", **stored["drawing"])
    assert torch.equal(tokenizer.image.decode(drawn[0])[0], image)
    assert torch.equal(generate_image(model, tokenizer, "a green ring", **drawing), image)


# ---------------------------------------------------------------- train_full.py in bf16

def test_a_run_in_bf16_goes_on_to_the_same_bits(data, tmp_path):  # noqa: F811
    """Stopped in the dense stage and after the switch, resumed, and finished: the weights of a
    run that nothing stopped.
    """
    run(tmp_path / "whole", data["showo"], *bf16(STOP))
    for step in (2, 4):
        out = tmp_path / f"stopped-{step}"
        assert run(out, data["showo"], *bf16(STOP), changes=[("term", [step], 0)])["step"] == step
        run(out, data["showo"], *bf16(STOP), "--resume", "auto")
        assert same_weights(out, tmp_path / "whole")


def test_two_processes_in_bf16_stay_near_one(data, tmp_path):  # noqa: F811
    """bf16 rounds every product anew for another number of rows: ten steps stay within 1e-2
    (float32: 1e-5).
    """
    given = [*bf16(TINY), "--steps", "10", "--dense", "1"]
    run(tmp_path / "one", data["emu3"], *given)
    argv = ["--data", str(data["emu3"]), "--out", str(tmp_path / "two"), *given]
    assert finish(start(2, [(argv, ())])) == [0, 0]
    one, two = (rows(tmp_path / name, "loss_t2i", "loss_mmu") for name in ("one", "two"))
    assert len(one) == len(two) == 10
    for a, b in zip(one, two):
        assert b == pytest.approx(a, abs=1e-2)
