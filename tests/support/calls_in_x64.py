"""What the mathematics computes of data x in some precision: a table of calls.

Run as a program, it traces every call for data of float32, float64 and bfloat16, and
writes the dtypes of results; of the calls in `RUN` also their values:
`JAX_ENABLE_X64=1 python -m support.calls_in_x64 FILE.npz`.
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import (
    diffusion,
    editing,
    guidance,
    likelihood,
    losses,
    samplers,
    schedules,
    timesteps,
)
from jax_diffusion.diffusion import Objective
from jax_diffusion.samplers import SAMPLERS

KEY = jax.random.key(0)
KEYS = samplers.image_keys(KEY, jnp.arange(4))
DATA = np.tanh(np.random.default_rng(0).normal(size=(4, 4, 4, 2)))  # in [-1, 1]
PLAIN = schedules.make_schedule(schedules.cosine_betas(10))
PADDED = schedules.pad(PLAIN, 13)
NO_SIGNAL = schedules.make_schedule(
    schedules.zero_terminal_snr(schedules.cosine_betas(10))
)
T = jnp.array([0, 3, 5, 9], jnp.int32)
LABEL = jnp.array([1, 2, 0, 1], jnp.int32)
MASK = np.arange(4 * 4 * 2).reshape(4, 4, 2) % 3 == 0
V = Objective("v")
DTYPES = (jnp.float32, jnp.float64, jnp.bfloat16)


def model_fn(x, timesteps, *, channels=2, label=None):
    """A network that computes in float32, as those of this package do."""
    h = x.astype(jnp.float32)
    h = jnp.tanh(1.2 * h + h.mean((1, 2), keepdims=True))
    h = h + 1e-2 * timesteps.astype(jnp.float32)[:, None, None, None]
    if label is not None:
        h = h + 0.1 * label[:, None, None, None]
    return jnp.tile(h, channels // 2)


def denoiser(schedule, objective=None):
    objective = objective or Objective("v")
    channels = 4 if objective.learns_variance else 2
    network = functools.partial(model_fn, channels=channels)
    return diffusion.denoiser(network, schedule, objective)


def log_prob(x, timesteps):
    return -jnp.sum(jnp.abs(x).astype(jnp.float32), axis=(1, 2, 3))


def guided(schedule):
    """A denoiser in all wrappers."""
    f = denoiser(schedule, Objective("eps", "learned_range"))
    scale = guidance.within(schedule, 3.0, low=0.1, high=50.0)
    f = guidance.classifier_free(f, LABEL, 0, scale, rescale=0.5)
    f = guidance.classifier(diffusion.threshold_x_0(f), schedule, log_prob, 0.5)
    f = guidance.posterior(f, lambda x_0: log_prob(x_0, None), 0.5)
    return diffusion.clip_x_0(guidance.shift_x_0(f, schedule))


def step_of(name):
    row = SAMPLERS[name]
    return functools.partial(row.step, **({"eta": 0.7} if row.takes_eta else {}))


def by_two(name):
    """A denoiser of a schedule, guided by a method of two denoisers."""
    method, options = guidance.GUIDANCE_METHODS[name], dict(rescale=0.5)
    if name == "apg":
        options |= dict(eta=0.5, norm=2.0)

    def make(schedule):
        weak_fn = diffusion.denoiser(lambda x, t: 0.5 * model_fn(x, t), schedule, V)
        return method(denoiser(schedule), weak_fn, 1.5, **options)

    return make


def sampled(x, name, schedule=PADDED, denoise_fn=denoiser, wrap=lambda step: step):
    step_fn = wrap(step_of(name))
    return samplers.sample(KEYS, denoise_fn(schedule), step_fn, schedule, x)


def inpainting(step_fn):
    return samplers.inpaint(step_fn, jnp.asarray(DATA, jnp.float32), jnp.asarray(MASK))


def sharing(step_fn):
    return samplers.share_noise(step_fn, KEY, until=5)


def frames(x, name):
    state = samplers.start(x, step_of(name))
    args = (KEYS, denoiser(PADDED), step_of(name), PADDED)
    return samplers.sample_frames(*args, num_frames=1, state=state).x[-1]


# One of each kind of state that a step carries; what wraps a step sees no more of it.
WRAPPED = ("ddpm", "ddim", "dpmpp_2m", "unipc")


def by_sampler(name):
    """Calls that return data, for one sampler."""
    args = (KEYS, denoiser(PADDED), step_of(name), PADDED)
    return {
        "sample": lambda x: sampled(x, name),
        "sample, plain": lambda x: sampled(x, name, PLAIN),
        "sample, no signal": lambda x: sampled(x, name, NO_SIGNAL),
        "sample, guided": lambda x: sampled(x, name, denoise_fn=guided),
        "step": lambda x: (
            step_of(name)(*args[:2], PADDED, samplers.start(x, args[2]), T).x
        ),
        "repaint": lambda x: editing.repaint(
            *args, x, -x, jnp.asarray(MASK), jump=3, resamples=2
        ),
    } | (wrapping(name, args) if name in WRAPPED else {})


def wrapping(name, args):
    """Calls that wrap the step of a sampler, or only run it."""
    weights = jnp.linspace(0, 1, 3)
    return {
        "sample_frames": lambda x: frames(x, name),
        "inpaint": lambda x: sampled(x, name, wrap=inpainting),
        "share_noise": lambda x: sampled(x, name, wrap=sharing),
        "interpolate": lambda x: samplers.interpolate(*args, x, -x, weights, t=6),
        "edit": lambda x: editing.edit(*args, x, t=6),
        "descend": lambda x: editing.descend(*args, x, t=6),
        "between_noises": lambda x: editing.between_noises(*args, x, -x[::-1], weights),
    }


DATA_CALLS = {
    **{f"{name}: {k}": f for name in SAMPLERS for k, f in by_sampler(name).items()},
    **{
        f"guided by {name}": lambda x, name=name: sampled(
            x, "ddim", denoise_fn=by_two(name)
        )
        for name in guidance.GUIDANCE_METHODS
    },
    "invert": lambda x: samplers.invert(denoiser(PADDED), PADDED, x),
    "slerp": lambda x: samplers.slerp(x, -x[::-1], jnp.linspace(0, 1, 4)),
    "reconstruct": lambda x: editing.reconstruct(KEYS, denoiser(PADDED), PADDED, x),
    "reconstruct to a level": lambda x: editing.reconstruct(
        KEYS, denoiser(PADDED), PADDED, x, t=5
    ),
    "renoise": lambda x: editing.renoise(KEYS, PADDED, x, T // 2, T),
    "dps": lambda x: editing.dps(
        *(KEYS, denoiser(PADDED), samplers.heun_step, PADDED, x),
        lambda x_0: log_prob(x_0, None),
    ),
    "twisted_smc": lambda x: editing.twisted_smc(
        *(KEYS, denoiser(PADDED), PADDED, x), lambda x_0: log_prob(x_0, None)
    )[0],
    "gray": editing.gray,
    "block_mean": lambda x: editing.block_mean(x, size=2),
    "shrink": lambda x: editing.shrink(x, size=2),
}


def loss_calls():
    for mean in ("eps", "x_0", "v", "mu"):
        for var, loss in (("fixed_small", "l2"), ("learned_range", "hybrid")):
            yield f"{mean}, {loss}", Objective(mean, var, loss=loss)
    for weighting in ("snr", "min_snr", "truncated_snr", "p2"):
        yield weighting, Objective("v", weighting=weighting, loss="huber")
    ones = lambda schedule, t: jnp.ones(t.shape)  # noqa: E731
    yield "own weighting", Objective("v", weighting=ones)
    yield "vlb, sum", Objective("eps", "learned", loss="vlb", reduction="sum")


def training_loss(objective, x):
    channels = 4 if objective.learns_variance else 2
    network = functools.partial(model_fn, channels=channels)
    return losses.training_loss(KEY, network, PLAIN, objective, x, T)


def draws_of(sampler, x):
    """Timesteps and weights, once every t has its losses."""
    state = sampler.init()
    for _ in range(2):
        loss = 1 + jnp.mean(x, axis=(1, 2, 3))[:, None] + jnp.zeros((4, 3))
        t = jnp.arange(12, dtype=jnp.int32) % 10
        state = sampler.update(state, t, loss.ravel())
    return sampler.sample(KEY, state, 8)


def logits_fn(x, timesteps):
    return x.astype(jnp.float32).mean((1, 2)) * jnp.array([[1.0, 2.0]], jnp.float32)


RESULT_CALLS = {  # of float32 or better
    **{
        f"training_loss: {name}": functools.partial(training_loss, objective)
        for name, objective in loss_calls()
    },
    "classifier_loss": lambda x: losses.classifier_loss(
        KEY, logits_fn, PLAIN, x, T, LABEL % 2
    ),
    "clip_x_0 by NumPy": lambda x: diffusion.clip_x_0(
        denoiser(PLAIN), np.float64(-1), np.ones((1, 1, 1, 2))
    )(x, T),
    "bits_per_dim": lambda x: likelihood.bits_per_dim(KEY, denoiser(PADDED), PADDED, x),
    "bits_per_dim, keys": lambda x: likelihood.bits_per_dim(
        KEYS, denoiser(PLAIN), PLAIN, x
    ),
    "progressive_coding": lambda x: likelihood.progressive_coding(
        likelihood.bits_per_dim(KEY, denoiser(PADDED), PADDED, x)
    ),
    "ode_bits_per_dim": lambda x: likelihood.ode_bits_per_dim(
        KEY, denoiser(PADDED), PADDED, x, probes=2
    ),
    "ode_log_prob": lambda x: likelihood.ode_log_prob(
        KEY, denoiser(PADDED), PADDED, x, probes=2
    ),
    "ode_log_prob, exact": lambda x: likelihood.ode_log_prob(
        KEY, denoiser(PADDED), PADDED, x, per_dim=True
    ),
    "prior_bpd": lambda x: likelihood.prior_bpd(PADDED, x),
    "dequantize": lambda x: likelihood.dequantize(KEYS, x),
    "gradient of sampling": lambda x: jax.grad(
        lambda y: sampled(y, "ddpm", PADDED).sum()
    )(x),
    "log_prob": lambda x: guidance.label_log_prob(logits_fn, LABEL % 2)(x, T),
    "drop_labels": lambda x: guidance.drop_labels(KEY, LABEL, 0, 0.5),
    **{
        name: functools.partial(draws_of, getattr(timesteps, name)(10))
        for name in ("uniform", "antithetic", "stratified")
    },
    "loss_second_moment": lambda x: draws_of(
        timesteps.loss_second_moment(10, history=2), x
    ),
}
CALLS = DATA_CALLS | RESULT_CALLS
RUN = [  # what is new in a call is traced; these draw, or are long
    *(f"{name}: sample" for name in SAMPLERS),
    *(f"{name}: sample, guided" for name in ("ddpm", "ddim", "unipc")),
    *("ddim: inpaint", "ddpm: repaint", "ddpm: edit", "ddim: interpolate"),
    *("dpmpp_2m: between_noises", "reconstruct", "training_loss: eps, hybrid"),
    *("training_loss: v, l2", "bits_per_dim", "ode_bits_per_dim", "dequantize"),
    *(
        "ode_log_prob",
        "drop_labels",
        "uniform",
        "antithetic",
        "stratified",
        "loss_second_moment",
    ),
]


AS_DATA = re.compile(r"f64\[(\d+,)?4,4,4,2\]")  # in a program: as large, of 64 bits


def traced(dtype):
    """The dtypes that every call returns for data of a dtype, or what it raises.

    Also the names of calls that compute something of 64 bits as large as the data.
    """
    x, found, wide = jnp.asarray(DATA, dtype), {}, []
    for name, call in CALLS.items():
        try:
            program, shapes = jax.make_jaxpr(call, return_shape=True)(x)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            found[name] = [leaf.dtype.name for leaf in jax.tree.leaves(shapes)]
            wide += [name] if AS_DATA.search(str(program)) else []
    return found, wide


def values(dtype, names):
    """What calls return for data of a dtype, compiled as users do: leaves by name."""
    x = jnp.asarray(DATA, dtype)
    return {name: jax.tree.leaves(jax.jit(CALLS[name])(x)) for name in names}


def main(path):
    dtypes, wide, arrays = {}, {}, {}
    for dtype in DTYPES:
        at = jnp.dtype(dtype).name
        dtypes[at], wide[at] = traced(dtype)
        names = [n for n in RUN if n in DATA_CALLS or dtype is not jnp.bfloat16]
        names = [n for n in names if not isinstance(dtypes[at][n], str)]
        for name, leaves in values(dtype, names).items():
            for i, leaf in enumerate(leaves):
                arrays[f"{at}|{name}|{i}"] = np.asarray(leaf, np.float64)
    told = dict(dtypes=np.array(json.dumps(dtypes)), wide=np.array(json.dumps(wide)))
    np.savez(path, **told, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
