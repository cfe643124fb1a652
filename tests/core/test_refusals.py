"""Wrong calls of the library are refused in a sentence, right ones are accepted.

In a process of its own: here, jaxtyping's hook would refuse most of them first.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes():
    """What every call of `support.library_calls` has raised or returned."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "support.library_calls"],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_wrong_call_of_the_library_is_refused_in_one_sentence(outcomes):
    assert len(outcomes["wrong"]) > 600
    for name, (begins, error, message) in outcomes["wrong"].items():
        assert error == "ValueError", f"{name}: {error} {message}"
        assert message.startswith(begins), f"{name}: {message}"
        assert ", got " in message and message.endswith("."), f"{name}: {message}"
        assert "\n" not in message and len(message) < 250, f"{name}: {message}"


def test_right_calls_of_the_library_are_accepted_under_every_transformation(outcomes):
    assert len(outcomes["right"]) > 30
    wrong = {name: row for name, row in outcomes["right"].items() if row[0] != row[1]}
    assert wrong == {}
