"""Arrays split over an Explicit mesh, the default of `jax.make_mesh`: all of it runs.

Whether it runs, and how results lie, is decided while JAX traces. Each claim is also
computed, with and without a mesh, in the slow tests.
"""

import contextlib
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from models.test_model_protocol import CASES, call, make, param_shapes
from support.oracles import F32_SUM, normal

from jax_diffusion import (
    diffusion,
    editing,
    guidance,
    likelihood,
    losses,
    samplers,
    schedules,
    timesteps,
    training,
)
from jax_diffusion.checks import placement
from jax_diffusion.models.feature_cnn import FeatureCNN
from jax_diffusion.timesteps import LEVEL_SAMPLERS, TIMESTEP_SAMPLERS

B = 16
S = schedules.make_schedule(schedules.cosine_betas(6))
PADDED = schedules.pad(S, 8)
V = diffusion.Objective("v")
EDM = schedules.from_levels(*schedules.edm_levels(6))
FLOW = schedules.from_levels(*schedules.flow_levels(6))
CHURNED = schedules.churned(schedules.edm_levels(4).noise, churn=1.0)
X_0 = diffusion.Objective("x_0", "fixed_small", weighting="edm")
PRECONDITIONED = dataclasses.replace(X_0, precondition=True)
HYBRID = diffusion.Objective("eps", "learned_range", "hybrid")
KEY = jax.random.key(3)
MASK = jnp.asarray(np.arange(8) > 3, jnp.float32)[:, None, None]
# What the train step does besides is the claim: the gradient of all of a U-Net is one
# of `WHOLES` by itself.
LEAN = dict(dropout=0.1, multipliers=(1,), num_res_blocks=0, attention_resolutions=())


def model_fn(x, timesteps):
    return 0.5 * jnp.sin(x) + 0.01 * timesteps[:, None, None, None]


def learned_fn(x, timesteps):
    y = model_fn(x, timesteps)
    return jnp.concatenate([y, 0.1 * y], axis=-1)


def labeled_fn(x, timesteps, *, label):
    return model_fn(x, timesteps) + 0.1 * label[:, None, None, None]


def logits_fn(x, timesteps):
    return x[:, 0].reshape(x.shape[0], -1)


class Weighted(NamedTuple):
    x: jax.Array
    x_0: jax.Array
    log_snr: jax.Array
    log_weight: jax.Array


def own_scan(a):
    def body(state, t):
        t = jnp.full(B, t)
        return samplers.ddim_step(a["keys"], DENOISE, S, state, t), None

    return jax.lax.scan(body, samplers.start(a["x"]), jnp.arange(6)[::-1])[0]


def weighted(a):
    def step(keys, denoise_fn, schedule, state, t):
        state = samplers.ddpm_step(keys, denoise_fn, schedule, state, t)
        weight = state.log_weight + state.x_0.mean((1, 2, 3))
        return state._replace(log_weight=weight)

    first = Weighted(*samplers.start(a["x"]), jnp.zeros(B))
    return samplers.sample(a["keys"], DENOISE, step, S, state=first)


def first_value(x_0):
    return -x_0[:, 0, 0, 0]


def denoiser_of(schedule, objective=X_0):
    return diffusion.denoiser(model_fn, schedule, objective)


DENOISE = diffusion.denoiser(model_fn, S, V)
LABELED = diffusion.denoiser(labeled_fn, S, V)
PADDED_DENOISE = diffusion.denoiser(model_fn, PADDED, V)


def arrays(*names, split=lambda a: a, whole=lambda a: a):
    """What the cases take: a batch, and parameters of the networks in `names`."""
    return {
        "x": split(jnp.tanh(normal(1, B, 8, 8, 3))),
        "t": split(jnp.arange(B, dtype=jnp.int32) % 6),
        "label": split(jnp.arange(B, dtype=jnp.int32) % 7),
        "low_res": split(normal(2, B, 4, 4, 3)),
        "keys": split(samplers.image_keys(KEY, jnp.arange(B))),
        "params": {n: jax.tree.map(whole, params(n)) for n in names},
    }


