"""benchmarks/choices.py: the values of a field go on from one dense model, which a file keeps."""
import sys

import pytest

from benchmarks import choices


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setitem(choices.toy.SETTINGS, "emu3", choices.toy.SETTINGS["emu3"] | {"t2i": 2, "mmu": 2})

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["choices.py", *argv])
        choices.main()
        return capsys.readouterr().out.strip().splitlines()
    return call


def test_every_choice_has_its_line(run, tmp_path, monkeypatch):
    """A line for a value of the field: four losses, four accuracies, agreement and base rate. The dense model is kept."""
    monkeypatch.setitem(choices.FIELDS, "membership", ("router",))
    dense = tmp_path / "dense.pt"
    names, values = (line.split() for line in run("membership", "--steps", "2", "--scenes", "7", "--dense", str(dense))[-2:])
    assert (names[0], values[0]) == ("membership", "router") and len(values) == 12
    saved, *numbers = map(float, values[1:])
    assert 0.39 < saved < 0.41 and all(x > 1 for x in numbers[:4]) and all(0 <= x <= 1 for x in numbers[4:]) and numbers[9] >= 0.5
    assert choices.load_checkpoint(dense)[1]["steps"] == 2


def test_the_methods_of_the_comparison():
    """UniMoD and basic MoD meet the budget, one router for both tasks has UniMoD's plan, the others save what they save."""
    config = choices.toy.ModelConfig.preset("toy-emu3")
    table = {"t2i": [0.9, 0.5, 0.2, 0.3, 0.6, 0.4, 0.3, 0.2], "mmu": [0.8, 0.2, 0.2, 0.1, 0.3, 0.3, 0.4, 0.6]}
    lengths = {"t2i": 90, "mmu": 100}
    plans = {name: choices.variant("method", name, table, config, lengths, 0.6) for name in choices.FIELDS["method"]}
    saved = {name: 1 - choices.flops_ratio(config, plan, lengths, "train") for name, (plan, changes) in plans.items()}
    assert saved["unimod"] == pytest.approx(0.4, abs=5e-3) == saved["mod"] and saved["dense"] == 0
    assert plans["one router"][0] == choices.Plan(plans["unimod"][0].keep, shared_router=True) != plans["unimod"][0]
    assert plans["mod"][0].shared_router and 0 < saved["early_exit"] < saved["interleaved"]
    plan, changes = choices.variant("gate", "tanh", table, config, lengths, 0.6)
    assert (plan, changes) == (plans["unimod"][0], {"gate": "tanh"})


def test_a_foreign_dense_model_is_refused(run, tmp_path, capsys):
    """--dense with a model of another shape: one line that names the file."""
    file = tmp_path / "other.pt"
    other = choices.toy.ModelConfig.preset("toy-showo")
    choices.save_checkpoint(file, choices.toy.UnifiedTransformer(other), steps=2)
    with pytest.raises(SystemExit):
        run("gate", "--dense", str(file))
    assert f"{file} holds another model" in capsys.readouterr().err
