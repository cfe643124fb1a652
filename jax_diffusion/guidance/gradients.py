"""Guidance by a gradient: of a classifier of noisy images, or of a measurement."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_diffusion import checks, diffusion
from jax_diffusion.checks import modes, placement, signatures
from jax_diffusion.diffusion import AnyDenoiseFn
from jax_diffusion.guidance.scales import Scale, check_scale, column
from jax_diffusion.schedules import NoiseSchedule, check_rows, check_schedule


def classifier(
    denoise_fn: AnyDenoiseFn,
    schedule: NoiseSchedule,
    log_prob_fn: Callable[..., Float[Array, "b"]],
    scale: Scale = 1.0,
) -> AnyDenoiseFn:
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
            `schedule.timesteps`. `label_log_prob` makes one from a classifier. If a
            third or later argument is named `t`, it is given the rows of the schedule
            [b], too; the second one is always timesteps, even if it is called t.
        scale: one number, one for each image [b], or a function of t, see `within`.

    Returns:
        A denoiser.

    Raises:
        ValueError: if an argument has another type, or log_prob_fn takes others; in a
            call, if log_prob_fn or denoise_fn returns something else, or x_t and t do
            not fit.

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
    given = with_rows(log_prob_fn, 2, None)
    signatures.takes("log_prob_fn", given, "x_t", "timesteps")
    check_schedule(schedule)
    diffusion.check_schedule_of(denoise_fn, schedule)
    check_scale(scale, schedule=schedule)

    def guided(x_t, t, **conditioning):
        check_rows(schedule, t)
        t = placement.beside(t, x_t)
        prediction = denoise_fn(x_t, t, **conditioning)
        diffusion.check_prediction(prediction, x_t)
        timesteps = placement.rows(schedule.timesteps, t)
        given_rows = with_rows(log_prob_fn, 2, t)

        def log_prob_at(x):
            log_prob = given_rows(x, timesteps)
            checks.array("log_prob_fn's output", log_prob, "float", t.shape)
            return log_prob

        log_prob, pull_back = jax.vjp(log_prob_at, x_t)
        (grad,) = pull_back(jnp.ones_like(log_prob))
        return _steered(prediction, grad, scale, t)

    return diffusion.with_schedule(guided, schedule)


def posterior(
    denoise_fn: AnyDenoiseFn,
    log_likelihood_fn: Callable[..., Float[Array, "b"]],
    scale: Scale = 1.0,
) -> AnyDenoiseFn:
    """Wraps a denoiser: adds scale * grad_x log p(y | x_0 predicted) to the score.

    Diffusion posterior sampling (Chung et al. 2023): draws from p(x_0 | y) for any
    measurement y of x_0 whose likelihood can be computed, with an unconditional
    network. The gradient is that by x_t, through the network, and goes into
    `Prediction.grad` as that of `classifier` does. Where a sampler shifts its mean by
    variance times gradient, as the ancestral one does, take var_type "fixed_large", or
    `shift_x_0`: the small variance guides too little.

    Args:
        denoise_fn: the denoiser to wrap, not clipped: where x_0 is clipped, the
            gradient vanishes.
        log_likelihood_fn: log_likelihood_fn(x_0) -> log p(y | x_0) [b] in nats, each
            image by itself. An argument after the first that is named `t`, not
            timesteps, is given the rows of the schedule [b] too, to count the variance
            of x_0 given x_t as noise of the measurement (Song et al. 2023). Without
            it samples are too narrow and overshoot y; with it they are exact for
            Gaussian data, here of variance 1, measured with noise of variance v:

                def log_likelihood_fn(x_0, t):
                    level = schedules.take(schedule, t, 1).now
                    var = level.noise**2 / (level.signal**2 + level.noise**2)
                    return -((x_0[:, 0] - y) ** 2) / (2 * (v + var))

        scale: one number, one for each image [b], or a function of t, see `within`.

    Returns:
        A denoiser.

    Raises:
        ValueError: if an argument has another type, or log_likelihood_fn takes others;
            in a call, if log_likelihood_fn or denoise_fn returns something else.

    >>> def denoise_fn(x_t, t):
    ...     return diffusion.Prediction(0.5 * x_t, jnp.zeros(()))
    >>> guided = posterior(denoise_fn, lambda x_0: -((x_0[:, 0] - 1) ** 2))
    >>> guided(jnp.array([[1.0]]), jnp.array([5])).grad.tolist()
    [[0.5]]
    """
    checks.function("denoise_fn", denoise_fn, "(x_t, t)")
    check_log_likelihood(log_likelihood_fn)
    check_scale(scale, schedule=diffusion.schedule_of(denoise_fn))

    def guided(x_t, t, **conditioning):
        checks.data("x_t", x_t, (...,))
        one_image = np.shape(t) == () and not (checks.known(t) and checks.known(x_t))
        checks.array("t", t, "int", () if one_image else x_t.shape[:1])  # () in vmap
        given_rows = with_rows(log_likelihood_fn, 1, placement.beside(t, x_t))

        def log_prob_at(x):
            prediction = denoise_fn(x, t, **conditioning)
            diffusion.check_prediction(prediction, x)
            log_prob = given_rows(prediction.x_0)
            name = "log_likelihood_fn's output"
            checks.array(name, log_prob, "float", t.shape)
            return log_prob, prediction

        log_prob, pull_back, prediction = jax.vjp(log_prob_at, x_t, has_aux=True)
        (grad,) = pull_back(jnp.ones_like(log_prob))
        return _steered(prediction, grad, scale, t)

    return diffusion.with_schedule(guided, denoise_fn)


def check_log_likelihood(function: Any) -> None:
    """Raises ValueError unless `function` takes x_0, and perhaps rows `t`."""
    checks.function("log_likelihood_fn", function, "(x_0,)")
    signatures.takes("log_likelihood_fn", with_rows(function, 1, None), "x_0")


def with_rows(function: Callable[..., Any], count: int, t: Any) -> Callable[..., Any]:
    """A `function` with its argument `t` bound, if it has one after `count` others."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[count:]
    except (TypeError, ValueError):  # of some builtins
        return function
    bound = function.keywords if isinstance(function, functools.partial) else {}
    for place, parameter in enumerate(parameters):
        if parameter.name != "t" or "t" in bound:
            continue
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            return functools.partial(function, t=t)
        if parameter.kind is parameter.POSITIONAL_ONLY and place == 0:
            return lambda *arguments: function(*arguments, t)
    return function


