"""Functions that take a sampler's step and return one: inpainting, shared noise."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jax_diffusion import checks
from jax_diffusion.checks import placement, signatures
from jax_diffusion.samplers.loop import StepFn, check_step_fn
from jax_diffusion.samplers.noise import fold_in, keys_of_step, normal
from jax_diffusion.samplers.state import advance, marked, traits_of
from jax_diffusion.schedules import take


def inpaint(
    step_fn: StepFn,
    x_known: Float[Array, "b *d"],
    mask: Array | Callable[[Array], Array],
) -> StepFn:
    """Wraps a step: afterwards known pixels are x_known, noised to the new level.

    After the last step the known pixels equal x_known exactly (Song et al. 2021, app.
    I.2). See `editing.repaint` for results that fit together better.

    Args:
        step_fn: the step to wrap.
        x_known: [b, ...] data; values where the mask is 0 are ignored.
        mask: 1 where pixels are known and 0 elsewhere, of a shape that broadcasts
            against data; or an orthogonal projection of images [b, ...] onto what is
            known of them, such as `editing.gray`.

    Returns:
        A step that also draws by itself, with a second purpose of the keys of its row.

    Raises:
        ValueError: if the shape of the mask does not fit the data, or x_known is no
            float array.
    """
    check_step_fn("step_fn", step_fn)
    checks.data("x_known", x_known, ("b", ...))
    if callable(mask):
        signatures.takes("mask", mask, "x")
    else:
        checks.broadcasts("mask", mask, x_known.shape)
        if checks.known(mask):
            values = np.asarray(mask, np.float64)
            wrong = values[~((values >= 0) & (values <= 1))]
            if wrong.size:
                raise ValueError(f"mask must be in [0, 1], got {wrong.flat[0]}.")
    project = mask if callable(mask) else functools.partial(_masked, mask, x_known)

    @marked(**traits_of(step_fn))
    def step(keys, denoise_fn, schedule, state, t):
        state = step_fn(keys, denoise_fn, schedule, state, t)
        prev = take(schedule, t, x_known.ndim).prev
        keys = fold_in(fold_in(keys, t), 1)  # `step_fn` has drawn with those of row t
        known = prev.signal * x_known + prev.noise * normal(keys, x_known.shape[1:])
        return advance(state, x=state.x - project(state.x) + project(known))

    return step


def share_noise(
    step_fn: StepFn, key: Key[Array, ""] | Key[Array, "b"], *, until: int
) -> StepFn:
    """Wraps a step: at t >= until, images with the same `key` get the same noise.

    Images that also share x_T stay equal down to t = until and differ after it, as in
    figure 7 of Ho et al. 2020 (until = T - repeat_noise_steps of their code).

    Args:
        step_fn: the step to wrap.
        key: one for all images, or [b], equal for the images of a group.
        until: the last t at which noise is shared.

    Returns:
        A step that gives `step_fn` other keys at t >= until.

    Raises:
        ValueError: unless step_fn is a function, until an integer, and key typed and
            of as many as there are images.
    """
    check_step_fn("step_fn", step_fn)
    checks.array("key", key, "key", ("b",) if np.ndim(key) else ())
    if isinstance(until, jax.Array):
        checks.array("until", until, "int", ())
    else:
        checks.integer("until", until)

    @marked(**traits_of(step_fn))
    def step(keys, denoise_fn, schedule, state, t):
        if np.ndim(key):
            checks.keys("key", key, keys.shape[0])
        others = jnp.where(t >= until, key, keys)
        with keys_of_step(others, instead_of=keys):
            return step_fn(others, denoise_fn, schedule, state, t)

    return step


def on_step(step_fn: StepFn, on_step: Callable[[Array], None]) -> StepFn:
    """Wraps a step: calls a function on the host at every step, for a progress bar.

    Args:
        step_fn: the step to wrap.
        on_step: called with t, an int32 scalar; its result is ignored.

    Returns:
        A step with the results of `step_fn`.

    Raises:
        ValueError: unless both are functions.
    """
    check_step_fn("step_fn", step_fn)
    checks.function("on_step", on_step, "(t,)")
    signatures.takes("on_step", on_step, "t")

    @marked(**traits_of(step_fn))
    def step(keys, denoise_fn, schedule, state, t):
        jax.debug.callback(on_step, placement.everywhere(t)[0] if jnp.ndim(t) else t)
        return step_fn(keys, denoise_fn, schedule, state, t)

    return step


watch = on_step  # its old name


def _masked(mask, x_known, x):
    """x where the mask is 1 and 0 elsewhere."""
    shape = (1,) * (x_known.ndim - np.ndim(mask)) + np.shape(mask)
    return jnp.reshape(mask, shape) * x
