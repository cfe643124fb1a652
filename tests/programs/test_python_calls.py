"""Wrong types given to the Python API are refused in a sentence that names the field.

In a process of its own: here, jaxtyping's hook would refuse most of them first.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_wrong_argument_from_python_is_refused_by_its_name(tmp_path):
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "support.python_calls", tmp_path],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    made = ["empty", "images.npz", "other.npz", "own.safetensors", "run", "text.pt"]
    assert outcomes.pop("left in the folder") == made
    assert len(outcomes) > 200
    for name, (begins, error, message) in outcomes.items():
        assert error == "ValueError", f"{name}: {error} {message}"
        assert message.startswith(begins), f"{name}: {message}"
        assert ", got" in message and message.endswith("."), f"{name}: {message}"
        assert "\n" not in message and len(message) < 300, f"{name}: {message}"