def _steered(prediction, grad, scale, t):
    """A prediction with scale * grad added to the gradient that it has."""
    grad = column(scale, t, grad.ndim) * grad
    if prediction.grad is not None:
        grad = prediction.grad + grad
    return prediction._replace(grad=grad)


def shift_x_0(denoise_fn: AnyDenoiseFn, schedule: NoiseSchedule) -> AnyDenoiseFn:
    """Wraps a denoiser: moves `grad`, set by guidance, into x_0, to be clipped.

    With `diffusion.clip_x_0` around it, guidance cannot push x_0 out of bounds, which
    matters where steps are long and the signal is weak: the first steps of a cosine
    schedule are both. DDIM in guided-diffusion does not clip again.

    Args:
        denoise_fn: a denoiser that `classifier` or `posterior` has wrapped.
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

    Dhariwal & Nichol 2021, algorithms 1 and 2.

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
    signatures.takes("logits_fn", logits_fn, "x_t", "timesteps")
    checks.array("label", label, "int", ("b",))

    def log_prob(x_t, timesteps):
        logits = modes.evaluate("logits_fn", logits_fn, x_t, timesteps)
        checks.array("logits_fn's output", logits, "float", (*label.shape, "k"))
        checks.rows("label", label, logits.shape[-1])
        log_probs = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(log_probs, label[:, None], axis=-1)[:, 0]

    return log_prob