def network_of(case):
    return make("unet", **LEAN) if case == "lean" else make(case)


@functools.cache
def params(case):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape) / 8, a.dtype),
        param_shapes(network_of(case)),
    )


def network(a, case, **options):
    x, t = a["x"], a["t"].astype(jnp.float32)
    model = make(case, **options)
    return call(model, a["params"][case], x, t, a["label"], a["low_res"])


def gradient(a, case):
    def loss(params):
        return jnp.mean(network(a | {"params": {case: params}}, case) ** 2)

    return jax.value_and_grad(loss)(a["params"][case])


def feature_cnn(a):
    model = FeatureCNN(5)
    params = model.init(KEY, jnp.zeros((1, 8, 8, 3), jnp.uint8))
    return model.apply(params, ((a["x"] + 1) * 127.5).astype(jnp.uint8))


def sampled(a, step, denoise_fn=DENOISE, schedule=S):
    return samplers.sample(a["keys"], denoise_fn, step, schedule, a["x"])


def train(a, name="uniform", schedule=S, objective=V, **options):
    """One update of a network with dropout, labels and low resolution."""
    if name in LEVEL_SAMPLERS:
        sampler = LEVEL_SAMPLERS[name](schedule)
    else:
        sampler = TIMESTEP_SAMPLERS[name](6)
    tx = optax.adam(1e-3)
    step = training.make_train_step(
        network_of("lean"),
        tx,
        schedule,
        objective,
        sampler,
        ema_decays=(0.9,),
        label_dropout=0.2,
        low_res_size=4,
        **options,
    )
    state = training.step.start_state(a["params"]["lean"], tx, sampler, (0.9,))
    images = ((a["x"] + 1) * 127.5).astype(jnp.uint8)
    state, metrics = step(KEY, state, {"image": images, "label": a["label"]})
    return state.params, metrics


def free(a, **options):
    return guidance.classifier_free(LABELED, a["label"], 0, 3.0, **options)


def log_prob(a):
    return guidance.label_log_prob(logits_fn, a["label"])


