"""Scaling of pixels, uint8 to float32 and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import data


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_from_uint8_maps_the_range_to_minus_one_to_one(asarray):
    x = data.from_uint8(asarray(np.array([0, 51, 102, 204, 255], np.uint8)))
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, [-1, -0.6, -0.2, 0.6, 1], atol=1e-6)


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_to_uint8_truncates_and_clips(asarray):
    x = asarray(np.array([-9, -1, 0, 0.5, 0.999, 1, 9], np.float32))
    y = data.to_uint8(x)
    assert isinstance(y, np.ndarray) and y.dtype == np.uint8
    np.testing.assert_array_equal(y, [0, 0, 127, 191, 254, 255, 255])


def test_scaling_there_and_back_loses_one_level_from_1_to_63_only():
    v = np.arange(256, dtype=np.uint8)
    lost = (v >= 1) & (v <= 63)
    np.testing.assert_array_equal(data.to_uint8(data.from_uint8(v)), v - lost)


def test_rounding_there_and_back_loses_nothing():
    v = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(data.to_uint8(data.from_uint8(v), "round"), v)


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_rounding_takes_the_nearest_level_and_the_floor_the_one_below(asarray):
    v = np.arange(255)[:, None] + np.array([0.01, 0.49, 0.51, 0.99])
    x = asarray((v / 127.5 - 1).astype(np.float32))
    nearest = v.astype(int) + np.array([0, 0, 1, 1])
    np.testing.assert_array_equal(data.to_uint8(x, "round"), nearest)
    np.testing.assert_array_equal(data.to_uint8(x, "floor"), v.astype(int))
    ends = np.array([-9, -1.001, 1.001, 9], np.float32)
    np.testing.assert_array_equal(data.to_uint8(ends, "round"), [0, 0, 255, 255])


def test_another_rounding_is_refused():
    with pytest.raises(ValueError, match=r"one of \('floor', 'round'\), got 'ceil'\.$"):
        data.to_uint8(np.zeros(3, np.float32), "ceil")


def test_from_uint8_refuses_what_is_scaled_already():
    with pytest.raises(
        ValueError, match=r"^images must be a uint8 array \[...\], got float32 \[3\]"
    ):
        data.from_uint8(np.zeros(3, np.float32))
