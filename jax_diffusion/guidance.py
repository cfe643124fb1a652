"""Guidance: functions that take a denoiser and return one that a label or another
network has a say in.

They nest with each other and with `diffusion.clip_x_0`, which inside `classifier_free`
bounds both of its predictions and outside the result. A `classifier` that knows labels
of single images goes outside `classifier_free`, whose network sees two rows an image.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import diffusion
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.schedules import NoiseSchedule, take

Scale = float | Array | Callable[[Array], Array]  # for all, for each image, or of t


def classifier_free(
    denoise_fn: DenoiseFn,
    label: Int[Array, "b"],
    null_label: int | Int[Array, "b"],
    scale: Scale,
    *,
    rescale: float | Float[Array, ""] = 0.0,
) -> DenoiseFn:
    """x_0(null) + scale (x_0(label) - x_0(null)), for a network that knows both.

    The same as combining eps or v, and 1 + w in Ho & Salimans 2022, eq. 6: 1 is the
    labelled prediction, 0 the one without. Both are made in one call, as neighbouring
    rows of a batch of twice the size; the variance is that of the label.

    Args:
        denoise_fn: takes the label by keyword, denoise_fn(x_t, t, label=...).
        null_label: what the network was told where the label was hidden, see
            `drop_labels`.
        scale: see `within` for one that depends on t.
        rescale: the share in which x_0 gets back the standard deviation, over each
            image, of the labelled prediction (Lin et al. 2023, eq. 15 and 16).
    """

    def guided(x_t, t, **conditioning):
        null = jnp.broadcast_to(jnp.asarray(null_label, label.dtype), label.shape)
        rows = {"x_t": x_t, "t": t, **conditioning}
        twice = {name: jnp.repeat(a, 2, axis=0) for name, a in rows.items()}
        labels = jnp.stack([label, null], axis=1).reshape(-1)
        prediction = denoise_fn(twice.pop("x_t"), twice.pop("t"), label=labels, **twice)
        log_var = jnp.broadcast_to(
            prediction.log_var, (2 * len(t), *prediction.log_var.shape[1:])
        )
        labelled, plain = prediction.x_0[::2], prediction.x_0[1::2]
        x_0 = plain + _column(scale, t, x_t.ndim) * (labelled - plain)
        axes = tuple(range(1, x_t.ndim))
        spread = jnp.std(x_0, axes, keepdims=True)
        ratio = jnp.std(labelled, axes, keepdims=True) / jnp.maximum(spread, 1e-6)
        x_0 = x_0 * (1 + rescale * (ratio - 1))
        grad = None if prediction.grad is None else prediction.grad[::2]
        return prediction._replace(x_0=x_0, log_var=log_var[::2], grad=grad)

    return guided


def classifier(
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    log_prob_fn: Callable[[Array, Array], Float[Array, "b"]],
    scale: Scale = 1.0,
) -> DenoiseFn:
    """Adds scale times grad log p(y | x_t) to the score (Dhariwal & Nichol 2021).

    Exact for every sampler, see `diffusion.guided_mean` and `guided_x_0`: ancestral
    sampling shifts its mean by variance times gradient, the others their eps.

    Args:
        log_prob_fn: of (x_t, timesteps), each image by itself, in nats; `timesteps` are
            the schedule's own, as the network is told. See `label_log_prob`.
    """

    def guided(x_t, t, **conditioning):
        prediction = denoise_fn(x_t, t, **conditioning)
        timesteps = schedule.timesteps[t]
        grad = jax.grad(lambda x: jnp.sum(log_prob_fn(x, timesteps)))(x_t)
        grad = _column(scale, t, x_t.ndim) * grad
        if prediction.grad is not None:
            grad = prediction.grad + grad
        return prediction._replace(grad=grad)

    return guided


def shift_x_0(denoise_fn: DenoiseFn, schedule: NoiseSchedule) -> DenoiseFn:
    """Moves x_0 by what a classifier has added to the score, so that it can be clipped.

    Clipped after that, guidance is bounded where steps are long and the signal is weak:
    a cosine schedule begins with both. The official DDIM does not clip again.
    """

    def shifted(x_t, t, **conditioning):
        prediction = denoise_fn(x_t, t, **conditioning)
        x_0 = diffusion.guided_x_0(schedule, prediction, t)
        return prediction._replace(x_0=x_0, grad=None)

    return shifted


def label_log_prob(
    logits_fn: Callable[[Array, Array], Float[Array, "b k"]], label: Int[Array, "b"]
) -> Callable[[Array, Array], Float[Array, "b"]]:
    """log p(label | x_t) of a classifier of noisy images, for `classifier`."""

    def log_prob(x_t, timesteps):
        log_probs = jax.nn.log_softmax(logits_fn(x_t, timesteps))
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
    """The scale while low <= noise / signal <= high, and another outside.

    A guidance interval (Kynkäänniemi et al. 2024) in their units, whatever the steps.
    Outside, 1 leaves `classifier_free` its label; `classifier` wants 0.
    """

    def scale_fn(t):
        level = take(schedule, t, 1).now
        ratio = level.noise / jnp.maximum(level.signal, 1e-30)  # may be without signal
        inside = (ratio >= low) & (ratio <= high)
        return jnp.where(inside, scale, outside)

    return scale_fn


def drop_labels(
    key: Key[Array, ""],
    label: Int[Array, "b"],
    null_label: int,
    share: float | Float[Array, ""],
) -> Int[Array, "b"]:
    """Hides each label with probability `share`, by itself, wherever it stands."""
    return jnp.where(
        jax.random.bernoulli(key, share, label.shape), null_label, label
    ).astype(label.dtype)


def _column(scale: Any, t: Array, ndim: int) -> Array:
    """A scale as [b or 1, 1, ...], to multiply rank-`ndim` data."""
    value = jnp.asarray(scale(t) if callable(scale) else scale, jnp.float32)
    return value.reshape((-1,) + (1,) * (ndim - 1))
