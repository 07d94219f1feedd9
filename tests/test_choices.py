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
    assert (names[0], values[0]) == ("membership", "router") and len(values) == 11
    numbers = list(map(float, values[1:]))
    assert all(x > 1 for x in numbers[:4]) and all(0 <= x <= 1 for x in numbers[4:]) and numbers[9] >= 0.5
    assert choices.load_checkpoint(dense)[1]["steps"] == 2


def test_a_foreign_dense_model_is_refused(run, tmp_path, capsys):
    """--dense with a model of another shape: one line that names the file."""
    file = tmp_path / "other.pt"
    other = choices.toy.ModelConfig.preset("toy-showo")
    choices.save_checkpoint(file, choices.toy.UnifiedTransformer(other), steps=2)
    with pytest.raises(SystemExit):
        run("gate", "--dense", str(file))
    assert f"{file} holds another model" in capsys.readouterr().err