# Each takes `arrays` and returns arrays [b, ...].
BATCHES = {
    **{f"{c} network": functools.partial(network, case=c) for c in CASES},
    "feature CNN": feature_cnn,
    "training_loss": lambda a: losses.training_loss(
        KEY, model_fn, S, V, a["x"], a["t"]
    ),
    "hybrid training_loss": lambda a: losses.training_loss(
        KEY, learned_fn, S, HYBRID, a["x"], a["t"]
    ),
    "classifier_loss": lambda a: losses.classifier_loss(
        KEY, logits_fn, S, a["x"], a["t"], a["label"]
    ),
    "denoiser": lambda a: DENOISE(a["x"], a["t"]),
    "precondition": lambda a: denoiser_of(EDM, PRECONDITIONED)(a["x"], a["t"]),
    "training_loss of precondition": lambda a: losses.training_loss(
        KEY, model_fn, EDM, PRECONDITIONED, a["x"], a["t"]
    ),
    "clip_x_0": lambda a: diffusion.clip_x_0(DENOISE)(a["x"], a["t"]),
    "threshold_x_0": lambda a: diffusion.threshold_x_0(DENOISE, 0.5)(a["x"], a["t"]),
    "classifier_free": lambda a: free(a, rescale=0.5)(a["x"], a["t"]),
    "classifier_free of a pytree": lambda a: guidance.classifier_free(
        lambda x, t, *, text: LABELED(x, t, label=text["a"][:, 0]),
        {"text": {"a": a["x"][:, 0, 0]}},
        {"text": {"a": jnp.zeros(3)}},
        guidance.within(S, 3.0 + jnp.arange(B), low=0.3),
    )(a["x"], a["t"]),
    **{
        f"{name} of two denoisers": lambda a, method=method: method(
            free(a), DENOISE, guidance.within(S, 3.0 + jnp.arange(B)), rescale=0.5
        )(a["x"], a["t"])
        for name, method in guidance.GUIDANCE_METHODS.items()
    },
    "apg with a norm of precondition": lambda a: guidance.adaptive_projected(
        *(denoiser_of(EDM, PRECONDITIONED), denoiser_of(EDM), 2.0 + jnp.arange(B)),
        eta=0.5,
        norm=1.0,
    )(a["x"], a["t"]),
    "zero_star of a flow": lambda a: guidance.zero_star(
        *(denoiser_of(FLOW), denoiser_of(FLOW, diffusion.Objective("flow")), 3.0),
        zero_steps=2,
    )(a["x"], a["t"]),
    "classifier": lambda a: (
        guidance.classifier(DENOISE, S, log_prob(a))(a["x"], a["t"]).grad
    ),
    "posterior": lambda a: (
        guidance.posterior(
            DENOISE, lambda x_0: -jnp.sum((x_0 - a["x"]) ** 2, (1, 2, 3))
        )(a["x"], a["t"]).grad
    ),
    "drop_labels": lambda a: guidance.drop_labels(KEY, a["label"], 9, 0.5),
    "bits_per_dim": lambda a: likelihood.bits_per_dim(a["keys"], DENOISE, S, a["x"]),
    "bits_per_dim of a padded schedule": lambda a: likelihood.bits_per_dim(
        KEY, PADDED_DENOISE, PADDED, a["x"]
    ),
    "ode_bits_per_dim": lambda a: likelihood.ode_bits_per_dim(
        a["keys"], DENOISE, S, a["x"], probes=2
    ),
    "ode_log_prob": lambda a: likelihood.ode_log_prob(
        a["keys"], DENOISE, S, a["x"], probes=2
    ),
    "ode_log_prob by the exact divergence": lambda a: likelihood.ode_log_prob(
        KEY,
        lambda x_t, t: diffusion.Prediction(0.5 * jnp.sin(x_t), jnp.zeros_like(x_t)),
        *(S, a["x"][..., 0, 0]),
    ),
    "ode_bits_per_dim of a padded schedule": lambda a: likelihood.ode_bits_per_dim(
        KEY, PADDED_DENOISE, PADDED, a["x"]
    ),
    **{
        f"{name} sampler": functools.partial(sampled, step=row.step)
        for name, row in samplers.SAMPLERS.items()
    },
    **{
        f"{name} sampler of a padded schedule": functools.partial(
            sampled, step=row.step, denoise_fn=PADDED_DENOISE, schedule=PADDED
        )
        for name, row in samplers.SAMPLERS.items()
    },
    "edm_heun sampler of churned levels": lambda a: sampled(
        a, samplers.edm_heun_step, denoiser_of(CHURNED, PRECONDITIONED), CHURNED
    ),
    "guided sampler": lambda a: sampled(a, samplers.ddim_step, free(a)),
    "inpaint": lambda a: sampled(a, samplers.inpaint(samplers.ddpm_step, a["x"], MASK)),
    "share_noise": lambda a: sampled(
        a, samplers.share_noise(samplers.ddpm_step, KEY, until=3)
    ),
    "on_step": lambda a: sampled(a, samplers.on_step(samplers.ddpm_step, int)),
    "invert": lambda a: samplers.invert(DENOISE, S, a["x"], t=4),
    "slerp": lambda a: samplers.slerp(a["x"], 1 - a["x"], jnp.linspace(0, 1, B)),
    "repaint": lambda a: editing.repaint(
        *(a["keys"], DENOISE, samplers.ddpm_step, S, a["x"], a["x"], MASK),
        jump=2,
        resamples=2,
    ),
    "edit": lambda a: editing.edit(
        a["keys"], DENOISE, samplers.ddpm_step, S, a["x"], t=3
    ),
    "dps": lambda a: editing.dps(
        *(a["keys"], DENOISE, samplers.ddpm_step, S, a["x"]), first_value
    ),
    "twisted_smc": lambda a: editing.twisted_smc(
        *(a["keys"], DENOISE, S, a["x"]), first_value
    )[0],
    "block_mean": lambda a: editing.block_mean(a["x"], size=2),
    "a scan of one's own, t made in it": lambda a: own_scan(a).x,
    "a state of one's own": lambda a: weighted(a),
}
# Each returns what belongs to no image: gradients and metrics.
WHOLES = {
    **{f"gradient of {c}": functools.partial(gradient, case=c) for c in CASES},
    **{
        f"train step, {name}": functools.partial(train, name=name)
        for name in timesteps.TIMESTEP_SAMPLERS
    },
    "train step in two parts": functools.partial(train, microbatches=2),
    "train step of preconditioned levels in two parts": functools.partial(
        train, name="log_normal", schedule=EDM, objective=PRECONDITIONED, microbatches=2
    ),
    "train step, preconditioned low_discrepancy": functools.partial(
        train, name="low_discrepancy", schedule=EDM, objective=PRECONDITIONED
    ),
    **{
        f"train step, {name}": functools.partial(
            train,
            name=name,
            schedule=EDM if name == "log_normal" else FLOW,
            objective=X_0,
        )
        for name in LEVEL_SAMPLERS
    },
    "train step, importance in two parts": functools.partial(
        train, name="importance", schedule=EDM, objective=PRECONDITIONED, microbatches=2
    ),
}
within = pytest.mark.parametrize("within", [False, True], ids=["bare", "set_mesh"])


