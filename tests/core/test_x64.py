"""In JAX's mode of 64 bits everything computes in float32, or in the dtype of the data.

In a process of its own, as the mode holds for a whole process; what is compared is this
process, which has 32 bits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import calls_in_x64
from support.calls_in_x64 import DATA_CALLS, RUN
from support.oracles import F32_SUM

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]
# bfloat16 has 8 bits: what a chain rounds at each of its 10 steps, of data in [-1, 1].
BFLOAT16 = dict(rtol=0, atol=0.1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `calls_in_x64` wrote: arrays by dtype, call and leaf; "dtypes", "wide"."""
    file = tmp_path_factory.mktemp("x64") / "results.npz"
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    x64 = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-W", "error", "-m", "support.calls_in_x64", file]
    done = subprocess.run(
        command, env=os.environ | x64, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with np.load(file) as stored:
        arrays = dict(stored)
    told = {name: json.loads(str(arrays[name])) for name in ("dtypes", "wide")}
    return arrays | told


@pytest.fixture(scope="module")
def expected():
    assert not jax.config.jax_enable_x64
    return calls_in_x64.values(jnp.float32, RUN)


def test_float32_data_give_the_dtypes_that_they_give_in_32_bits(found):
    assert found["dtypes"]["float32"] == calls_in_x64.traced(jnp.float32)[0]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_data_of_another_dtype_keep_it(found, dtype):
    dtypes = found["dtypes"][dtype]
    assert {k: t for k, t in dtypes.items() if isinstance(t, str)} == {}
    assert [k for k in DATA_CALLS if {*dtypes[k]} != {dtype}] == []


@pytest.mark.parametrize(
    ("call", "dtype"),
    [
        *((call, dtype) for call in RUN for dtype in ("float32", "float64")),
        *((call, "bfloat16") for call in RUN if call in DATA_CALLS),
    ],
)
def test_values_are_those_of_float32_in_32_bits(found, expected, call, dtype):
    for i, leaf in enumerate(expected[call]):
        array = found[f"{dtype}|{call}|{i}"]
        assert np.isfinite(array).all()
        if dtype == "bfloat16":  # rounding may turn the sign that guidance follows
            assert np.mean(np.isclose(array, leaf, **BFLOAT16)) > 0.95
        else:
            np.testing.assert_allclose(array, leaf, **F32_SUM)


def test_nothing_as_large_as_the_data_is_computed_in_float64_unless_they_are(found):
    assert found["wide"]["float32"] == found["wide"]["bfloat16"] == []
    assert {*DATA_CALLS} <= {*found["wide"]["float64"]}
