"""Every python block of README.md and tutorials/*.md runs, in order, and prints what the page says.

The ```text block after a ```python block is its output; a python block without one prints nothing.
A page runs in an empty folder, as if that were the root of the repository. `python
tests/test_tutorials.py --rewrite` writes the outputs into the pages and what they drew in out/ into
tutorials/figures.
"""
import codeop
import contextlib
import io
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n*^```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?)")


def differences(expected: str, printed: str) -> list:
    """Lines that differ: words must be equal, numbers within 1 % or 1e-3.

    A number behind "~" is of a model that was trained here, and another processor trains another
    one: within 35 % or 0.1. Runs of blanks count as one.
    """
    a, b = expected.strip().split("\n"), printed.strip().split("\n")
    count = max(len(a), len(b))
    a, b = a + ["(no line)"] * (count - len(a)), b + ["(no line)"] * (count - len(b))
    return [f"expected: {x}\n printed: {y}" for x, y in zip(a, b) if not same_line(x, y)]


def same_line(expected: str, printed: str) -> bool:
    # words at even places, numbers at odd ones
    a, b = NUMBER.split(expected), NUMBER.split(printed)
    words, numbers = zip(a[::2], b[::2]), zip(a[1::2], b[1::2])
    if len(a) != len(b) or any(x.split() != y.split() for x, y in words):
        return False
    for before, (x, y) in zip(a[::2], numbers):
        x, y = float(x.replace(",", "")), float(y.replace(",", ""))
        allowed = max(0.35 * abs(x), 0.1) if before.endswith("~") else max(0.01 * abs(x), 1e-3)
        if abs(x - y) > allowed:
            return False
    return True


def run(text: str, name: str, folder) -> list:
    """Run a page's blocks in one namespace; [(match, what it printed)]."""
    space, results = {"__name__": name}, []
    Path(folder).mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        for match in BLOCK.finditer(text):
            first_line = text[:match.start(1)].count("\n")  # so that an error names the page's line
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * first_line + match[1], name, "exec"), space)
            results.append((match, out.getvalue()))
    return results


def rewritten(text: str, results: list) -> str:
    """The page with every output in its place; nothing else changes."""
    parts, end = [], 0
    for match, printed in results:
        lines = "".join(line.rstrip() + "\n" for line in printed.strip("\n").split("\n")) if printed.strip() else ""
        parts += [text[end:match.start()], f"```python\n{match[1]}```\n", f"\n```text\n{lines}```\n" if lines else ""]
        end = match.end()
    return "".join([*parts, text[end:]])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, tmp_path):
    """Every block prints what the page says; every figure and every test that the page names is
    there.
    """
    text = page.read_text()
    for match, printed in run(text, page.name, tmp_path):
        line = text[:match.start()].count("\n") + 1
        wrong = "\n".join(differences(match[2] or "", printed))
        assert not wrong, f"{page.name}, block at line {line}:\n{wrong}"
    drawn = {f"figures/{path.name}" for path in (tmp_path / "out").glob("*.svg")}
    for figure in drawn | set(re.findall(r"\]\((figures/[^)]+)\)", text)):
        assert (page.parent / figure).is_file(), f"{page.name}: {figure} is missing, run this file with --rewrite"
    for file, name in re.findall(r"(tests/\w+\.py)::(\w+)", text):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{page.name} names {file}::{name}"


def refused(block: str) -> str | None:
    """What Python's prompt stops at when a block is pasted: a body that no blank line ends, or
    that has one inside.
    """
    compiler, pending = codeop.CommandCompiler(), []
    for line in block.split("\n"):
        pending.append(line)
        try:
            if compiler("\n".join(pending), "<stdin>", "single") is not None:
                pending = []
        except SyntaxError:
            return line
    return "\n".join(pending).strip() or None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_can_be_pasted(page):
    """Line by line, as into `python`."""
    for match in BLOCK.finditer(page.read_text()):
        assert refused(match[1]) is None, page.name


@pytest.mark.parametrize("block, line", [
    ("for i in 'ab':\n    print(i)\n\ni\n", None), ("x = (1,\n     2)\nx\n", None), ('x = """\n\n"""\n', None),
    ("for i in 'ab':\n    print(i)\ni\n", "i"), ("if 1:\n    x\n\n    y\n", "    y"), ("x = (1,\n", "x = (1,")])
def test_what_a_prompt_refuses(block, line):
    """A body needs one blank line, behind it; brackets and quotes may hold some."""
    assert refused(block) == line


@pytest.mark.parametrize("expected, printed, same", [
    ("loss 1.00 and 3", "loss 1.009 and 3", True), ("loss 1.00", "loss 1.02", False), ("loss 1.00", "less 1.00", False),
    ("0.0001", "0.0009", True), ("0.0001", "0.0021", False), ("-1.0", "1.0", False), ("a  b\n", "a b", True),
    ("a b", "ab", False), ("True", "False", False), ("one\ntwo", "one", False), ("", "something", False),
    ("1,000,000", "1,009,000", True), ("1,000,000", "1,020,000", False), ("t2i 1e-05", "t2i 2e-05", True),
    ("1 2", "1", False), ("2e3", "2.1e3", False), ("nan", "1.0", False), ("~0.90 x", "~0.70 x", True), ("~0.90", "~0.50", False), ("~0.02", "~0.11", True), ("#.# 12", "### 12", False)])
def test_comparison(expected, printed, same):
    """A wrong word or a number that is 2 % off is a difference; 0.9 %, or 8e-4 near zero, is
    none.
    """
    assert (not differences(expected, printed)) == same


PAGE = "# Page\n\n```python\nx = 2\nprint('x', x)\n```\n\n{}words\n\n```python\ny = x\n```\n\n```bash\nmake\n```\n"


def test_run_and_rewrite(tmp_path):
    """Blocks share a namespace, outputs land after their block and only there, rewriting twice
    changes nothing.
    """
    for number, output in enumerate(("", "```text\nx 3\n```\n\n")):
        text = PAGE.format(output)
        results = run(text, "page", tmp_path / str(number))
        assert [printed for _, printed in results] == ["x 2\n", ""] and results[0][0][2] == (output[8:12] or None)
        assert differences(results[0][0][2] or "", results[0][1])
        again = rewritten(text, results)
        assert again == PAGE.format("```text\nx 2\n```\n\n")
        assert rewritten(again, run(again, "page", tmp_path / f"again {number}")) == again


def test_an_error_names_the_line_of_the_page(tmp_path):
    """A traceback points into the Markdown file."""
    with pytest.raises(ZeroDivisionError) as caught:
        run("# Page\n\n```python\n1 / 0\n```\n", "page.md", tmp_path / "folder")
    assert (caught.traceback[-1].frame.code.raw.co_filename, caught.traceback[-1].lineno + 1) == ("page.md", 4)


if __name__ == "__main__":
    assert sys.argv[1:2] == ["--rewrite"], "usage: python tests/test_tutorials.py --rewrite [01_start ..]"
    sys.path.insert(0, str(ROOT))
    for page in [page for page in PAGES if not sys.argv[2:] or page.stem in sys.argv[2:]]:
        with tempfile.TemporaryDirectory() as folder:
            text = page.read_text()
            page.write_text(rewritten(text, run(text, page.name, folder)))
            for figure in Path(folder).glob("out/*.svg"):
                shutil.copy(figure, ROOT / "tutorials/figures")
        print(f"{page.relative_to(ROOT)} rewritten")