@functools.cache
def mesh():
    made = jax.make_mesh((8,), ("data",))
    assert made.axis_types == (AxisType.Explicit,)
    return made


def networks_of(case):
    """The names of the networks whose parameters a case takes."""
    if case.startswith("train step"):
        return ["lean"]
    return [name for name in case.split() if name in CASES]


@functools.cache
def split_arrays(*names):
    def put(*spec):
        return lambda a: jax.device_put(a, NamedSharding(mesh(), PartitionSpec(*spec)))

    return arrays(*names, split=put("data"), whole=put())


def context(within):
    return jax.set_mesh(mesh()) if within else contextlib.nullcontext()


def slow_if(name, within):
    """Networks take seconds to trace: the fast tests do it once for some of them."""
    quick = name == "gradient of dit" or "in two parts" in name
    heavy = name in WHOLES and not (within and quick)
    return pytest.mark.slow if heavy or name.endswith("network") else ()


@pytest.mark.parametrize(
    "name, within",
    [
        pytest.param(name, within, marks=slow_if(name, within))
        for name in BATCHES | WHOLES
        for within in (False, True)
    ],
)
def test_it_can_be_traced_on_an_explicit_mesh_and_batches_stay_split(name, within):
    with context(within):
        traced = jax.jit((BATCHES | WHOLES)[name]).trace(
            split_arrays(*networks_of(name))
        )
    for aval in jax.tree.leaves(traced.jaxpr.out_avals):
        first = [*aval.sharding.spec, None][0]
        assert first == ("data" if name in BATCHES else None), aval


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t", "label", "keys"])
def test_what_is_not_split_fits_a_batch_that_is(name):
    """One of the arguments lies whole on every device, as arrays made there do."""
    whole = NamedSharding(mesh(), PartitionSpec())
    given = split_arrays()
    given = given | {name: jax.device_put(given[name], whole)}
    skip = ("network", "CNN", "classifier_free of", "drop_labels", "slerp", "mean")
    for case, function in BATCHES.items():
        if not any(word in case for word in skip):
            with jax.set_mesh(mesh()):
                jax.jit(function).trace(given)


SKIPPED = {  # which are traced
    *(name for name in BATCHES if name.endswith("network")),  # gradients hold them
    *(name for name in WHOLES if name.startswith("train step, ")),
    "train step in two parts",  # that of preconditioned levels is
    *("gradient of unet", "gradient of annotated-resnet"),  # in other cases
    *(f"gradient of noisy_classifier-{pool}" for pool in ("spatial", "spatial_v2")),
} - {"train step, uniform"}
COMPUTED = [
    (name, not name.endswith("sampler of a padded schedule"))
    for name in BATCHES | WHOLES
    if name not in SKIPPED
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "within"), COMPUTED)
def test_it_computes_the_same_on_an_explicit_mesh_as_on_one_device(name, within):
    function = (BATCHES | WHOLES)[name]
    names = networks_of(name)
    expected = jax.jit(function)(arrays(*names))
    with context(within):
        results = jax.jit(function)(split_arrays(*names))
    for result, one in zip(*map(jax.tree.leaves, (results, expected)), strict=True):
        np.testing.assert_allclose(result, one, **F32_SUM)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["training_loss", "threshold_x_0", "classifier_free", "classifier"]
)
@within
def test_it_runs_on_an_explicit_mesh_outside_of_jit(name, within):
    with context(within):
        results = BATCHES[name](split_arrays())
    for result, one in zip(
        *map(jax.tree.leaves, (results, BATCHES[name](arrays()))), strict=True
    ):
        np.testing.assert_allclose(result, one, **F32_SUM)


