"""Type hints help whoever uses the library: pyright reads two files of small calls."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "tests" / "type_checks" / f"{name}.py" for name in ("right", "wrong")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("pyright") is None, reason="pyright is not installed"
    ),
]


@pytest.fixture(scope="module")
def refused():
    """File -> {line: what pyright says of it}."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath"]
    done = subprocess.run(
        [*command, sys.executable, *map(str, FILES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = {path.name: {} for path in FILES}
    for row in json.loads(done.stdout)["generalDiagnostics"]:
        line = row["range"]["start"]["line"] + 1
        found[Path(row["file"]).name][line] = row["message"]
    return found


def test_pyright_accepts_right_use_of_the_library(refused):
    assert refused["right.py"] == {}


def test_pyright_refuses_swapped_missing_and_misspelt_arguments(refused):
    lines = FILES[1].read_text().splitlines()
    wrong = {n for n, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert len(wrong) > 50
    assert {lines[n - 1] for n in wrong - refused["wrong.py"].keys()} == set()
    assert {lines[n - 1] for n in refused["wrong.py"].keys() - wrong} == set()
