"""The step clock: every moment is counted once, in a time that the tests make pass."""

import numpy as np
import pytest

from jax_diffusion.runtime.clock import StepClock


class FakeTime:
    """Seconds pass when told to. Halves and quarters: sums are exact."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds

    def wait(self, seconds):
        self.seconds += seconds


@pytest.fixture
def now():
    return FakeTime()


@pytest.fixture
def clock(now):
    return StepClock(now)


def shares(line):
    return [line[f"{part}_share"] for part in ("data", "dispatch", "device", "other")]


def pass_window(clock, now, steps, data, dispatch, device, other):
    """A window of the log; seconds of each part, the first two a step."""
    for _ in range(steps):
        with clock.measure("data"):
            now.wait(data)
        with clock.measure("dispatch"):
            now.wait(dispatch)
    with clock.measure("device"):
        now.wait(device)
    now.wait(other)


def test_time_is_split_into_its_parts(clock, now):
    pass_window(clock, now, 4, data=0.25, dispatch=0.5, device=4, other=1)
    line = clock.line(steps=4, images=64)
    assert shares(line) == [1 / 8, 2 / 8, 4 / 8, 1 / 8]
    assert (line["seconds_per_step"], line["images_per_second"]) == (2, 8)


def test_shares_sum_to_one(now):
    clock = StepClock(now)
    pass_window(clock, now, 7, data=0.1, dispatch=0.07, device=1.3, other=0.01)
    line = clock.line(steps=7, images=7)
    np.testing.assert_allclose(sum(shares(line)), 1, rtol=1e-12)


def test_every_line_starts_anew(clock, now):
    pass_window(clock, now, 2, data=8, dispatch=8, device=8, other=8)
    clock.line(steps=2, images=2)
    pass_window(clock, now, 2, data=0, dispatch=1, device=2, other=0)
    line = clock.line(steps=2, images=16)
    assert shares(line) == [0, 0.5, 0.5, 0]
    assert (line["seconds_per_step"], line["images_per_second"]) == (2, 4)


def test_pauses_are_in_no_number(clock, now):
    pass_window(clock, now, 2, data=0.5, dispatch=0.5, device=2, other=0)
    with clock.pause():
        now.wait(100)
        with clock.measure("device"):
            now.wait(50)
        now.wait(100)
    line = clock.line(steps=2, images=16)
    assert shares(line) == [1 / 4, 1 / 4, 2 / 4, 0]
    assert (line["seconds_per_step"], line["images_per_second"]) == (2, 4)


def test_time_of_nested_parts_is_charged_once_to_the_innermost(clock, now):
    with clock.measure("dispatch"):
        now.wait(1)
        with clock.measure("data"):
            now.wait(2)
            with clock.pause():
                now.wait(50)
            now.wait(1)
        now.wait(4)
    assert shares(clock.line(steps=1, images=1)) == [3 / 8, 5 / 8, 0, 0]


def test_part_that_fails_is_charged_and_over(clock, now):
    with pytest.raises(KeyError), clock.measure("data"):
        now.wait(3)
        raise KeyError
    now.wait(1)
    assert shares(clock.line(steps=1, images=1)) == [0.75, 0, 0, 0.25]


def test_line_within_a_part_splits_the_part(clock, now):
    with clock.measure("device"):
        now.wait(2)
        assert clock.line(steps=1, images=1)["seconds_per_step"] == 2
        now.wait(4)
    assert clock.line(steps=1, images=1)["seconds_per_step"] == 4


def test_roofline_is_the_part_of_the_peak_that_was_reached(clock, now):
    pass_window(clock, now, 4, data=0, dispatch=0, device=8, other=0)
    line = clock.line(steps=4, images=4, flops_per_step=3e9, peak_flops=6e9)
    assert line["roofline_share"] == 0.25  # half a second's work in two


@pytest.mark.parametrize("known", ["flops_per_step", "peak_flops"])
def test_roofline_needs_operations_and_peak(clock, now, known):
    now.wait(1)
    line = clock.line(steps=1, images=1, **{known: 1e9})
    assert "roofline_share" not in line


def test_clock_is_real_unless_another_is_given():
    line = StepClock().line(steps=1, images=1)
    assert shares(line) == [0, 0, 0, 1]


def test_clock_refuses_unknown_parts_and_lines_without_steps(clock):
    with pytest.raises(ValueError, match=r"^part must be one of .*, got 'sampling'\.$"):
        with clock.measure("sampling"):
            pass
    with pytest.raises(ValueError, match=r"^steps must be >= 1, got 0\.$"):
        clock.line(steps=0, images=0)
