"""Likelihood of a run: bits/dim of the variational bound, and by the probability flow.

`bound` evaluates all T terms of the bound (Ho et al. 2020) for every image; `ode`
integrates the probability-flow ODE (Song et al. 2021). The formulas are in
`jax_diffusion.likelihood`; here they meet a run, a set of images and files.
"""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_diffusion import config as settings
from jax_diffusion import data, diffusion, likelihood, plotting, samplers
from jax_diffusion.evaluation.image_sets import ImageSet, network_of
from jax_diffusion.evaluation.per_image import (
    ScoreFn,
    collect,
    each_image,
    mean_and_error,
)
from jax_diffusion.evaluation.results import Clock, Result, Score
from jax_diffusion.models import Network, bind
from jax_diffusion.pipeline import Run
from jax_diffusion.runtime import files
from jax_diffusion.schedules import NoiseSchedule


def bound(
    run: Run,
    images: ImageSet,
    *,
    seed: int = 0,
    steps: int | None = None,
    out: Path | None = None,
) -> Result:
    """Computes the variational bound on bits/dim, its parts, and rate and distortion.

    Args:
        run: of a denoiser.
        images: usually the test split.
        seed: of the noise.
        steps: number of terms; default all T of them.
        out: folder for the terms of every image (bpd_terms.npz), their means as
            improved-diffusion writes them (vb_terms.npz, mse_terms.npz,
            xstart_mse_terms.npz), rate_distortion.npz, and plots of both.

    Returns:
        bits_per_dim = prior + kl + decoder, in bits/dim, and rmse, the distortion of
        the whole code in gray levels (0 to 255), each with its standard error.
    """
    clock = Clock()
    schedule = settings.make_schedule(run.config.schedule, steps=steps)
    fixed = {"steps": schedule.num_steps, "network": network_of(run)}
    about = {"bpd": images.about | fixed}
    score = bound_fn(run.model, run.objective, schedule, seed)
    found, finish = collect(
        each_image(score, run.params, images),
        images.n,
        path=out and out / "bpd_terms.npz",
        record={**images.about, "seed": seed, **fixed},
    )
    clock.end("bpd_terms")
    if not found:  # the first host has them
        return Result([], about, clock.seconds, [finish])
    terms: Any = found
    bits = likelihood.BitsPerDim(**terms)
    rates, distortions = likelihood.progressive_coding(bits)
    if out is not None:
        rate, distortion = (np.asarray(a).mean(axis=0) for a in (rates, distortions))
        save = functools.partial(np.savez, rate=rate, distortion=distortion)
        files.write_atomic(out / "rate_distortion.npz", save)
        plotting.save_rate_distortion(out / "rate_distortion.png", rate, distortion)
        means = {"vb": bits.vlb, "mse": bits.eps_mse, "xstart_mse": bits.x_0_mse}
        means = {name: np.mean(a, axis=0) for name, a in means.items()}
        for name, mean in means.items():  # in these files the last timestep comes first
            save = functools.partial(np.savez, arr_0=mean[::-1])
            files.write_atomic(out / f"{name}_terms.npz", save)
        plotting.save_vlb_curve(out / "bpd_terms.png", {"vlb": means["vb"]})
    values = {
        "bits_per_dim": bits.total,
        "prior": bits.prior,
        "kl": bits.vlb[:, 1:].sum(axis=1),
        "decoder": bits.vlb[:, 0],
        "rmse": distortions[:, 0],
    }
    scores = []
    for name, of_images in values.items():
        value, error = mean_and_error(of_images)
        scores.append(Score(name, value, images.n, error))
    return Result(scores, about, clock.seconds, [finish])


