"""Guidance: wrappers that steer a denoiser by a label or by a classifier.

    denoise_fn = classifier_free(denoise_fn, label, null_label, scale=3.0)
    denoise_fn = classifier(denoise_fn, schedule, log_prob_fn, scale=1.0)

Each takes a denoiser and returns one, so that they nest, also with
`diffusion.clip_x_0`. The order matters:

    clip_x_0(classifier_free(f, ...))  clips the guided x_0
    classifier_free(clip_x_0(f), ...)  clips x_0 with the label and x_0 without it; the
                                       guided x_0 may lie outside the bounds
    classifier(classifier_free(...))   is the right order of the two: inside
                                       `classifier_free` every image has two rows, and a
                                       log_prob_fn with one label an image has too few
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import checks, diffusion
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.schedules import NoiseSchedule, check_rows, check_schedule, take

Scale = float | Array | Callable[[Array], Array]
"""A guidance scale: one for all images, one for each image [b], or a function of t [b]
that returns scales [b], such as `within` makes.
"""


def classifier_free(
    denoise_fn: DenoiseFn,
    label: Int[Array, "b"],
    null_label: int | Int[Array, "b"],
    scale: Scale,
    *,
    rescale: float | Float[Array, ""] = 0.0,
) -> DenoiseFn:
    """Wraps a denoiser: x_0(null) + scale (x_0(label) - x_0(null)) as the new x_0.

    Classifier-free guidance, for a network that was trained with labels and with hidden
    labels. Combining x_0 is the same as combining eps or v; scale is 1 + w of Ho &
    Salimans 2022, eq. 6, so that 1 is the prediction with the label and 0 the one
    without. Both are made in one call, as neighboring rows of a batch of twice the
    size. The variance is that of the prediction with the label.

    Args:
        denoise_fn: takes the label by keyword, denoise_fn(x_t, t, label=...).
        label: int [b], the wanted labels.
        null_label: the label that means hidden, see `drop_labels`.
        scale: one number, one for each image, or a function of t, see `within`.
        rescale: in [0, 1]: how far x_0 is rescaled to the standard deviation, image by
            image, of the prediction with the label (Lin et al. 2023, eq. 15 and 16).

    Returns:
        A denoiser that takes no label.

    Raises:
        ValueError: if an argument has another type or shape, or is out of range; in a
            call, if label, scale and x_t do not fit each other.

    >>> def denoise_fn(x_t, t, *, label):
    ...     return diffusion.Prediction(0 * x_t + label[:, None], jnp.zeros(()))
    >>> label, null_label = jnp.array([1, 2]), 0
    >>> guided = classifier_free(denoise_fn, label, null_label, scale=3.0)
    >>> guided(jnp.zeros((2, 1)), jnp.array([5, 5])).x_0.tolist()
    [[3.0], [6.0]]
    """
    checks.function("denoise_fn", denoise_fn, "(x_t, t, label=)")
    checks.array("label", label, "int", ("b",))
    if np.ndim(null_label):
        checks.array("null_label", null_label, "int", label.shape)
    elif checks.known(null_label):
        checks.integer("null_label", np.asarray(null_label).item())
    _check_scale(scale, schedule=diffusion.schedule_of(denoise_fn))
    checks.number("rescale", rescale, at_least=0, at_most=1)

    def guided(x_t, t, **conditioning):
        checks.array("label", label, "int", x_t.shape[:1])
        null = jnp.broadcast_to(jnp.asarray(null_label, label.dtype), label.shape)
        rows = {"x_t": x_t, "t": t, **conditioning}
        twice = {name: jnp.repeat(a, 2, axis=0) for name, a in rows.items()}
        labels = jnp.stack([label, null], axis=1).reshape(-1)
        x_t_twice, t_twice = twice.pop("x_t"), twice.pop("t")
        prediction = denoise_fn(x_t_twice, t_twice, label=labels, **twice)
        diffusion.check_prediction(prediction, x_t_twice)
        log_var = jnp.broadcast_to(
            prediction.log_var, (2 * len(t), *prediction.log_var.shape[1:])
        )
        labeled, plain = prediction.x_0[::2], prediction.x_0[1::2]
        x_0 = plain + _column(scale, t, x_t.ndim) * (labeled - plain)
        axes = tuple(range(1, x_t.ndim))
        spread = jnp.std(x_0, axes, keepdims=True)
        ratio = jnp.std(labeled, axes, keepdims=True) / jnp.maximum(spread, 1e-6)
        x_0 = x_0 * (1 + rescale * (ratio - 1))
        grad = None if prediction.grad is None else prediction.grad[::2]
        return prediction._replace(x_0=x_0, log_var=log_var[::2], grad=grad)

    return diffusion.with_schedule(guided, denoise_fn)


def classifier(
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    log_prob_fn: Callable[[Array, Array], Float[Array, "b"]],
    scale: Scale = 1.0,
) -> DenoiseFn:
    """Wraps a denoiser: adds scale * grad log p(y | x_t) to the score.

    Classifier guidance (Dhariwal & Nichol 2021). The gradient goes into
    `Prediction.grad`, and each sampler applies it in its own way: ancestral sampling
    shifts its mean by variance times gradient (`diffusion.guided_mean`), the others
    shift eps (`diffusion.guided_x_0`).

    Args:
        denoise_fn: the denoiser to wrap.
        schedule: the steps to take.
        log_prob_fn: log_prob_fn(x_t, timesteps) -> log p(y | x_t) [b] in nats, each
            image by itself; timesteps [b] are what a network is told,
            `schedule.timesteps`. `label_log_prob` makes one from a classifier.
        scale: one number, one for each image, or a function of t, see `within`.

    Returns:
        A denoiser.

    Raises:
        ValueError: if an argument has another type; in a call, if log_prob_fn or
            denoise_fn returns something else, or x_t and t do not fit.

    >>> from jax_diffusion.schedules import cosine_betas, make_schedule
    >>> def denoise_fn(x_t, t):
    ...     return diffusion.Prediction(x_t, jnp.zeros(()))
    >>> schedule = make_schedule(cosine_betas(10))
    >>> guided = classifier(denoise_fn, schedule, lambda x, t: -x[:, 0] ** 2, scale=2.0)
    >>> guided(jnp.array([[1.0]]), jnp.array([5])).grad.tolist()
    [[-4.0]]
    """
    checks.function("denoise_fn", denoise_fn, "(x_t, t)")
    checks.function("log_prob_fn", log_prob_fn, "(x_t, timesteps)")
    check_schedule(schedule)
    diffusion.check_schedule_of(denoise_fn, schedule)
    _check_scale(scale, schedule=schedule)

    def guided(x_t, t, **conditioning):
        check_rows(schedule, t)
        prediction = denoise_fn(x_t, t, **conditioning)
        diffusion.check_prediction(prediction, x_t)
        timesteps = schedule.timesteps[t]

        def total(x):
            log_prob = log_prob_fn(x, timesteps)
            checks.array("log_prob_fn's output", log_prob, "float", t.shape)
            return jnp.sum(log_prob)

        grad = jax.grad(total)(x_t)
        grad = _column(scale, t, x_t.ndim) * grad
        if prediction.grad is not None:
            grad = prediction.grad + grad
        return prediction._replace(grad=grad)

    return diffusion.with_schedule(guided, schedule)


def shift_x_0(denoise_fn: DenoiseFn, schedule: NoiseSchedule) -> DenoiseFn:
    """Wraps a denoiser: moves `grad`, set by `classifier`, into x_0, to be clipped.

    With `diffusion.clip_x_0` around it, guidance cannot push x_0 out of bounds, which
    matters where steps are long and the signal is weak: the first steps of a cosine
    schedule are both. The official DDIM does not clip again.

    Args:
        denoise_fn: a denoiser that `classifier` has wrapped.
        schedule: the steps to take.

    Returns:
        A denoiser whose predictions have grad None.

    Raises:
        ValueError: if an argument has another type; in a call, if denoise_fn returns
            something else.
    """
    checks.function("denoise_fn", denoise_fn, "(x_t, t)")
    check_schedule(schedule)
    diffusion.check_schedule_of(denoise_fn, schedule)

    def shifted(x_t, t, **conditioning):
        prediction = denoise_fn(x_t, t, **conditioning)
        diffusion.check_prediction(prediction, x_t)
        x_0 = diffusion.guided_x_0(schedule, prediction, t)
        return prediction._replace(x_0=x_0, grad=None)

    return diffusion.with_schedule(shifted, schedule)


def label_log_prob(
    logits_fn: Callable[[Array, Array], Float[Array, "b k"]], label: Int[Array, "b"]
) -> Callable[[Array, Array], Float[Array, "b"]]:
    """Makes log p(label | x_t) from a classifier of noisy images, for `classifier`.

    Args:
        logits_fn: logits_fn(x_t, timesteps) -> logits [b, k].
        label: int [b], in [0, k).

    Returns:
        log_prob_fn(x_t, timesteps) -> nats [b].

    Raises:
        ValueError: unless label is int [b]; in a call, unless logits are [b, k] and
            label, where known, is in [0, k).
    """
    checks.function("logits_fn", logits_fn, "(x_t, timesteps)")
    checks.array("label", label, "int", ("b",))

    def log_prob(x_t, timesteps):
        logits = logits_fn(x_t, timesteps)
        checks.array("logits_fn's output", logits, "float", (*label.shape, "k"))
        checks.rows("label", label, logits.shape[-1])
        log_probs = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(log_probs, label[:, None], axis=-1)[:, 0]

    return log_prob


def within(
    schedule: NoiseSchedule,
    scale: float | Array,
    *,
    low: float | Float[Array, ""] = 0.0,
    high: float | Float[Array, ""] = jnp.inf,
    outside: float | Float[Array, ""] = 1.0,
) -> Callable[[Array], Array]:
    """Makes a scale for an interval of noise levels only (Kynkäänniemi et al. 2024).

    Args:
        schedule: the steps to take.
        scale: inside the interval; a number, or one for each image [b].
        low, high: the interval, in units of noise / signal, the paper's sigma; both
            ends are inside. It is empty if low is above high.
        outside: the scale elsewhere. 1 is the prediction with the label for
            `classifier_free`; give 0 for `classifier`.

    Returns:
        scale_fn(t) -> scales [b].

    Raises:
        ValueError: if an argument is out of range.

    >>> from jax_diffusion.schedules import cosine_betas, make_schedule
    >>> scale_fn = within(make_schedule(cosine_betas(10)), 3.0, low=0.3, high=2.0)
    >>> scale_fn(jnp.array([0, 5, 9])).tolist()
    [1.0, 3.0, 1.0]
    """
    check_schedule(schedule)
    _check_scale(scale)
    checks.number("low", low, at_least=0, infinite=True)
    checks.number("high", high, at_least=0, infinite=True)
    _check_scale(outside, "outside")

    def scale_fn(t):
        level = take(schedule, t, 1).now
        ratio = level.noise / jnp.maximum(level.signal, 1e-30)  # signal may be zero
        inside = (ratio >= low) & (ratio <= high)
        return jnp.where(inside, scale, outside)

    return diffusion.with_schedule(scale_fn, schedule)


def drop_labels(
    key: Key[Array, ""],
    label: Int[Array, "b"],
    null_label: int,
    share: float | Float[Array, ""],
) -> Int[Array, "b"]:
    """Replaces each label by `null_label`, independently with probability `share`.

    Args:
        key: says which ones.
        label: int [b].
        null_label: the label that means hidden.
        share: in [0, 1].

    Returns:
        Labels [b].

    Raises:
        ValueError: unless label is int [b], and share in [0, 1].

    >>> drop_labels(jax.random.key(0), jnp.array([3, 5, 2]), null_label=10, share=1.0)
    Array([10, 10, 10], dtype=int32)
    """
    checks.key("key", key)
    checks.array("label", label, "int", ("b",))
    if isinstance(null_label, jax.Array):
        checks.array("null_label", null_label, "int", ())
    else:
        checks.integer("null_label", null_label)
    checks.number("share", share, at_least=0, at_most=1)
    return jnp.where(
        jax.random.bernoulli(key, jnp.float32(share), label.shape), null_label, label
    ).astype(label.dtype)


def _check_scale(scale: Any, name: str = "scale", schedule: Any = None) -> None:
    """Raises ValueError unless a scale is one number, numbers [b], or a function.

    A function that is made with another schedule, if one is given, is refused, too.
    """
    if callable(scale):
        diffusion.check_schedule_of(scale, schedule, name)
        return
    if np.ndim(scale) == 0:
        checks.number(name, scale)
    elif not isinstance(scale, jax.Array | np.ndarray) or scale.ndim != 1:
        rule = f"{name} must be one number, or one for each image, [b]"
        raise ValueError(f"{rule}, got {checks.shown(scale)}.")
    elif checks.known(scale):
        checks.vector(name, scale)


def _column(scale: Any, t: Array, ndim: int) -> Array:
    """A scale at t, reshaped to [b or 1, 1, ...], to multiply rank-`ndim` data."""
    value = jnp.asarray(scale(t) if callable(scale) else scale, jnp.float32)
    if value.shape not in ((), (1,), t.shape):
        rule = f"scale must be one number, or one for each image, {list(t.shape)}"
        raise ValueError(f"{rule}, got {checks.shown(value)}.")
    return value.reshape((-1,) + (1,) * (ndim - 1))
