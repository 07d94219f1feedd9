"""console.py: commands that end in one line, whatever stands in place of the terminal."""
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

import train_full as full
import train_toy as toy
from unimod_mini import draw_and_ask, flops
from unimod_mini.data import prepare
from unimod_mini.console import command, progress_bar, shows
from unimod_mini.pictures import terminal

ROOT = Path(toy.__file__).parent
COMMANDS = (["train_toy.py"], ["train_full.py"], *(["-m", f"unimod_mini.{name}"] for name in ("generate", "prepare", "flops", "data.emoji")))


def python(*words, **options):
    return subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_closed_pipe_ends_without_a_word(words):
    """`| head -1`, whose reader is gone before the first line: no traceback, no message."""
    process = python(*words, "--help")
    process.stdout.close()
    # 0: argparse saw the closed pipe first
    assert process.stderr.read() == b"" and process.wait() in (0, 141)


@pytest.mark.parametrize("error, code, said", [
    (ValueError("wrong"), 1, "error: wrong\n"), (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
    (ImportError("pip install x"), 1, "error: pip install x\n"), (KeyboardInterrupt(), 130, "told\n"),
    (BrokenPipeError(), 141, "")])
def test_errors_are_one_line(error, code, said):
    """What a command raises is one line on stderr and a status that is not 0; what it printed
    before is printed.
    """
    text = f"""from unimod_mini.console import command
with command(stopped="told"):
    print("before")
    raise {error!r}"""
    process = python("-c", text)
    out, err = process.communicate()
    assert (out, err.decode(), process.returncode) == (b"before\n", said, code)


def test_ctrl_c_in_the_toy_says_what_is_lost(tmp_path):
    """One line, no traceback, and the status of an interrupted command."""
    process = python("-u", "train_toy.py", "--out", tmp_path, "--device", "cpu")
    for line in process.stdout:
        if line.startswith(b"1. dense training"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate()
    said = err.decode().splitlines()[-1]
    assert said == "stopped: the weights of this run are lost, train_toy.py writes them at its end"
    assert b"Traceback" not in err and process.returncode == 130


def test_other_errors_keep_their_traceback():
    """A fault of this program is no bad input."""
    with pytest.raises(ZeroDivisionError), command():
        1 / 0
    with pytest.raises(SystemExit, match="error: division by zero"), command(errors=(ZeroDivisionError,)):
        1 / 0


@pytest.mark.parametrize("encoding", ("ascii", "latin-1", "utf-8"))
def test_letters_that_the_terminal_lacks(encoding):
    """They are written as escapes, in errors too; UTF-8 shows them as they are."""
    text = "from unimod_mini.console import command\nwith command():\n    print('\u732b')\n    raise ValueError('\u732b')"
    out = subprocess.run([sys.executable, "-c", text], capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": encoding})
    cat = "\u732b".encode(encoding, "backslashreplace").decode(encoding)
    assert out.stdout.decode(encoding).strip() == cat and out.stderr.decode(encoding).strip() == f"error: {cat}"


# ---------------------------------------------------------------- progress and pictures

def in_terminal(text, env):
    """What a Python text writes to a terminal of its own."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", text], stdout=slave, stderr=slave, cwd=ROOT, env={**os.environ, **env})
    os.close(slave)
    written = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # Linux says so of a terminal whose last writer is gone
            break
        if not piece:
            break
        written += piece
    assert process.wait() == 0, written
    return written


LOOP = """from unimod_mini.console import progress_bar
for i in progress_bar(range(3), desc="work", unit="step", mininterval=0):
    pass"""


def test_progress_with_a_terminal_is_a_bar():
    """It is drawn over itself."""
    assert in_terminal(LOOP, {}).count(b"\r") > 2


def test_progress_without_a_terminal_is_lines(capfd):
    """One at the beginning and one at the end of a short loop: no carriage return, no colour, no
    empty line.
    """
    out = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, cwd=ROOT)
    lines = out.stderr.decode().splitlines()
    assert b"\r" not in out.stderr and b"\x1b" not in out.stderr and len(lines) == 2
    assert lines[0].startswith("work:   0%") and lines[-1].startswith("work: 100%") and "3/3" in lines[-1]


def test_lines_come_each_so_often(monkeypatch, capsys):
    """A long loop says where it is every half minute (here: every tenth of a second), not at
    every step.
    """
    monkeypatch.setattr("unimod_mini.console.EVERY", 0.1)
    import time
    for _ in progress_bar(range(40), desc="work"):
        time.sleep(0.01)
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 8 and all(line.startswith("work:") for line in lines)


PICTURE = """import torch
from unimod_mini.pictures import terminal
from unimod_mini.console import command
with command():
    print(terminal(torch.tensor([[[[0, 0, 0], [255, 0, 0]], [[0, 255, 0], [255, 255, 255]]]], dtype=torch.uint8)))"""


@pytest.mark.parametrize("env, kind", [({"PYTHONIOENCODING": "utf-8"}, "blocks"), ({"PYTHONIOENCODING": "ascii"}, "blanks"),
                                       ({"PYTHONIOENCODING": "utf-8", "TERM": "dumb"}, "letters"),
                                       ({"PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}, "letters")])
def test_a_terminal_gets_what_it_can_show(env, kind):
    """Half blocks where it knows them, coloured blanks in ASCII, letters without colours."""
    out = in_terminal(PICTURE, {"TERM": "xterm", **env})
    assert (b"\x1b[" in out) == (kind != "letters") and ("▀".encode() in out) == (kind == "blocks")
    assert out.count(b"48;2;") == {"blocks": 2, "blanks": 4, "letters": 0}[kind]


def test_without_a_terminal_pictures_are_letters(capsys):
    """In a pipe, a file or a notebook: two letters a pixel, the fuller the brighter."""
    picture = torch.tensor([[[[0, 0, 0], [255, 255, 255]], [[128, 128, 128], [0, 0, 0]]]], dtype=torch.uint8)
    assert shows() == "letters" and terminal(picture) == "..@@\n++.."
    assert terminal(torch.cat((picture, picture))) == "..@@ ..@@\n++.. ++.."


# ---------------------------------------------------------------- help

@pytest.mark.parametrize("made", (draw_and_ask.parser, prepare.parser, toy.parser, flops.parser, full.parser), ids=lambda made: made.__module__)
def test_every_flag_has_a_help_text(made):
    """Of every command."""
    assert all(action.help and len(action.help) > 5 for action in made()._actions)