def ode(
    run: Run,
    images: ImageSet,
    *,
    seed: int = 0,
    steps: int = 200,
    probes: int = 2,
    out: Path | None = None,
) -> Result:
    """Computes bits/dim by the probability-flow ODE, with uniform dequantization.

    It warns if the flow does not take the images to noise, as that of an eps network
    may not, since eps does not tell x_0 where hardly any signal is left.

    Args:
        run: of a denoiser.
        images: usually the test split.
        seed: of dequantization and of the probes.
        steps: of Heun's method, from row to row of the schedule; at most T - 1.
        probes: of Hutchinson's estimate of the divergence.
        out: folder for the numbers of every image, ode_terms.npz.

    Returns:
        nll_ode, in bits/dim, with its standard error; nll_ode_step_error, by how much
        half as many steps differ; nll_ode_probe_error, the standard error that the
        probes cause. An error that one step or one probe cannot tell is left out.
    """
    clock = Clock()
    total = settings.make_schedule(run.config.schedule).num_steps
    rows = min(steps + 1, total)  # steps lead from row to row
    schedule = settings.make_schedule(run.config.schedule, steps=rows, spacing="angle")
    fixed = {
        "steps": schedule.num_steps - 1,
        "probes": probes,
        "network": network_of(run),
    }
    about = {"nll_ode": images.about | fixed}
    score = ode_fn(run.model, run.objective, schedule, seed, probes)
    found, finish = collect(
        each_image(score, run.params, images),
        images.n,
        path=out and out / "ode_terms.npz",
        record={**images.about, "seed": seed, **fixed},
    )
    clock.end("ode_terms")
    if not found:
        return Result([], about, clock.seconds, [finish])
    warn_unless_noise(found["prior"], float(schedule.next.noise[-1]))
    value, error = mean_and_error(found["total"])
    scores = [Score("nll_ode", value, images.n, error)]
    for name in ("step_error", "probe_error"):
        value = float(np.mean(found[name], dtype=np.float64))
        if np.isfinite(value):
            scores.append(Score(f"nll_ode_{name}", value, images.n))
    return Result(scores, about, clock.seconds, [finish])


def warn_unless_noise(prior: np.ndarray, noise: float) -> None:
    """Warns if x_T is not noise, as it should be after the whole flow.

    Args:
        prior: `likelihood.OdeBits.prior` [n], in bits/dim.
        noise: the standard deviation that x_T should have.
    """
    nats = np.mean(prior, dtype=np.float64) * np.log(2)
    square = 2 * (nats - np.log(noise)) - np.log(2 * np.pi)  # mean of (x_T / noise)^2
    square = np.maximum(square, 0.0)  # unlike max(), it leaves NaN
    if not 0.5 < square < 2:
        warnings.warn(
            "nll_ode needs a flow that takes images to noise of mean square 1, got "
            f"{square:.3g}. Its bits/dim mean little: the network may be untrained, or "
            "predict eps, which does not tell x_0 where hardly any signal is left (v, "
            "flow and x_0 do).",
            stacklevel=3,
        )


def bound_fn(
    model: Network, objective: Any, schedule: NoiseSchedule, seed: int
) -> ScoreFn:
    """Builds score(params, ids, image, label, ...) -> `likelihood.BitsPerDim`, jitted.

    The predicted x_0 is clipped to [-1, 1].
    """

    def bits(keys, denoise_fn, *rest):
        return likelihood.bits_per_dim(keys, diffusion.clip_x_0(denoise_fn), *rest)

    return _bits_fn(bits, model, objective, schedule, seed)


def ode_fn(
    model: Network, objective: Any, schedule: NoiseSchedule, seed: int, probes: int
) -> ScoreFn:
    """Builds score(params, ids, image, label, ...) -> `likelihood.OdeBits`, jitted.

    Nothing is clipped: the flow must be differentiable. Attention is XLA's, since
    cuDNN's has no derivative in forward mode.
    """
    network: Any = model
    if getattr(network, "attention_implementation", None) == "cudnn":
        model = network.clone(attention_implementation=None)
    bits = functools.partial(likelihood.ode_bits_per_dim, probes=probes)
    return _bits_fn(bits, model, objective, schedule, seed)


def _bits_fn(
    bits: Callable[..., Any],
    model: Network,
    objective: Any,
    schedule: NoiseSchedule,
    seed: int,
) -> ScoreFn:
    """Builds the score of bits(keys, denoise_fn, schedule, x_0) -> NamedTuple of [b].

    The id of an image decides its key, so that batches and devices do not matter.
    """

    @jax.jit
    def score(params, ids, image, label, **told):
        keys = samplers.image_keys(jax.random.key(seed), ids)
        model_fn = bind(model, params, label, **told)
        denoise_fn = diffusion.denoiser(model_fn, schedule, objective)
        return bits(keys, denoise_fn, schedule, data.from_uint8(image))

    return score
