"""Training losses: simple, variational and hybrid; that of a noisy classifier.

    L_simple = E_t || target - output ||^2                        (DDPM eq. 14)
    L_vlb    = sum_t L_t,  L_t = KL(q(x_{t-1} | x_t, x_0) || p), L_0 = -log p(x_0 | x_1)
    L_hybrid = L_simple + lambda L_vlb, the mean stopped in L_vlb (Improved DDPM eq. 16)

Variational terms are in bits/dim: divided by log 2 and by the number of values in an
image. L_vlb is a sum over t, so a single term at a uniform t counts T times.
`loss_weight` weights L_simple over noise levels.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import checks, diffusion
from jax_diffusion.checks import placement, signatures
from jax_diffusion.diffusion import Objective, Prediction
from jax_diffusion.schedules import (
    NoiseSchedule,
    check_batch,
    check_chain,
    check_rows,
    num_visited,
    take,
)


class LossTerms(NamedTuple):
    """The training loss of each example, and its parts.

    Attributes:
        loss: [b] what training minimizes.
        mse: [b] mean squared error of the network's output, without weights, for logs.
        vlb: [b] the term of the variational bound at the sampled t, in bits/dim; zero
            unless the loss is "vlb" or "hybrid".
    """

    loss: Array
    mse: Array
    vlb: Array


class ClassifierTerms(NamedTuple):
    """The loss of a classifier for each example, and whether it was right.

    Attributes:
        loss: [b] cross-entropy in nats.
        accuracy: [b] 1 where the label has the highest logit, else 0.
        top_5: [b] 1 where the label is among the five highest logits, else 0.
    """

    loss: Array
    accuracy: Array
    top_5: Array


def mean_flat(x: Float[Array, "b *d"]) -> Float[Array, "b"]:
    """Averages x [b, ...] over all axes but the first: [b], as in improved-diffusion.

    Raises:
        ValueError: unless x is a float array with an axis [b].

    >>> mean_flat(jnp.array([[1.0, 3.0], [5.0, 5.0]]))
    Array([2., 5.], dtype=float32)
    """
    checks.data("x", x, ("b", ...))
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def normal_kl(
    mean_1: Array, log_var_1: Array, mean_2: Array, log_var_2: Array
) -> Array:
    """KL(N(mean_1, var_1) || N(mean_2, var_2)) in nats, element by element.

    mean_1, log_var_1, mean_2 and log_var_2, all [...], broadcast against each other to
    the shape of the result, as in `normal_kl` of Ho et al. 2020.

    Raises:
        ValueError: if they do not.

    >>> one, zero = jnp.ones(()), jnp.zeros(())
    >>> normal_kl(one, zero, zero, zero).item()
    0.5
    """
    shape: tuple[int, ...] = ()
    given = dict(mean_1=mean_1, log_var_1=log_var_1, mean_2=mean_2, log_var_2=log_var_2)
    for name, value in given.items():
        shape = checks.common_shape(name, value, shape)
    return 0.5 * (
        -1.0
        + log_var_2
        - log_var_1
        + jnp.exp(log_var_1 - log_var_2)
        + (mean_1 - mean_2) ** 2 * jnp.exp(-log_var_2)
    )


def discretized_gaussian_log_likelihood(
    x: Float[Array, "*d"], mean: Float[Array, "*d"], log_scale: Float[Array, "*_"]
) -> Float[Array, "*d"]:
    """Log probability of 8-bit data under a Gaussian, in nats, element by element.

    That is the log of the Gaussian's mass in the bin of width 2/255 around x, where the
    first and last bins extend to infinity (DDPM eq. 13). As in the official codes, a
    tanh approximates the normal CDF, and probabilities below 1e-12 count as 1e-12.

    Args:
        x: data [...], uint8 / 127.5 - 1.
        mean: mean of the Gaussian [...], of the shape of x.
        log_scale: log of its standard deviation [...], broadcasts against x.

    Returns:
        Nats [...], of the shape of x.

    Raises:
        ValueError: if x or mean is no float array, or shapes do not fit.
    """
    checks.data("x", x, (...,))
    checks.data("mean", mean, x.shape)
    checks.broadcasts("log_scale", log_scale, x.shape)
    centered, inv_std = x - mean, jnp.exp(-log_scale)
    cdf_high = _approx_normal_cdf(inv_std * (centered + 1 / 255))
    cdf_low = _approx_normal_cdf(inv_std * (centered - 1 / 255))

    def log(p):  # cut off inside, so that no branch of the `where`s has bad gradients
        return jnp.log(jnp.maximum(p, 1e-12))

    inside = log(cdf_high - cdf_low)
    return jnp.where(
        x < -0.999, log(cdf_high), jnp.where(x > 0.999, log(1 - cdf_low), inside)
    )


def _approx_normal_cdf(x):
    x = jnp.clip(x, -10.0, 10.0)  # 0 or 1 beyond in any precision; the cube overflows
    return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi).item() * (x + 0.044715 * x**3)))


def loss_weight(
    schedule: NoiseSchedule, objective: Objective, t: Int[Array, "b"]
) -> Float[Array, "b"]:
    """The weight of the network's squared error at t, by `objective.weighting`.

    "uniform" is 1 whatever the network predicts. The others are defined as weights of
    the error in x_0, as listed, and converted to weights of the error in its output:

        snr            snr                          Ho et al. 2020: 1 for eps
        min_snr        min(snr, gamma)              Hang et al. 2023
        truncated_snr  max(snr, 1)                  Salimans & Ho 2022
        p2             snr / (k + snr)^gamma        Choi et al. 2022
        edm            snr + 1 / sigma_data^2       Karras et al. 2022
        sigmoid        snr sigmoid(bias - log snr)  Hoogeboom et al. 2024
        vdm            T / 2 (snr of x_{t-1} - snr) / log 2   Kingma et al. 2021

    With "vdm" the mean loss over t is the sum of the bound's terms above row 0 in
    bits/dim, if the variance is the posterior's; with many rows, the continuous bound.
    Row 0, whose term is the likelihood of the data, counts 0.

    A function of (schedule, t) in their place returns the weights themselves.

    Args:
        schedule: gives the signal-to-noise ratio, snr = signal^2 / noise^2, at t.
        objective: names the weighting, its parameters, and what the network predicts.
        t: int32 [b].

    Returns:
        Weights [b].

    Raises:
        ValueError: unless these are a schedule, an objective and rows of the schedule,
            and a function returns weights [b].

    >>> from jax_diffusion.schedules import cosine_betas, make_schedule
    >>> schedule = make_schedule(cosine_betas(10))
    >>> loss_weight(schedule, Objective("eps", weighting="snr"), jnp.array([0, 9]))
    Array([1., 1.], dtype=float32)
    """
    diffusion.check_objective(objective)
    check_rows(schedule, t)
    if callable(objective.weighting):
        signatures.takes("weighting", objective.weighting, "schedule", "t")
        weight = objective.weighting(schedule, t)
        checks.array("weighting's output", weight, "float", t.shape)
        return jnp.asarray(weight, schedule.betas.dtype)
    c = take(schedule, t, 1)
    snr = jnp.exp(c.now.log_snr)
    match objective.weighting:
        case "uniform":
            return jnp.ones_like(snr)
        case "snr":
            weight = snr
        case "min_snr":
            weight = jnp.minimum(snr, objective.min_snr_gamma)
        case "truncated_snr":
            weight = jnp.maximum(snr, 1.0)
        case "p2":
            weight = snr / (objective.p2_k + snr) ** objective.p2_gamma
        case "edm":
            weight = snr + 1 / objective.sigma_data**2
        case "sigmoid":
            weight = snr * jax.nn.sigmoid(objective.sigmoid_bias - c.now.log_snr)
        case "vdm":
            check_chain(schedule)
            fall = jnp.where(c.prev.noise > 0, jnp.exp(c.prev.log_snr) - snr, 0.0)
            weight = jnp.sum(schedule.mask) * fall / (2 * np.log(2.0).item())
    # || output error ||^2 is so many times || x_0 error ||^2.
    match objective.mean_type:
        case "eps":
            return weight / snr
        case "x_0":
            return weight
        case "v":
            return weight / (1 + snr)
        case "flow":
            return weight / (1 + jnp.sqrt(snr)) ** 2
        case "mu":
            return weight / c.posterior_x_0**2


def vlb_terms(
    schedule: NoiseSchedule,
    prediction: Prediction,
    x_0: Float[Array, "b *d"],
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
) -> Float[Array, "b"]:
    """The term of the variational bound at t, in bits/dim (DDPM eq. 5).

    That is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0 the discretized
    negative log likelihood -log p(x_0 | x_1).

    Args:
        schedule: where the posterior's coefficients of row t stand.
        prediction: x_0 and log variance that the denoiser predicts from x_t.
        x_0, x_t: clean and noisy data [b, ...]; x_0 is uint8 / 127.5 - 1.
        t: int32 [b].

    Returns:
        Bits/dim [b].

    Raises:
        ValueError: unless schedule, prediction, data and t fit each other.
    """
    check_batch(schedule, t, per_image=True, x_0=x_0, x_t=x_t)
    diffusion.check_prediction(prediction, x_t)
    t = placement.beside(t, x_t)
    mean, _ = diffusion.q_posterior(schedule, prediction.x_0, x_t, t)
    true_mean, true_log_var = diffusion.q_posterior(schedule, x_0, x_t, t)
    kl = normal_kl(true_mean, true_log_var, mean, prediction.log_var)
    nll = -discretized_gaussian_log_likelihood(x_0, mean, 0.5 * prediction.log_var)
    nats = jnp.where(t == 0, mean_flat(nll), mean_flat(kl))
    return nats / np.log(2.0).item()


def training_loss(
    key: Key[Array, ""],
    model_fn: Callable[..., Array],
    schedule: NoiseSchedule,
    objective: Objective,
    x_0: Float[Array, "b *d"],
    t: Int[Array, "b"],
    *,
    eps: Float[Array, "b *d"] | None = None,
) -> LossTerms:
    """Noises x_0 to level t and computes the network's loss (DDPM algorithm 1).

    Args:
        key: for eps.
        model_fn: the raw network, (x_t [b, ...], timesteps [b]) -> output.
        schedule: the noise levels. Rows that `schedules.pad` has added are no steps of
            the bound, and no t; a traced schedule counts as one without such rows.
        objective: what the network outputs, and which loss is taken of it.
        x_0: data [b, ..., c] in [-1, 1], which only the term of the bound at t = 0
            relies on: without a bound, of any scale.
        t: int32 [b].
        eps: the noise [b, ..., c]; drawn from `key` if not given.

    Returns:
        LossTerms with arrays [b]; the caller takes the mean.

    Raises:
        ValueError: if the output's shape does not fit data and objective, if a learned
            variance meets a loss that would not train it, if eps is predicted on a
            schedule that ends in zero signal, if data, t and eps do not fit, or if
            model_fn is a denoiser.

    >>> from jax_diffusion.schedules import cosine_betas, make_schedule
    >>> terms = training_loss(
    ...     jax.random.key(0), lambda x_t, timesteps: 0 * x_t,
    ...     make_schedule(cosine_betas(10)), Objective(), jnp.ones((2, 3)),
    ...     jnp.array([0, 9]), eps=jnp.full((2, 3), 2.0))
    >>> terms.loss
    Array([4., 4.], dtype=float32)
    """
    diffusion.check_raw(model_fn)
    diffusion.check_signal(schedule, objective)
    if objective.learns_variance and objective.loss not in ("hybrid", "vlb"):
        raise ValueError(
            "a learned variance is trained by loss 'hybrid' or 'vlb' only, "
            f"got {objective.loss!r}."
        )
    x_t, eps, t = _noised(key, schedule, x_0, t, eps)
    signatures.takes("model_fn", model_fn, "x_t", "timesteps")
    if objective.precondition:
        model_fn = diffusion.precondition(model_fn, schedule, objective.sigma_data)
    output = model_fn(x_t, placement.rows(schedule.timesteps, t))
    diffusion.check_output(output, x_0)
    value, _ = diffusion.split_output(objective, output, x_0.shape[-1])
    error = value - diffusion.target(schedule, objective, x_0, x_t, t, eps)
    mse = mean_flat(error**2)
    vlb = placement.beside(jnp.zeros_like(mse), mse)

    if objective.loss in ("vlb", "hybrid"):
        if objective.loss == "hybrid":  # the bound must not reach the mean
            frozen = jax.lax.stop_gradient(value)
            output = jnp.concatenate([frozen, output[..., x_0.shape[-1] :]], axis=-1)
        prediction = diffusion.predict(schedule, objective, output, x_t, t)
        vlb = vlb_terms(schedule, prediction, x_0, x_t, t)
    return LossTerms(_combine(schedule, objective, t, error, vlb), mse, vlb)


def classifier_loss(
    key: Key[Array, ""],
    logits_fn: Callable[..., Array],
    schedule: NoiseSchedule,
    x_0: Float[Array, "b *d"],
    t: Int[Array, "b"],
    label: Int[Array, "b"],
    *,
    eps: Float[Array, "b *d"] | None = None,
) -> ClassifierTerms:
    """Noises x_0 to level t and computes -log p(label | x_t), the loss of a classifier
    for guidance (Dhariwal & Nichol 2021).

    Args:
        key: for eps.
        logits_fn: the classifier, (x_t [b, ...], timesteps [b]) -> logits [b, labels].
        schedule: the noise levels.
        x_0: data [b, ...] in [-1, 1].
        t: int32 [b].
        label: int [b], in [0, labels); within `jax.jit`, where its values are not
            known, a larger one makes the loss NaN.
        eps: the noise [b, ...]; drawn from `key` if not given.

    Returns:
        ClassifierTerms with arrays [b].

    Raises:
        ValueError: if data, t, label, eps and logits do not fit each other.
    """
    checks.function("logits_fn", logits_fn, "(x_t, timesteps)")
    signatures.takes("logits_fn", logits_fn, "x_t", "timesteps")
    x_t, eps, t = _noised(key, schedule, x_0, t, eps)
    checks.array("label", label, "int", x_0.shape[:1])
    logits = logits_fn(x_t, placement.rows(schedule.timesteps, t))
    checks.array("logits_fn's output", logits, "float", (*label.shape, "labels"))
    checks.rows("label", label, logits.shape[-1])
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_probs = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_probs, label[:, None], axis=-1)[:, 0]
    # Equal logits rank by index, so that a constant classifier is right by chance only.
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    right = (best == label[:, None]).astype(jnp.float32)
    return ClassifierTerms(loss, right[:, 0], right.sum(axis=-1))


def _noised(key, schedule, x_0, t, eps):
    """x_t, its noise, which is drawn if not given, and t, once all fit each other."""
    check_batch(schedule, t, per_image=True, x_0=x_0)
    if eps is None:
        checks.key("key", key)
        eps = jax.random.normal(key, x_0.shape, jnp.float32)
    eps, t = placement.beside(eps, x_0), placement.beside(t, x_0)
    return diffusion.q_sample(schedule, x_0, t, eps), eps, t


def _combine(schedule, objective, t, error, vlb):
    """Adds up what `objective.loss` asks for: the weighted simple term, the bound."""
    vlb_scale = objective.vlb_scale
    if vlb_scale is None:
        vlb_scale = 1e-3 if objective.loss == "hybrid" else 1.0
    vlb = vlb_scale * num_visited(schedule) * vlb
    match objective.loss:
        case "vlb":
            return vlb
        case "hybrid" | "l2":
            simple = error**2
        case "l1":
            simple = jnp.abs(error)
        case "huber":  # quadratic within 1, linear outside (the annotated DDPM)
            far = jnp.abs(error)
            simple = jnp.where(far < 1, 0.5 * error**2, far - 0.5)
    size = simple[0].size if objective.reduction == "sum" else 1
    simple = size * loss_weight(schedule, objective, t) * mean_flat(simple)
    return simple + vlb if objective.loss == "hybrid" else simple