DRAWN = {
    **{
        f"{name} sampler": functools.partial(sampled, step=row.step)
        for name, row in samplers.SAMPLERS.items()
    },
    **{name: BATCHES[name] for name in ("inpaint", "repaint", "edit", "share_noise")},
    "interpolate": lambda a: samplers.interpolate(
        *(a["keys"], DENOISE, samplers.ddpm_step, S, a["x"], a["x"]),
        jnp.ones(2),
        t=3,
    ),
    "between_noises": lambda a: editing.between_noises(
        a["keys"], DENOISE, samplers.ddpm_step, S, a["x"], -a["x"], jnp.ones(2)
    ),
    "guidance": lambda a: sampled(
        a, samplers.ddpm_step, guidance.classifier(DENOISE, S, log_prob(a))
    ),
}


@within
@pytest.mark.parametrize("name", DRAWN)
def test_keys_on_one_device_fit_a_batch_that_is_split(name, within):
    """As `image_keys` makes them; the network sees labels that lie as images do."""
    given = split_arrays() | {"keys": arrays()["keys"]}
    with context(within):
        jax.jit(lambda x: DRAWN[name](given | {"x": x})).trace(given["x"])
        jax.make_jaxpr(lambda x: DRAWN[name](given | {"x": x}))(given["x"])


@pytest.mark.parametrize(
    "name",
    ["ddpm sampler", "unipc sampler", "edit", "bits_per_dim", "a state of one's own"],
)
def test_images_that_jit_closes_over_stay_split(name):
    given = split_arrays()
    with context(True):
        traced = jax.jit(lambda keys: BATCHES[name](given | {"keys": keys})).trace(
            given["keys"]
        )
    for aval in jax.tree.leaves(traced.jaxpr.out_avals):
        assert aval.sharding.spec[0] == "data", aval


@within
@pytest.mark.parametrize("name", ["ddpm sampler", "edit"])
def test_keys_on_one_device_draw_the_same_outside_of_jit(name, within):
    one = arrays()
    with context(within):
        found = DRAWN[name](split_arrays() | {"keys": one["keys"]})
    assert found.sharding.spec[0] == "data"
    np.testing.assert_allclose(found, DRAWN[name](one), **F32_SUM)


def test_a_batch_may_be_split_over_two_axes_of_a_mesh():
    two = jax.make_mesh((4, 2), ("data", "fsdp"))
    spec = PartitionSpec(("data", "fsdp"))
    x, t = (
        jax.device_put(arrays()[name], NamedSharding(two, spec)) for name in ("x", "t")
    )
    loss = jax.jit(BATCHES["hybrid training_loss"]).trace({"x": x, "t": t})
    for aval in loss.jaxpr.out_avals:
        assert aval.sharding.spec[0] == ("data", "fsdp")


def test_elsewhere_programs_do_not_know_of_placement():
    x, table = normal(1, 4, 2, 3), jnp.arange(6.0)
    index = jnp.arange(4)

    def ours(x, table, index):
        rows = placement.rows(table, placement.beside(index, x))
        return placement.everywhere(rows), placement.reshape(x, (4, 6))

    def plain(x, table, index):
        return jnp.take(table, index, mode="clip", axis=0), jnp.reshape(x, (4, 6))

    given = (x, table, index)
    assert str(jax.make_jaxpr(ours)(*given)) == str(jax.make_jaxpr(plain)(*given))
