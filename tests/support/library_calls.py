"""Wrong and right calls of the mathematics, the train step and the metrics.

`python -m support.library_calls` makes them all without jaxtyping's hook, as users do,
and prints what each raised, as JSON: {"wrong": {name: [start, error, message]}, ...}.
"""

import dataclasses
import functools
import json
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from jax_diffusion import (
    diffusion,
    editing,
    guidance,
    likelihood,
    losses,
    metrics,
    models,
    samplers,
    schedules,
    spacing,
    timesteps,
)
from jax_diffusion.diffusion import Objective, Prediction

BETAS = schedules.cosine_betas(10)
S = schedules.make_schedule(BETAS)
PADDED = schedules.pad(S, 12)
STACKED = jax.tree.map(lambda a: jnp.stack([a, a]), S)
EPS, V = Objective("eps"), Objective("v")
LEARNED = Objective("v", "learned_range", "hybrid")
KEY = jax.random.key(0)
KEYS = samplers.image_keys(KEY, jnp.arange(3))
X, T = 0.1 * jnp.ones((3, 4, 4, 2)), jnp.array([0, 4, 9], jnp.int32)
IMAGES = np.full(X.shape, 200, np.uint8)
LABEL = jnp.arange(3)
STATE = samplers.start(X)
STEP = samplers.ddim_step


def model(x_t, timesteps):
    return 0.1 * x_t


def labeled(x_t, t, *, label):
    return Prediction(x_t * label[:, None, None, None], jnp.zeros(()))


def logits(x_t, timesteps):
    return x_t[:, 0, 0]


DENOISE = diffusion.denoiser(model, S, V)
PREDICTION = DENOISE(X, T)
DENOISE_LABELED = diffusion.denoiser(lambda x_t, timesteps, **_: 0.1 * x_t, S, V)

# Wrong schedules, timesteps and data, and how the sentence about each begins.
SCHEDULES = {
    "betas": (BETAS, "schedule must be a NoiseSchedule"),
    "no schedule": (None, "schedule must be a NoiseSchedule"),
    "a stack of schedules": (
        STACKED,
        "schedule must have arrays [T], got float32 [2, ",
    ),
    "rows": (
        schedules.take(S, T, 4),
        "schedule must have arrays [T], got float32 [3, ",
    ),
}
AN_INT = "t must be an int array [3], got "
STEPS = {
    "t in a column": (T[:, None], AN_INT + "int32 [3, 1]"),
    "one t": (T[:1], AN_INT + "int32 [1]"),
    "t of no axis": (T[0], AN_INT + "int32 []"),
    "t of Python": (4, AN_INT + "4"),
    "t in a list": ([0, 4, 9], AN_INT + "[0, 4, 9]"),
    "t of floats": (T.astype(jnp.float32), AN_INT + "float32 [3]"),
    "t of bools": (T > 3, AN_INT + "bool [3]"),
    "t of other batch": (jnp.append(T, 1), AN_INT + "int32 [4]"),
    "t beyond": (T + 1, "t must be in [0, 10), got 10"),
    "t below": (T - 1, "t must be in [0, 10), got -1"),
    "no t": (None, AN_INT + "None"),
}
A_FLOAT = "{} must be a float array"
DATA = {
    "uint8": (IMAGES, A_FLOAT + ", such as uint8 / 127.5 - 1, got uint8 [3, 4, 4, 2]"),
    "int": (X.astype(jnp.int32), A_FLOAT + ", such as uint8 / 127.5 - 1, got int32"),
    "bool": (X > 0, A_FLOAT + " [3, 4, 4, 2], got bool"),
    "list": ([[0.1]], A_FLOAT + " [3, 4, 4, 2], got [[0.1]]"),
    "other shape": (X[..., :1], A_FLOAT + " [3, 4, 4, 2], got float32 [3, 4, 4, 1]"),
}

# Functions of a schedule, t and data; the data by name, in order.
PROCESS = {
    "q_sample": (diffusion.q_sample, "x_0", "eps"),
    "q_mean_log_var": (diffusion.q_mean_log_var, "x_0"),
    "q_posterior": (diffusion.q_posterior, "x_0", "x_t"),
    "x_0_from_eps": (diffusion.x_0_from_eps, "x_t", "eps"),
    "x_0_from_v": (diffusion.x_0_from_v, "x_t", "v"),
    "x_0_from_mu": (diffusion.x_0_from_mu, "x_t", "mu"),
    "eps_from_x_0": (diffusion.eps_from_x_0, "x_t", "x_0"),
    "v_from_x_0": (diffusion.v_from_x_0, "x_t", "x_0"),
    "score_from_x_0": (diffusion.score_from_x_0, "x_t", "x_0"),
    "target": (functools.partial(diffusion.target, objective=V), "x_0", "x_t", "eps"),
    "vlb_terms": (
        functools.partial(losses.vlb_terms, prediction=PREDICTION),
        *("x_0", "x_t"),
    ),
    "training_loss": (
        functools.partial(losses.training_loss, KEY, model, objective=V),
        "x_0",
    ),
    "classifier_loss": (
        functools.partial(losses.classifier_loss, KEY, logits, label=LABEL % 2),
        "x_0",
    ),
    "guided_mean": (
        functools.partial(diffusion.guided_mean, prediction=PREDICTION),
        "x_t",
    ),
    "predict": (functools.partial(diffusion.predict, objective=V, output=X), "x_t"),
    "renoise": (
        lambda schedule, t, x: editing.renoise(KEYS, schedule, x, t, T),
        "x",
    ),
}


def step_cases():
    """Steps of samplers, given wrong arguments."""
    rows = {name: row.step for name, row in samplers.SAMPLERS.items()}
    for name, step in (rows | {"inversion": samplers.ddim_inversion_step}).items():
        right = dict(keys=KEYS, denoise_fn=DENOISE, schedule=S, t=T)
        right["state"] = samplers.start(X, step)
        wrong = {
            "t in a column": dict(t=T[:, None], begins=AN_INT + "int32 [3, 1]"),
            "t beyond": dict(t=T + 1, begins="t must be in [0, 10), got 10"),
            "one key": dict(keys=KEY, begins="keys must be an array of typed keys [3]"),
            "old keys": dict(
                keys=jnp.zeros((3, 2), jnp.uint32),
                begins="keys must be an array of typed keys [3], got uint32 [3, 2]",
            ),
            "an array as state": dict(state=X, begins="state must be a SampleState"),
            "uint8 state": dict(
                state=STATE._replace(x=jnp.asarray(IMAGES)),
                begins="state.x must be a float array, such as",
            ),
            "a raw network": dict(
                denoise_fn=model,
                begins="denoise_fn must return a Prediction, as diffusion.denoiser",
            ),
            "no denoiser": dict(
                denoise_fn=None, begins="denoise_fn must be a function of (x_t, t)"
            ),
        }
        for what, changes in wrong.items():
            begins = changes.pop("begins")
            call = functools.partial(step, **right | changes)
            yield f"{name} step, {what}", (begins, call)


def process_cases():
    """Functions of a schedule, t and data, with each argument wrong in turn."""
    for name, (function, *names) in PROCESS.items():

        def call(schedule=S, t=T, function=function, names=names, **data):
            given = dict.fromkeys(names, X) | data
            return function(schedule=schedule, t=t, **given)

        for what, (schedule, begins) in SCHEDULES.items():
            yield (
                f"{name}, {what}",
                (begins, functools.partial(call, schedule=schedule)),
            )
        for what, (t, begins) in STEPS.items():
            yield f"{name}, {what}", (begins, functools.partial(call, t=t))
        for what, (x, begins) in DATA.items():
            if what in ("other shape", "bool", "list") and names[-1] == names[0]:
                continue  # the first of the data has no shape to keep to
            data = {names[-1]: x}
            begins = begins.format(names[-1])
            yield f"{name}, {what} data", (begins, functools.partial(call, **data))


def number_cases():
    """Functions with a number out of its range, or of another type."""
    nan, inf = float("nan"), float("inf")
    table = [
        (
            "eta",
            [2, -0.1, nan, "1", True, np.array([0.1, 0.2])],
            "a number in [0, 1]",
            lambda v: STEP(KEYS, DENOISE, S, STATE, T, eta=v),
        ),
        (
            "quantile",
            [1.5, -1, nan, None],
            "a number in [0, 1]",
            lambda v: diffusion.threshold_x_0(DENOISE, v),
        ),
        (
            "rescale",
            [2, nan],
            "a number in [0, 1]",
            lambda v: guidance.classifier_free(labeled, LABEL, 0, 2.0, rescale=v),
        ),
        (
            "scale",
            [nan, inf, "3", None],
            "a number",
            lambda v: guidance.classifier_free(labeled, LABEL, 0, v),
        ),
        (
            "scale",
            [nan],
            "a number",
            lambda v: guidance.classifier(DENOISE, S, lambda x, t: x[:, 0, 0, 0], v),
        ),
        *(
            (
                name,
                values,
                rule,
                lambda v, method=method, name=name: method(
                    DENOISE, DENOISE, **{"scale": 2.0, name: v}
                ),
            )
            for method in guidance.GUIDANCE_METHODS.values()
            for name, values, rule in (
                ("scale", [nan, inf, "3", None], "a number"),
                ("rescale", [2, nan], "a number in [0, 1]"),
            )
        ),
        (
            "eta",
            [nan, "1", None],
            "a number",
            lambda v: guidance.adaptive_projected(DENOISE, DENOISE, 2.0, eta=v),
        ),
        (
            "norm",
            [0, -1, inf, nan],
            "a number > 0",
            lambda v: guidance.adaptive_projected(DENOISE, DENOISE, 2.0, norm=v),
        ),
        (
            "zero_steps",
            [-1, 1.0, None],
            "an integer >= 0",
            lambda v: guidance.zero_star(DENOISE, DENOISE, 2.0, zero_steps=v),
        ),
        ("low", [nan, -1], "a number >= 0", lambda v: guidance.within(S, 2.0, low=v)),
        ("outside", [nan], "a number", lambda v: guidance.within(S, 2.0, outside=v)),
        (
            "share",
            [2, -0.5, nan],
            "a number in [0, 1]",
            lambda v: guidance.drop_labels(KEY, LABEL, 3, v),
        ),
        (
            "uniform_prob",
            [2, -1, nan],
            "a number in [0, 1]",
            lambda v: timesteps.loss_second_moment(10, uniform_prob=v),
        ),
        (
            "history",
            [0, 2.5, True],
            "an integer in [1, 10000]",
            lambda v: timesteps.loss_second_moment(10, history=v),
        ),
        ("num_steps", [0, 2.5, "10"], "an integer >= 1", timesteps.uniform),
        ("num_steps", [0, 2.5], "an integer >= 1", timesteps.antithetic),
        ("num_steps", [0, 2.5], "an integer >= 1", timesteps.stratified),
        (
            "batch_size",
            [0, 2.5],
            "an integer >= 1",
            lambda v: timesteps.uniform(10).sample(KEY, (), v),
        ),
        (
            "num_steps",
            [1, 2.5, "10", None],
            "an integer in [2, 1000000]",
            schedules.cosine_betas,
        ),
        ("num_steps", [1, 2.5], "an integer in [2, 1000000]", schedules.linear_betas),
        ("num_steps", [1, 0], "an integer in [2, 1000000]", schedules.quadratic_betas),
        ("num_steps", [1, -3], "an integer in [2, 1000000]", schedules.sigmoid_betas),
        ("num_steps", [1, 2.0], "an integer in [2, 1000000]", schedules.jsd_betas),
        ("num_steps", [1], "an integer in [2, 1000000]", schedules.constant_betas),
        ("num_steps", [1], "an integer in [2, 1000000]", schedules.warmup_betas),
        (
            "start",
            [0, 1.5, nan, -1e-4],
            "a number in (0, 1]",
            lambda v: schedules.quadratic_betas(10, start=v),
        ),
        (
            "end",
            [0, inf],
            "a number in (0, 1]",
            lambda v: schedules.sigmoid_betas(10, end=v),
        ),
        (
            "start",
            [-1],
            "a number in (0, 1]",
            lambda v: schedules.linear_betas(100, start=v),
        ),
        (
            "fraction",
            [2, -0.1],
            "a number in [0, 1]",
            lambda v: schedules.warmup_betas(10, fraction=v),
        ),
        (
            "value",
            [0, 1, nan],
            "a number in (0, 1)",
            lambda v: schedules.constant_betas(10, value=v),
        ),
        (
            "tau",
            [0, -1, nan],
            "a number > 0",
            lambda v: schedules.sigmoid_alpha_bar_betas(10, tau=v),
        ),
        (
            "offset",
            [-1, nan],
            "a number >= 0",
            lambda v: schedules.cosine_betas(10, offset=v),
        ),
        (
            "max_beta",
            [0, 2, nan],
            "a number in (0, 1]",
            lambda v: schedules.cosine_betas(10, max_beta=v),
        ),
        (
            "min_beta",
            [-1, 2],
            "a number in [0, 1]",
            lambda v: schedules.cosine_betas(10, min_beta=v),
        ),
        (
            "rho",
            [0, -7, nan],
            "a number > 0",
            lambda v: spacing.karras_steps(BETAS, 5, rho=v),
        ),
        (
            "steps",
            [0, 11, 2.5, True],
            "an integer in [1, 10]",
            lambda v: spacing.uniform_steps(10, v),
        ),
        (
            "steps",
            [0, 2.5],
            "an integer in [1, 10]",
            lambda v: spacing.log_snr_steps(BETAS, v),
        ),
        ("steps", [2.5, None], "an integer", lambda v: spacing.spaced_steps(10, v)),
        ("steps", [[2.5, 3]], "an integer", lambda v: spacing.spaced_steps(10, v)),
        ("length", [9, 12.5, None], "an integer >= 10", lambda v: schedules.pad(S, v)),
        (
            "vlb_scale",
            [-1, nan, "1"],
            "a number >= 0",
            lambda v: Objective(vlb_scale=v),
        ),
        (
            "min_snr_gamma",
            [0, -5, nan],
            "a number > 0",
            lambda v: Objective(min_snr_gamma=v),
        ),
        ("p2_k", [0, -1], "a number > 0", lambda v: Objective(p2_k=v)),
        ("p2_gamma", [-1, inf], "a number >= 0", lambda v: Objective(p2_gamma=v)),
        (
            "num_frames",
            [2.5, None],
            "an integer",
            lambda v: samplers.sample_frames(KEYS, DENOISE, STEP, S, X, num_frames=v),
        ),
        (
            "until",
            [2.5, None],
            "an integer",
            lambda v: samplers.share_noise(STEP, KEY, until=v),
        ),
        (
            "jump",
            [0, 2.5],
            "an integer >= 1",
            lambda v: editing.repaint(KEYS, DENOISE, STEP, S, X, X, X, jump=v),
        ),
        (
            "resamples",
            [0, 2.5],
            "an integer >= 1",
            lambda v: editing.repaint(KEYS, DENOISE, STEP, S, X, X, X, resamples=v),
        ),
        ("size", [0, 1.5], "an integer >= 1", lambda v: editing.shrink(X, size=v)),
        (
            "t",
            [2.5, "3", None],
            "an integer",
            lambda v: editing.edit(KEYS, DENOISE, STEP, S, X, t=v),
        ),
        ("t", [2.5], "an integer", lambda v: samplers.invert(DENOISE, S, X, t=v)),
        (
            "probes",
            [0, 1.5],
            "an integer >= 1",
            lambda v: likelihood.ode_bits_per_dim(KEY, DENOISE, S, X, probes=v),
        ),
        (
            "probes",
            [0, 1.5],
            "an integer >= 1",
            lambda v: likelihood.ode_log_prob(KEY, DENOISE, S, X, probes=v),
        ),
        (
            "splits",
            [2.5, None],
            "an integer",
            lambda v: metrics.inception_score(np.zeros((9, 2)), splits=v),
        ),
        (
            "subsets",
            [0, 2.5],
            "an integer >= 1",
            lambda v: metrics.kernel_distance(np.eye(5), np.eye(5), subsets=v),
        ),
        (
            "subset_size",
            [1, 6, 2.5],
            "an integer in [2, 5]",
            lambda v: metrics.kernel_distance(np.eye(5), np.eye(5), subset_size=v),
        ),
        (
            "seed",
            [-1, None, 0.5],
            "an integer >= 0",
            lambda v: metrics.kernel_distance(np.eye(5), np.eye(5), seed=v),
        ),
        (
            "neighbours",
            [0, 1.5],
            "an integer >= 1",
            lambda v: metrics.precision_recall(np.eye(5), np.eye(5), neighbours=v),
        ),
        (
            "block",
            [0, 1.5],
            "an integer >= 1",
            lambda v: metrics.precision_recall(np.eye(5), np.eye(5), block=v),
        ),
    ]
    for i, (name, values, rule, call) in enumerate(table):
        for value in values:
            shown = "float64 [2]" if isinstance(value, np.ndarray) else repr(value)
            if name == "steps" and isinstance(value, list):
                shown = "2.5"  # the first that is none
            begins = f"{name} must be {rule}, got {shown}."
            yield f"{i}: {name} = {value!r}", (begins, functools.partial(call, value))


class Step(dict):
    """Not a step."""


def train_step(**changes):
    """A train step of a small network, or what it raises."""
    import optax

    from jax_diffusion import models, training

    given = dict(
        model=models.MODELS["unet"](channels=32, multipliers=(1,), out_channels=2),
        tx=optax.sgd(0.1),
        schedule=S,
        objective=V,
        timestep_sampler=timesteps.uniform(10),
        ema_decays=(0.9,),
    )
    return training.step.make_train_step(**given | changes)


def draw(batch):
    """What the train step draws for a batch."""
    from jax_diffusion import training

    options = dict(null={"label": 3}, label_dropout=0.5)
    sampler = timesteps.uniform(10)
    return training.step.draw_examples(KEY, batch, sampler, (), **options)


def halve(shape):
    """Two halvings of data of a shape."""
    from jax_diffusion.models import layers

    return layers.check_halvings(jnp.zeros(shape), 2)


# What a network must not return for images [3, 4, 4, 2].
OUTPUTS = {
    "half an image": lambda x: x[:, :2],
    "flat": lambda x: x.reshape(3, -1),
    "one image for all": lambda x: x[:1],
    "one pixel for all": lambda x: x[:, :1, :1],
    "no batch": lambda x: x[0],
    "ints": lambda x: x.astype(jnp.int32),
    "a pair": lambda x: (x, x),
    "nothing": lambda x: None,
}
TIMESTEPS = {
    "a number": 3.0,
    "no axis": jnp.float32(3),
    "one": jnp.ones(1),
    "a column": jnp.ones((3, 1)),
    "another batch": jnp.ones(4),
}
TRUNK = dict(channels=8, num_groups=4, multipliers=(1,), num_res_blocks=1)
NETWORKS = {
    "unet": TRUNK,
    "annotated": dict(channels=8, multipliers=(1,)),
    "lucidrains": dict(channels=8, multipliers=(1,)),
    "dit": dict(channels=8, depth=1, num_heads=2),
    "noisy_classifier": TRUNK,
}


def output_cases():
    """Networks, in all that calls one, that return another shape or type."""
    for what, wrong in OUTPUTS.items():

        def model_fn(x_t, timesteps, wrong=wrong):
            return wrong(x_t)

        denoise = diffusion.denoiser(model_fn, S, V)
        begins = "model_fn's output must be a float array [3, 4, 4, channels], got "
        for name, call in {
            "training_loss": lambda f: losses.training_loss(KEY, f, S, V, X, T),
            "denoiser": lambda _, d=denoise: d(X, T),
            "sample": lambda _, d=denoise: samplers.sample(KEYS, d, STEP, S, X),
            "bits_per_dim": lambda _, d=denoise: likelihood.bits_per_dim(KEY, d, S, X),
            "ode": lambda _, d=denoise: likelihood.ode_bits_per_dim(KEY, d, S, X),
            "posterior": lambda _, d=denoise: guidance.posterior(d, first_value)(X, T),
        }.items():
            call = functools.partial(call, model_fn)
            yield f"{name}, a network that returns {what}", (begins, call)


def network_cases():
    """Every network, given wrong timesteps or images."""
    for name, options in NETWORKS.items():

        def call(x=X, timesteps=T, name=name, options=options):
            network = models.MODELS[name](**options)
            return jax.eval_shape(lambda: network.init(KEY, x, timesteps))

        for what, given in TIMESTEPS.items():
            begins = "timesteps must be an array [3], got "
            wrong = functools.partial(call, timesteps=given)
            yield f"{name} network, {what} as timesteps", (begins, wrong)
        begins = "x must be a float array, such as uint8 / 127.5 - 1, got uint8"
        yield f"{name} network, 8 bits", (begins, functools.partial(call, x=IMAGES))


def guidance_cases():
    """Guidance by any conditioning and by a measurement, given something wrong."""
    text = {"text": {"a": jnp.ones((3, 5))}}
    null = {"text": {"a": jnp.zeros(5)}}

    def free(cond=text, null=null, t=T, **more):
        return guidance.classifier_free(worded, cond, null, 2.0)(X, t, **more)

    def posterior(log_prob_fn=first_value, t=T):
        return guidance.posterior(DENOISE, log_prob_fn)(X, t)

    def classifier(log_prob_fn, t=T):
        return guidance.classifier(DENOISE, S, log_prob_fn)(X, t)

    same = "null_label must have the names and pytrees of label, got "
    log_prob = "log_likelihood_fn's output must be a float array [3], got "
    for what, begins, call in (
        ("of another name", same, lambda: free(null={"words": null["text"]})),
        ("of other leaves", same, lambda: free(null={"text": {"b": jnp.zeros(5)}})),
        ("a label for a text", same, lambda: free(null=0)),
        (
            "of another size",
            "null_label must broadcast to [3, 5], got float32 [4]",
            lambda: free(null={"text": {"a": jnp.zeros(4)}}),
        ),
        (
            "a text of another batch",
            "text must be an array [3, 5], got float32 [2, 5]",
            lambda: free({"text": {"a": jnp.ones((2, 5))}}),
        ),
        (
            "a text of words",
            "label's text must be an array [b, ...], got 'words'",
            lambda: free({"text": {"a": "words"}}),
        ),
        ("twice", "text must be given once", lambda: free(text=text["text"])),
        ("free, t of no axis", AN_INT, lambda: free(t=T[0])),
        ("free, t of Python", AN_INT, lambda: free(t=4)),
        ("posterior, t of no axis", AN_INT, lambda: posterior(t=T[0])),
        ("posterior, t of Python", AN_INT, lambda: posterior(t=4)),
        ("posterior, one number", log_prob, lambda: posterior(jnp.sum)),
        ("posterior, images", log_prob, lambda: posterior(lambda x_0: x_0)),
        (
            "posterior of nothing",
            "log_likelihood_fn must be a function of (x_0,), got None",
            lambda: posterior(None),
        ),
        (
            "posterior of a network",
            RAW,
            lambda: guidance.posterior(model, first_value)(X, T),
        ),
        (
            "classifier, one number",
            "log_prob_fn's output must be a float array [3], got ",
            lambda: classifier(lambda x, timesteps, t: jnp.sum(x)),
        ),
        (
            "weights of another shape",
            "weighting's output must be a float array [3], got float32 [3, 1]",
            lambda: loss_of(
                objective=Objective(weighting=lambda s, t: 1.0 * t[:, None])
            ),
        ),
        (
            "a weighting that is no function",
            "weighting must be one of ('uniform', ",
            lambda: Objective(weighting=3),  # type: ignore
        ),
    ):
        yield f"guidance, {what}", (begins, call)


def worded(x_t, t, *, text):
    return Prediction(x_t * text["a"][:, :1, None, None], jnp.zeros(()))


def first_value(x_0):
    return -(x_0[:, 0, 0, 0] ** 2)


class Averaging(nnx.Module):
    """A network of Flax NNX that averages over the batch."""

    def __init__(self):
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))

    def __call__(self, x_t, timesteps):
        return self.norm(x_t)


class Dropping(nnx.Module):
    """A network of Flax NNX with dropout."""

    def __init__(self):
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x_t, timesteps):
        return self.dropout(x_t)


def evaluated(network):
    """The denoiser of a network of Flax NNX whose dropout is switched off."""
    network.eval()
    return diffusion.denoiser(network, S, V)


def dropout_cases():
    """Networks of Flax NNX that have been left in training mode."""
    network = Dropping()
    begins = "{} must have its dropout off, as eval() of a network of Flax NNX does it"
    for what, model_fn in {
        "itself": network,
        "its method": network.__call__,
        "a part of it": functools.partial(network),
        "within a function": lambda x_t, timesteps: network(x_t, timesteps),
    }.items():
        denoise = diffusion.denoiser(model_fn, S, V)
        call = functools.partial(denoise, X, T)
        yield f"dropout, {what}", (begins.format("model_fn"), call)
        log_prob = guidance.label_log_prob(model_fn, LABEL)
        call = functools.partial(log_prob, X[:, 0, 0], 1.0 * T)
        yield f"dropout of a classifier, {what}", (begins.format("logits_fn"), call)


def moments(**changes):
    """Moments of two features, some of them changed."""
    return metrics.Moments(9, np.zeros(2), np.eye(2))._replace(**changes)


FIT = "multipliers must fit the "
BATCH = {"image": IMAGES, "label": LABEL}
TINY = [1e-20, 0.1, 0.1]
A_VECTOR = "betas must be a vector of values in (0, 1], got "
A_KEY = "key must be one typed key, as jax.random.key makes it, got "
OLD_KEY = jnp.zeros(2, jnp.uint32)
OUTPUT = "model_fn's output must be a float array [3, 4, 4, channels], got "
RAW_NETWORK = "the raw network, got a denoiser of one."
RAW = "denoise_fn must return a Prediction, as diffusion.denoiser makes it of a network"
NO_DENOISER = "denoise_fn must be a function of (x_t, t), got None"
NO_STEP = "step_fn must be a function of (keys, denoise_fn, schedule, state, t), got "


@dataclasses.dataclass
class Unregistered:
    x: jax.Array
    x_0: jax.Array
    log_snr: jax.Array


class Noted(NamedTuple):
    x: jax.Array
    x_0: jax.Array
    log_snr: jax.Array
    note: str


OTHERS = [
    # what a campaign of wrong values has found
    ("eta must be a number in [0, 1], got key<fry> []", lambda: draws(KEY)),
    (
        "mask must be in [0, 1], got 255",
        lambda: samplers.inpaint(STEP, X, IMAGES // 200 * 255),
    ),
    (
        "mask must broadcast to [3, 4, 4, 2], got [1, 0]",
        lambda: samplers.inpaint(STEP, X, [1, 0]),
    ),
    ("mean_1 must broadcast to [], got None", lambda: losses.normal_kl(None, X, X, X)),
    (
        "low must be a float array [...], got <U1 [1]",
        lambda: diffusion.clip_x_0(DENOISE, np.array(["a"])),
    ),
    (
        "number must be an integer in [0, 4294967295], got -1",
        lambda: samplers.fold_in(KEYS, -1),
    ),
    (
        "model_fn must be a function of (x_t, timesteps, label=), got one of (x_t, ",
        lambda: guidance.classifier_free(DENOISE, LABEL, 0, 2.0)(X, T),
    ),
    (
        "weighting must be a function of (schedule, t), got one of (t)",
        lambda: loss_of(objective=Objective(weighting=lambda t: t)),  # type: ignore
    ),
    (
        "model_fn must be a network with its parameters, as models.bind makes it, got",
        lambda: diffusion.denoiser(models.UNet(), S, V)(X, T),
    ),
    (
        "model_fn must be a network with its parameters, as models.bind makes it, got",
        lambda: losses.training_loss(KEY, models.UNet(), S, V, X, T),
    ),
    (
        "x_t must be a float array [...], got [1.0]",
        lambda: guidance.posterior(DENOISE, first_value)([1.0], T),
    ),
    (
        "null_label must be of the type of the label, uint8, got -1",
        lambda: guidance.classifier_free(
            labeled, {"label": LABEL.astype(jnp.uint8)}, {"label": -1}, 2.0
        ),
    ),
    (
        "until must be an int array [], got float32 []",
        lambda: samplers.share_noise(STEP, KEY, until=jnp.ones(())),
    ),
    (
        "null_label must be an int array [], got int32 [3]",
        lambda: guidance.drop_labels(KEY, LABEL, LABEL, 0.5),
    ),
    ("betas must be at least 1 value, got 0", lambda: spacing.karras_steps([], 1)),
    (
        "state must be a LossHistory",
        lambda: timesteps.loss_second_moment(10).sample(KEY, (), 4),
    ),
    ("tx must be an optimizer of optax, got None", lambda: train_step(tx=None)),
    (
        "model must be a network, as models describes it, got None",
        lambda: train_step(model=None),
    ),
    (
        "timestep_sampler must be a TimestepSampler, got 'uniform'",
        lambda: train_step(timestep_sampler="uniform"),
    ),
    (
        "moments must be by name, got a Moments",
        lambda: metrics.save_moments("m.npz", moments()),
    ),
    (
        "sampler must be a function of (keys, denoise_fn, schedule, state, t), got f",
        lambda: samplers.as_sampler(X),
    ),
    # what somebody has found who used it in code of their own
    (
        "step_fn must be a function of (keys, denoise_fn, schedule, state, t), got one "
        "of (keys, denoise_fn, state, t)",
        lambda: samplers.sample(KEYS, DENOISE, lambda keys, denoise_fn, state, t: 0, S),
    ),
    (
        NO_STEP + "one of (x_t, timesteps)",
        lambda: samplers.inpaint(model, X, X[0] > 0),
    ),
    (
        "step_fn must be a function of (keys, denoise_fn, schedule, state, t, eta=), "
        "got one of (keys, denoise_fn, schedule, state, t)",
        lambda: samplers.sample(
            *(KEYS, DENOISE, functools.partial(samplers.ddpm_step, eta=0.5), S, X)
        ),
    ),
    (
        "denoise_fn must be a function of (x_t, t), got one of (keys, denoise_fn, ",
        lambda: samplers.sample(KEYS, STEP, DENOISE, S, X),
    ),
    (
        "denoise_fn must be a function of (x_t, t), got one of (x_t, t, label)",
        lambda: STEP(KEYS, labeled, S, STATE, T),
    ),
    (
        "denoise_fn must be a function of (x_t, t), got one of (x_t, t, label)",
        lambda: likelihood.bits_per_dim(KEY, labeled, S, X),
    ),
    (
        "denoise_fn must be a function of (x_t, t, text=), got one of (x_t, t, label)",
        lambda: guidance.classifier_free(
            labeled, {"text": LABEL}, {"text": LABEL}, 2.0
        )(X, T),
    ),
    (
        "sampler must be a function of (keys, denoise_fn, schedule, state, t), got one",
        lambda: samplers.as_sampler(model),
    ),
    (
        "log_likelihood_fn must be a function of (x_0), got one of (y, x_0)",
        lambda: guidance.posterior(DENOISE, lambda y, x_0: y),
    ),
    (
        "log_likelihood_fn must be a function of (x_0), got one of (x_t, timesteps)",
        lambda: editing.twisted_smc(KEYS, DENOISE, S, X, logits),
    ),
    (
        "log_prob_fn must be a function of (x_t, timesteps), got one of (x_0)",
        lambda: guidance.classifier(DENOISE, S, first_value),
    ),
    (
        "log_prob_fn must be a function of (x_t, timesteps), got one of (x, t, label)",
        lambda: guidance.classifier(DENOISE, S, lambda x, t, label: x),
    ),
    (
        "logits_fn must be a function of (x_t, timesteps), got one of (x_0)",
        lambda: guidance.label_log_prob(first_value, LABEL),
    ),
    (
        "logits_fn must be a function of (x_t, timesteps), got one of (x_0)",
        lambda: losses.classifier_loss(KEY, first_value, S, X, T, LABEL % 2),
    ),
    (
        "scale must be a function of (t), got one of (x_t, timesteps)",
        lambda: guidance.posterior(DENOISE, first_value, model),
    ),
    (
        "mask must be a function of (x), got one of (x_t, timesteps)",
        lambda: samplers.inpaint(STEP, X, model),
    ),
    (
        "on_step must be a function of (t), got one of (x_t, timesteps)",
        lambda: samplers.on_step(STEP, model),
    ),
    (
        "conditioning must be given by name, such as label=, got int32 [3]",
        lambda: DENOISE(X, T, LABEL),
    ),
    *(
        (f"model_fn must be {rule}", call)
        for rule, call in (
            (RAW_NETWORK, lambda: losses.training_loss(KEY, DENOISE, S, V, X, T)),
            (RAW_NETWORK, lambda: diffusion.denoiser(DENOISE, S, V)),
            (
                RAW_NETWORK,
                lambda: diffusion.denoiser(diffusion.clip_x_0(DENOISE), S, V),
            ),
            (
                "in evaluation mode, as eval() of a network of Flax NNX does it",
                lambda: diffusion.denoiser(Averaging(), S, V)(X, T),
            ),
        )
    ),
    *(
        (
            f"label must be an array [3, ...], got int32 [{size}]",
            lambda size=size: DENOISE_LABELED(X, T, label=jnp.arange(size)),
        )
        for size in (1, 2, 4)
    ),
    (
        "text must be an array [3, ...], got float32 [2, 5]",
        lambda: DENOISE_LABELED(X, T, text={"a": jnp.ones((2, 5))}),
    ),
    (
        "function must be a function of (x_t, t), got a NoiseSchedule",
        lambda: diffusion.with_schedule(S, model),
    ),
    *(
        (
            "ts must go down as step_fn does, got rows that go up.",
            lambda step=step: samplers.sample(
                KEYS, DENOISE, step, S, X, ts=jnp.arange(10)
            ),
        )
        for step in (
            *(row.step for row in samplers.SAMPLERS.values()),
            samplers.inpaint(STEP, X, X[0] > 0),
            functools.partial(STEP, eta=0.5),
        )
    ),
    (
        "ts must go up as step_fn does, got rows that go down.",
        lambda: samplers.sample(KEYS, DENOISE, samplers.ddim_inversion_step, S, X),
    ),
    # tables
    (
        "betas must give finite coefficients in every row, got 1e-20 in row 0.",
        lambda: schedules.make_schedule(TINY),
    ),
    (
        "betas must give finite coefficients",
        lambda: schedules.make_schedule([1 - 1e-16] * 30),
    ),
    (A_VECTOR + "nan", lambda: schedules.make_schedule([0.1, np.nan])),
    (A_VECTOR + "inf", lambda: schedules.tabulate([0.1, np.inf])),
    (A_VECTOR + "2.0", lambda: schedules.make_schedule([0.1, 2])),
    (A_VECTOR + "['a', 'b']", lambda: schedules.make_schedule(["a", "b"])),
    (A_VECTOR + "None", lambda: schedules.make_schedule(None)),
    (
        A_VECTOR + "[[0.1], [0.1, 0.2]]",
        lambda: schedules.make_schedule([[0.1], [0.1, 0.2]]),
    ),
    (
        A_VECTOR + "float32 [2], whose values are not known",
        lambda: jax.jit(schedules.make_schedule)(jnp.array([0.1, 0.2])),
    ),
    (A_VECTOR + "0.0", lambda: spacing.karras_steps([0.0, 0.5], 1)),
    (A_VECTOR + "nan", lambda: spacing.angle_steps([np.nan, 0.5], 1)),
    (A_VECTOR + "-1.0", lambda: schedules.zero_terminal_snr([0.1, -1])),
    (
        "betas must be 3 values, got 2",
        lambda: schedules.given_betas(3, betas=[0.1, 0.2]),
    ),
    (A_VECTOR + "5.0", lambda: schedules.given_betas(2, betas=[0.1, 5])),
    (
        "keep must be steps within [0, 10), got [False, True]",
        lambda: schedules.make_schedule(BETAS, keep=[False, True]),
    ),
    (
        "keep must be steps within [0, 10), got 'all'",
        lambda: schedules.make_schedule(BETAS, keep="all"),
    ),
    (
        "keep must be steps within [0, 10), got [[1], [2, 3]]",
        lambda: schedules.make_schedule(BETAS, keep=[[1], [2, 3]]),
    ),
    (
        "rescale_timesteps must be True or False, got 'no'",
        lambda: schedules.make_schedule(BETAS, rescale_timesteps="no"),
    ),
    (
        "rescale must be True or False, got 'no'",
        lambda: schedules.linear_betas(100, rescale="no"),
    ),
    (
        "end must differ from start = 3",
        lambda: schedules.sigmoid_alpha_bar_betas(9, start=3, end=3),
    ),
    (
        "alpha_bar_fn must be a function of (u,)",
        lambda: schedules.betas_from_alpha_bar(0.5, 9),
    ),
    (
        "alpha_bar_fn must return 10 finite positive",
        lambda: schedules.betas_from_alpha_bar(lambda u: 1.0, 9),
    ),
    (
        "alpha_bar_fn must return 10 finite positive",
        lambda: schedules.betas_from_alpha_bar(lambda u: -u, 9),
    ),
    ("schedule must be a NoiseSchedule", lambda: schedules.pad(BETAS, 12)),
    ("schedule must be a NoiseSchedule", lambda: schedules.take(BETAS, T, 4)),
    (
        "t must be an int array [b], got int32 [3, 1]",
        lambda: schedules.take(S, T[:, None], 4),
    ),
    (
        "t must be in [0, 10), got 11",
        lambda: schedules.take(PADDED, jnp.array([11]), 4),
    ),
    ("ndim must be an integer >= 0, got 2.5", lambda: schedules.take(S, T, 2.5)),
    # what is predicted
    ("mean_type must be one of", lambda: Objective(["eps"])),
    ("reduction must be one of", lambda: Objective(reduction=None)),
    (
        "objective must be an Objective, got 'eps'",
        lambda: diffusion.denoiser(model, S, "eps"),
    ),
    (
        "objective must be an Objective, got None",
        lambda: losses.training_loss(KEY, model, S, None, X, T),
    ),
    ("objective must be an Objective", lambda: losses.loss_weight(S, "uniform", T)),
    (
        "t must be an int array [b], got float32 [3]",
        lambda: losses.loss_weight(S, V, T * 1.0),
    ),
    ("schedule must be a NoiseSchedule", lambda: diffusion.denoiser(model, BETAS, V)),
    (
        "schedule must be a NoiseSchedule",
        lambda: losses.training_loss(KEY, model, V, S, X, T),
    ),
    (
        "model_fn must be a function of (x_t, timesteps), got a NoiseSchedule",
        lambda: losses.training_loss(KEY, S, model, V, X, T),
    ),
    (
        "model_fn must be a function of (x_t, timesteps), got None",
        lambda: diffusion.denoiser(None, S, V),
    ),
    (
        OUTPUT + "float32 [3]",
        lambda: losses.training_loss(KEY, lambda x, t: x[:, 0, 0, 0], S, V, X, T),
    ),
    (
        OUTPUT + "float32 [3, 4, 1, 2]",
        lambda: losses.training_loss(KEY, lambda x, t: x[:, :, :1], S, V, X, T),
    ),
    (
        OUTPUT + "int32 [3, 4, 4, 2]",
        lambda: losses.training_loss(KEY, lambda x, t: x.astype(int), S, V, X, T),
    ),
    (
        OUTPUT + "a tuple of float32",
        lambda: losses.training_loss(KEY, lambda x, t: (x, x), S, V, X, T),
    ),
    (
        "the network must output 4 channels",
        lambda: losses.training_loss(KEY, model, S, LEARNED, X, T),
    ),
    (
        OUTPUT + "float32 [1, 4, 4, 2]",
        lambda: diffusion.denoiser(lambda x, t: x[:1], S, V)(X, T),
    ),
    (
        OUTPUT + "float32 [3, 2, 4, 2]",
        lambda: jax.jit(diffusion.denoiser(lambda x, t: x[:, :2], S, V))(X, T),
    ),
    (A_KEY + "uint32 [2]", lambda: losses.training_loss(OLD_KEY, model, S, V, X, T)),
    (A_KEY + "key<fry> [3]", lambda: losses.training_loss(KEYS, model, S, V, X, T)),
    (A_KEY + "0", lambda: losses.training_loss(0, model, S, V, X, T)),
    (
        "eps must be a float array [3, 4, 4, 2]",
        lambda: losses.training_loss(KEY, model, S, V, X, T, eps=X[:1]),
    ),
    (
        "x_0 must be a float array, such as",
        lambda: jax.jit(lambda x: losses.training_loss(KEY, model, S, V, x, T).loss)(
            IMAGES
        ),
    ),
    (
        AN_INT + "int32 [3, 1]",
        lambda: jax.jit(lambda t: losses.training_loss(KEY, model, S, V, X, t).loss)(
            T[:, None]
        ),
    ),
    (
        AN_INT + "int32 []",
        lambda: jax.jit(lambda t: losses.training_loss(KEY, model, S, V, X, t).loss)(
            T[0]
        ),
    ),
    (
        "label must be an int array [3], got int32 [2]",
        lambda: losses.classifier_loss(KEY, logits, S, X, T, LABEL[:2]),
    ),
    (
        "label must be in [0, 2), got 2",
        lambda: losses.classifier_loss(KEY, logits, S, X, T, LABEL),
    ),
    (
        "logits_fn's output must be a float array [3, labels]",
        lambda: losses.classifier_loss(KEY, model, S, X, T, LABEL),
    ),
    ("x must be a float array, such as", lambda: losses.mean_flat(jnp.asarray(IMAGES))),
    (
        "x must be a float array, such as",
        lambda: losses.discretized_gaussian_log_likelihood(IMAGES, X, X),
    ),
    (
        "log_scale must broadcast to [3, 4, 4, 2]",
        lambda: losses.discretized_gaussian_log_likelihood(X, X, jnp.zeros((3, 2))),
    ),
    ("mean_2 must broadcast to", lambda: losses.normal_kl(X, X, jnp.zeros((2, 3)), X)),
    (
        "num_channels must be an integer >= 1, got 2.0",
        lambda: diffusion.split_output(V, X, 2.0),
    ),
    # denoisers
    (NO_DENOISER, lambda: diffusion.clip_x_0(None)),
    (RAW, lambda: diffusion.clip_x_0(model)(X, T)),
    (RAW, lambda: diffusion.threshold_x_0(model)(X, T)),
    (RAW, lambda: guidance.shift_x_0(model, S)(X, T)),
    (RAW, lambda: guidance.classifier(model, S, lambda x, t: x[:, 0, 0, 0])(X, T)),
    (RAW, lambda: guidance.classifier_free(lambda x, t, label: x, LABEL, 0, 2.0)(X, T)),
    (RAW, lambda: guidance.autoguidance(model, DENOISE, 2.0)(X, T)),
    (
        RAW.replace("denoise_fn", "weak_fn"),
        lambda: guidance.adaptive_projected(DENOISE, model, 2.0)(X, T),
    ),
    (
        "weak_fn must be a function of (x_t, t), got None",
        lambda: guidance.autoguidance(DENOISE, None, 2.0),
    ),
    (
        "schedule must be a NoiseSchedule, as make_schedule returns one, got None.",
        lambda: guidance.zero_star(lambda x, t: PREDICTION, DENOISE, 2.0),
    ),
    (RAW, lambda: samplers.sample(KEYS, model, STEP, S, X)),
    (RAW, lambda: samplers.invert(model, S, X)),
    (RAW, lambda: likelihood.bits_per_dim(KEY, model, S, X)),
    (RAW, lambda: likelihood.ode_bits_per_dim(KEY, model, S, X)),
    (RAW, lambda: likelihood.ode_log_prob(KEY, model, S, X, probes=1)),
    (RAW, lambda: editing.repaint(KEYS, model, STEP, S, X, X, X)),
    (
        "denoise_fn's x_0 must be a float array [3, 4, 4, 2]",
        lambda: diffusion.clip_x_0(lambda x, t: PREDICTION._replace(x_0=x[:1]))(X, T),
    ),
    (
        "denoise_fn's log_var must broadcast",
        lambda: diffusion.clip_x_0(
            lambda x, t: PREDICTION._replace(log_var=jnp.zeros(5))
        )(X, T),
    ),
    (
        "low must be below high = -1.0, got 1.0",
        lambda: diffusion.clip_x_0(DENOISE, 1.0, -1.0),
    ),
    ("low must be a number, got nan", lambda: diffusion.clip_x_0(DENOISE, np.nan)),
    (
        "label must be an int array [b], got float32 [3]",
        lambda: guidance.classifier_free(labeled, LABEL * 1.0, 0, 2.0),
    ),
    (
        "label must be an int array [3], got int32 [2]",
        lambda: guidance.classifier_free(labeled, LABEL[:2], 0, 2.0)(X, T),
    ),
    (
        "null_label must be an integer, got 0.5",
        lambda: guidance.classifier_free(labeled, LABEL, 0.5, 2.0),
    ),
    (
        "scale must be one number, or one for each image, [3], got float32 [2]",
        lambda: guidance.classifier_free(labeled, LABEL, 0, jnp.ones(2))(X, T),
    ),
    (
        "scale must be one number, or one for each image, [b]",
        lambda: guidance.classifier(DENOISE, S, model, jnp.ones((3, 1))),
    ),
    (
        "log_prob_fn must be a function of (x_t, timesteps), got None",
        lambda: guidance.classifier(DENOISE, S, None),
    ),
    (
        "log_prob_fn's output must be a float array [3]",
        lambda: guidance.classifier(DENOISE, S, lambda x, t: x)(X, T),
    ),
    (
        "label must be in [0, 2), got 2",
        lambda: guidance.label_log_prob(logits, LABEL)(X, T),
    ),
    # sampling
    (
        NO_STEP + "a Sampler",
        lambda: samplers.sample(KEYS, DENOISE, samplers.SAMPLERS["ddim"], S, X),
    ),
    (NO_STEP + "'ddim'", lambda: samplers.sample(KEYS, DENOISE, "ddim", S, X)),
    (NO_STEP + "a Step", lambda: samplers.inpaint(Step(), X, X)),
    (NO_DENOISER, lambda: samplers.sample(KEYS, None, STEP, S, X)),
    (
        "schedule must be a NoiseSchedule",
        lambda: samplers.sample(KEYS, DENOISE, STEP, BETAS, X),
    ),
    (
        "keys must be an array of typed keys [3], got key<fry> []",
        lambda: samplers.sample(KEY, DENOISE, STEP, S, X),
    ),
    (
        "keys must be an array of typed keys [3], got key<fry> [2]",
        lambda: samplers.sample(KEYS[:2], DENOISE, STEP, S, X),
    ),
    (
        "x_T must be a float array, such as",
        lambda: samplers.sample(KEYS, DENOISE, STEP, S, IMAGES),
    ),
    (
        "ts must be an int array [n], got float32 [3]",
        lambda: samplers.sample(KEYS, DENOISE, STEP, S, X, ts=T * 1.0),
    ),
    (
        "ts must be an int array [n], got [4, 0]",
        lambda: samplers.sample(KEYS, DENOISE, STEP, S, X, ts=[4, 0]),
    ),
    (
        "ts must be below 10, got 10",
        lambda: samplers.sample(KEYS, DENOISE, STEP, S, X, ts=T + 1),
    ),
    (
        "step_fn must return a state like the one that it is given, got float32",
        lambda: samplers.sample(KEYS, DENOISE, lambda k, d, s, state, t: state.x, S, X),
    ),
    (
        "step_fn must return a state like the one that it is given, with x bfloat16",
        lambda: samplers.sample(KEYS, DENOISE, wide_step, S, X.astype(jnp.bfloat16)),
    ),
    (
        "ts must be different rows, got 4 twice",
        lambda: samplers.sample(KEYS, DENOISE, STEP, S, X, ts=T[1] + 0 * T[:2]),
    ),
    *(
        (
            "keys must be keys whose noise is the same in every batch",
            lambda impl=impl, call=call: call(
                jax.random.split(jax.random.key(0, impl=impl), 3)
            ),
        )
        for impl in ("rbg", "unsafe_rbg")
        for call in (
            lambda keys: samplers.normal(keys, (2,)),
            lambda keys: samplers.fold_in(keys, 1),
            lambda keys: samplers.sample(keys, DENOISE, STEP, S, X),
            lambda keys: STEP(keys, DENOISE, S, samplers.start(X), T),
            lambda keys: editing.edit(keys, DENOISE, STEP, S, X, t=3),
        )
    ),
    *(
        (
            f"state{begins}",
            lambda state=state: samplers.sample(KEYS, DENOISE, STEP, S, state=state),
        )
        for begins, state in {
            " must be a pytree": Unregistered(*samplers.start(X)),
            ".note must be an array, got 'a'": Noted(*samplers.start(X), "a"),
            ".x_0 must be a float array [3, 4, 4, 2], got float32 [2": (
                samplers.start(X)._replace(x_0=X[:2])
            ),
            ".log_snr must be a float array [3, 1, 1, 1], got None": (
                samplers.start(X)._replace(log_snr=None)
            ),
            ".log_snr must be a float array [3, 1, 1, 1], got float32 []": (
                samplers.start(X)._replace(log_snr=jnp.zeros(()))
            ),
            ".log_snr must be a float array [4": jax.tree.map(
                lambda a: jnp.stack([a] * 4), samplers.start(X)
            ),
        }.items()
    ),
    *(
        ("step_fn must do with the fields", call)
        for call in (
            lambda: samplers.sample(KEYS, DENOISE, noting_step, S, X),
            lambda: editing.repaint(KEYS, DENOISE, noting_step, S, X, X, X),
        )
    ),
    (
        "key must be an array of typed keys [3], got key<fry> [2]",
        lambda: samplers.sample(
            KEYS, DENOISE, samplers.share_noise(STEP, KEYS[:2], until=4), S, X
        ),
    ),
    *(
        (
            f"number must be an integer {rule}",
            lambda number=number: samplers.fold_in(KEYS, np.array(number)),
        )
        for number, rule in (
            (-1, "in [0, 4294967295], got -1"),
            ([0, 1, 2**32], "in [0, 4294967295], got 4294967296"),
            ([0, 1], "array [3], got int64 [2]"),
            (0.5, "array [], got float64 []"),
        )
    ),
    (
        "state must be given without x_T, got float32 [3, 4, 4, 2]",
        lambda: samplers.sample(KEYS, DENOISE, STEP, S, X, state=samplers.start(X)),
    ),
    (
        "state must be a SampleState, such as samplers.start makes, got float32",
        lambda: samplers.sample(KEYS, DENOISE, STEP, S, state=X),
    ),
    (
        "x_T must be a float array [b, ...], got None",
        lambda: samplers.sample(KEYS, DENOISE, STEP, S),
    ),
    (
        "keys of noise in a step must be those of its row",
        lambda: samplers.sample(KEYS, DENOISE, old_step, S, X),
    ),
    (
        "number must be an integer array [3], got int32 [2]",
        lambda: samplers.fold_in(KEYS, T[:2]),
    ),
    (A_KEY + "uint32 [2]", lambda: samplers.image_keys(OLD_KEY, LABEL)),
    (
        "ids must be an integer array [b], got [0, 1]",
        lambda: samplers.image_keys(KEY, [0, 1]),
    ),
    (
        "ids must be an integer array [b], got float32 [3]",
        lambda: samplers.image_keys(KEY, LABEL * 1.0),
    ),
    (
        "number must be an integer in [0, 4294967295], got 0.5",
        lambda: samplers.fold_in(KEYS, 0.5),
    ),
    (
        "keys must be an array of typed keys [b], got key<fry> []",
        lambda: samplers.normal(KEY, (2,)),
    ),
    ("shape must be that of an image, got 8", lambda: samplers.normal(KEYS, 8)),
    (
        "shape's axes must be an integer >= 0, got 2.5",
        lambda: samplers.normal(KEYS, (2.5,)),
    ),
    ("x_T must be a float array, such as", lambda: samplers.start(jnp.asarray(IMAGES))),
    ("t must be in [0, 10), got 10", lambda: samplers.invert(DENOISE, S, X, t=10)),
    ("x_0 must be a float array, such as", lambda: samplers.invert(DENOISE, S, IMAGES)),
    (
        "y must be a float array [3, 4, 4, 2]",
        lambda: samplers.slerp(X, X[:1], jnp.ones(3)),
    ),
    ("weight must be a float array [3], got 0.5", lambda: samplers.slerp(X, X, 0.5)),
    (
        "t must be in [0, 10), got -1",
        lambda: samplers.interpolate(KEYS, DENOISE, STEP, S, X, X, jnp.ones(2), t=-1),
    ),
    (
        "weights must be a float array [n], got [0.5]",
        lambda: samplers.interpolate(KEYS, DENOISE, STEP, S, X, X, [0.5], t=3),
    ),
    (
        "x_b must be a float array, such as",
        lambda: samplers.interpolate(
            KEYS, DENOISE, STEP, S, X, IMAGES, jnp.ones(2), t=3
        ),
    ),
    (
        "mask must broadcast to [3, 4, 4, 2], got float32 [3, 1]",
        lambda: samplers.inpaint(STEP, X, jnp.ones((3, 1))),
    ),
    (
        "mask must broadcast to [3, 4, 4, 2], got None",
        lambda: samplers.inpaint(STEP, X, None),
    ),
    (
        "x_known must be a float array, such as",
        lambda: samplers.inpaint(STEP, IMAGES, X),
    ),
    (
        "key must be an array of typed keys []",
        lambda: samplers.share_noise(STEP, 3, until=3),
    ),
    (
        "on_step must be a function of (t,), got None",
        lambda: samplers.on_step(STEP, None),
    ),
    # editing and likelihood
    ("x must be a float array, such as", lambda: editing.gray(IMAGES)),
    ("x must have an axis of channels", lambda: editing.gray(jnp.ones(3))),
    (
        "x must be a float array [b, h, w, c], got float32 [3]",
        lambda: editing.shrink(jnp.ones(3), size=1),
    ),
    ("size must divide 4 x 4, got 3", lambda: editing.block_mean(X, size=3)),
    (
        "to must be at least t = ",
        lambda: editing.renoise(KEYS, S, X, T, jnp.zeros(3, jnp.int32)),
    ),
    (
        "t must be in [0, 10), got 10",
        lambda: editing.edit(KEYS, DENOISE, STEP, PADDED, X, t=10),
    ),
    (
        "t must be an int array [], got int32 [3]",
        lambda: editing.descend(KEYS, DENOISE, STEP, S, X, t=T),
    ),
    (
        "x must be a float array, such as",
        lambda: editing.edit(KEYS, DENOISE, STEP, S, IMAGES, t=3),
    ),
    (
        "t must be in [0, 10), got 12",
        lambda: editing.reconstruct(KEYS, DENOISE, S, X, t=12),
    ),
    (
        "y_T must be a float array [3, 4, 4, 2]",
        lambda: editing.between_noises(KEYS, DENOISE, STEP, S, X, X[:2], jnp.ones(2)),
    ),
    (
        "log_likelihood_fn must be a function of (x_0,), got None",
        lambda: editing.dps(KEYS, DENOISE, STEP, S, X, None),
    ),
    (
        "log_likelihood_fn must be a function of (x_0,), got None",
        lambda: editing.twisted_smc(KEYS, DENOISE, S, X, None),
    ),
    (
        "log_likelihood_fn's output must be a float array [3], got float32 []",
        lambda: editing.twisted_smc(KEYS, DENOISE, S, X, jnp.sum),
    ),
    (
        "x_T must be a float array, such as",
        lambda: editing.twisted_smc(KEYS, DENOISE, S, IMAGES, first_value),
    ),
    (
        "keys must be an array of typed keys [3], got key<fry> [2]",
        lambda: editing.twisted_smc(KEYS[:2], DENOISE, S, X, first_value),
    ),
    (
        "x_0 must be a float array, such as",
        lambda: likelihood.bits_per_dim(KEY, DENOISE, S, IMAGES),
    ),
    (
        "x_0 must be in [-1, 1], got a value of 200",
        lambda: likelihood.bits_per_dim(KEY, DENOISE, S, IMAGES.astype(np.float32)),
    ),
    (
        "x_0 must be a float array, such as",
        lambda: likelihood.ode_bits_per_dim(KEY, DENOISE, S, IMAGES),
    ),
    (
        "x_0 must be a float array, such as",
        lambda: likelihood.ode_log_prob(KEY, DENOISE, S, IMAGES),
    ),
    (
        "x_0 must be a float array [b, ...], got 2.0",
        lambda: likelihood.ode_log_prob(KEY, DENOISE, S, 2.0),
    ),
    (
        "x_0 must be finite, got NaN or infinity",
        lambda: likelihood.ode_log_prob(KEY, DENOISE, S, X.at[0].set(jnp.inf)),
    ),
    (
        "per_dim must be True or False, got 2",
        lambda: likelihood.ode_log_prob(KEY, DENOISE, S, X, per_dim=2),
    ),
    ("x_0 must be a float array, such as", lambda: likelihood.prior_bpd(S, IMAGES)),
    ("x_0 must be a float array, such as", lambda: likelihood.dequantize(KEYS, IMAGES)),
    (
        "key must be an array of typed keys [3], got key<fry> [2]",
        lambda: likelihood.bits_per_dim(KEYS[:2], DENOISE, S, X),
    ),
    ("bpd must be a BitsPerDim", lambda: likelihood.progressive_coding(X)),
    # timesteps
    (A_KEY + "uint32 [2]", lambda: timesteps.stratified(10).sample(OLD_KEY, (), 4)),
    (
        "loss must be a float array [3], got float32 [3, 1]",
        lambda: update(T, jnp.ones((3, 1))),
    ),
    ("t must be in [0, 10), got 10", lambda: update(T + 1, jnp.ones(3))),
    (
        "t must be an int array [b], got float32 [3]",
        lambda: update(T * 1.0, jnp.ones(3)),
    ),
    # training
    (
        "ema_decays must be a number in [0, 1), got 1.5",
        lambda: train_step(ema_decays=(1.5,)),
    ),
    (
        "ema_decays must differ from each other",
        lambda: train_step(ema_decays=(0.9, 0.9)),
    ),
    (
        "ema_decays must be a list of numbers, got 0.9",
        lambda: train_step(ema_decays=0.9),
    ),
    (
        "ema_widths must be a number in (0, 0.28], got 0.3",
        lambda: train_step(ema_widths=(0.3,)),
    ),
    (
        "ema_widths must differ from each other",
        lambda: train_step(ema_widths=(0.1, 0.1)),
    ),
    ("microbatches must be an integer >= 1, got 0", lambda: train_step(microbatches=0)),
    (
        "label_dropout must be a number in [0, 1], got 2",
        lambda: train_step(label_dropout=2),
    ),
    (
        "low_res_size must be an integer >= 0, got -1",
        lambda: train_step(low_res_size=-1),
    ),
    ("ema_warmup must be True or False, got 'no'", lambda: train_step(ema_warmup="no")),
    ("schedule must be a NoiseSchedule", lambda: train_step(schedule=BETAS)),
    ("objective must be an Objective", lambda: train_step(objective="eps")),
    (
        "batch must have 'label', of which label_dropout hides some, got ['image']",
        lambda: draw({"image": IMAGES}),
    ),
    ("batch must have 'image', got ['label']", lambda: draw({"label": LABEL})),
    (
        "batch's image must be a uint8 or float array [b, ...], got int32 [3]",
        lambda: draw(BATCH | {"image": LABEL}),
    ),
    (
        "batch's image must be an array [b, ...], got uint8 []",
        lambda: draw(BATCH | {"image": jnp.uint8(3)}),
    ),
    (
        "batch's angle must be an array [3, ...], got float32 [2]",
        lambda: draw(BATCH | {"angle": jnp.ones(2)}),
    ),
    (
        "batch's keys must be other arguments of the network than x, timesteps, "
        "train, rngs, got 'train'",
        lambda: draw(BATCH | {"train": jnp.ones(3)}),
    ),
    (
        "batch's label must be an int array [3], got int32 [2]",
        lambda: draw(BATCH | {"label": LABEL[:2]}),
    ),
    (
        "init must be a function of (key, x, timesteps, **cond), got None",
        lambda: models.from_functions(None, model),
    ),
    (
        "apply must be a function of (params, x, timesteps, *, train, rngs, **cond), "
        "got 3",
        lambda: models.from_functions(model, 3),
    ),
    (
        FIT + "sequence: its length must be divisible by 4 to be halved 2 times, got 6",
        lambda: halve((1, 6, 3)),
    ),
    (
        FIT
        + "image: its height and width must be divisible by 4 to be halved 2 times, "
        "got 8 x 6",
        lambda: halve((1, 8, 6, 3)),
    ),
    (
        FIT
        + "video: its height and width must be divisible by 4 to be halved 2 times, "
        "got 8 x 6",
        lambda: halve((1, 3, 8, 6, 3)),
    ),
    ("x must have an axis of length, or of height and width", lambda: halve((1, 3))),
    # metrics
    ("features must be numbers, got [['a']]", lambda: metrics.moments([["a"]])),
    (
        "features must be numbers, got complex128 [3, 2]",
        lambda: metrics.moments(np.ones((3, 2), complex)),
    ),
    (
        "features must be numbers, got bool [3, 2]",
        lambda: metrics.moments(np.ones((3, 2), bool)),
    ),
    ("features must be numbers, got None", lambda: metrics.inception_score(None)),
    (
        "features must be numbers, got [[1], [1, 2]]",
        lambda: metrics.moments([[1], [1, 2]]),
    ),
    ("a must be Moments", lambda: metrics.frechet_distance(np.eye(2), moments())),
    (
        "b must have a finite mean [d] and covariance [d, d]",
        lambda: metrics.frechet_distance(moments(), moments(cov=np.ones(2))),
    ),
    (
        "a must have a finite mean [d]",
        lambda: metrics.merge(moments(mean=np.full(2, np.nan)), moments()),
    ),
    (
        "images must be uint8 [n, h, w, c] with n >= 1, got float32",
        lambda: metrics.channel_stats(X),
    ),
    (
        "images must be uint8 [n, h, w, c] with n >= 1, got [1]",
        lambda: metrics.channel_stats([1]),
    ),
    (
        "data must be ChannelStats, got None",
        lambda: metrics.color_metrics(metrics.channel_stats(IMAGES), None),
    ),
]


def update(t, loss):
    """The state of a sampler that remembers losses, after one batch."""
    sampler = timesteps.loss_second_moment(10)
    return sampler.update(sampler.init(), t, loss)


def noting_step(keys, denoise_fn, schedule, state, t):
    return STEP(keys, denoise_fn, schedule, state, t + 0 * len(state.note))


def wide_step(keys, denoise_fn, schedule, state, t):
    return state._replace(x=state.x.astype(jnp.float32))


def old_step(keys, denoise_fn, schedule, state, t):
    return state._replace(x=samplers.normal(keys, state.x.shape[1:]))


def other_cases():
    for i, case in enumerate(OTHERS):
        yield f"{i}: {case[0]}", case


def loss_of(x=X, t=T, schedule=S, objective=V, **options):
    return losses.training_loss(KEY, model, schedule, objective, x, t, **options).loss


def x_t_of(schedule, x, t):
    return diffusion.q_sample(schedule, x, t, x)


def draws(eta=0.0, schedule=S, step=STEP):
    step = functools.partial(step, eta=eta)
    return samplers.sample(KEYS, DENOISE, step, schedule, X, ts=T[1] - T[:2] // 4)


def same_bits(found, expected):
    """Returns `found`, which must be `expected`."""
    if jnp.issubdtype(found.dtype, jax.dtypes.prng_key):
        same_bits(jax.random.key_data(found), jax.random.key_data(expected))
    else:
        np.testing.assert_array_equal(found, expected)
    return found


def own_scan(step):
    """The loop of somebody who gives a step one t for all images."""

    def body(state, t):
        return step(KEYS, DENOISE, S, state, t), None

    return jax.lax.scan(body, samplers.start(X, step), S.steps[::-1])[0]


# Right calls, each with the shape of what it returns.
RIGHT = {
    "a jump beyond all steps takes no memory": (
        lambda: editing.repaint(KEYS, DENOISE, STEP, S, X, X, X, jump=2_000_000_000),
        X.shape,
    ),
    "NumPy's images": (lambda: loss_of(np.asarray(X)), (3,)),
    "float16": (lambda: loss_of(X.astype(jnp.float16)), (3,)),
    "bfloat16": (lambda: loss_of(X.astype(jnp.bfloat16)), (3,)),
    "float64, cast or not": (lambda: loss_of(np.asarray(X, np.float64)), (3,)),
    "t of int8": (lambda: loss_of(t=T.astype(jnp.int8)), (3,)),
    "t of NumPy in steps": (
        lambda: [
            step(KEYS, DENOISE, S, samplers.start(X), np.array([0, 4, 9])).x
            for step in (samplers.ddpm_step, samplers.ddim_step)
        ][1],
        X.shape,
    ),
    **{
        f"{number!r} of NumPy in fold_in": (
            lambda number=number: same_bits(
                samplers.fold_in(KEYS, number),
                samplers.fold_in(KEYS, jnp.asarray(number, jnp.uint32)),
            ),
            (3,),
        )
        for number in (
            np.array(3),
            np.arange(3),
            np.array([7, 2**32 - 1, 0]),
            np.arange(3, dtype=np.uint8),
        )
    },
    **{
        f"one t for all images in a scan of one's own, {name}": (
            lambda step=step: same_bits(
                own_scan(step).x, samplers.sample(KEYS, DENOISE, step, S, X)
            ),
            X.shape,
        )
        for name, step in {
            **{name: row.step for name, row in samplers.SAMPLERS.items()},
            "inpaint": samplers.inpaint(STEP, X, X[0] > 0),
            "share_noise": samplers.share_noise(STEP, KEY, until=4),
            "on_step": samplers.on_step(STEP, int),
        }.items()
    },
    "t of NumPy": (lambda: loss_of(t=np.array([0, 4, 9])), (3,)),
    "data without axes": (lambda: x_t_of(S, X[:, 0, 0, 0], T), (3,)),
    "a table of float64": (lambda: loss_of(schedule=schedules.tabulate(BETAS)), (3,)),
    "a padded schedule": (lambda: loss_of(schedule=PADDED), (3,)),
    "a bfloat16 network": (
        lambda: diffusion.denoiser(lambda x, t: x.astype(jnp.bfloat16), S, V)(X, T).x_0,
        X.shape,
    ),
    "no key where eps is given": (
        lambda: losses.training_loss(None, model, S, V, X, T, eps=X).loss,
        (3,),
    ),
    "jit, t unknown": (lambda: jax.jit(lambda t: loss_of(t=t))(T), (3,)),
    "grad": (lambda: jax.grad(lambda x: loss_of(x).sum())(X), X.shape),
    "vmap over schedules": (
        lambda: jax.vmap(lambda s: loss_of(schedule=s))(STACKED),
        (2, 3),
    ),
    "vmap over schedules and t": (
        lambda: jax.vmap(lambda s, t: loss_of(schedule=s, t=t))(
            STACKED, jnp.stack([T, T])
        ),
        (2, 3),
    ),
    "vmap over images, t of no axis": (
        lambda: jax.vmap(lambda x, t: x_t_of(S, x, t))(X, T),
        X.shape,
    ),
    "vmap of jit, t of no axis": (
        lambda: jax.vmap(jax.jit(lambda x, t: x_t_of(S, x, t)))(X, T),
        X.shape,
    ),
    "vmap over images, one t for all": (
        lambda: jax.vmap(lambda x: x_t_of(S, x, jnp.int32(4)))(X),
        X.shape,
    ),
    "vmap over images with an axis of one": (
        lambda: jax.vmap(lambda x, t: loss_of(x[None], t[None]))(X, T),
        (3, 1),
    ),
    "vmap of a denoiser": (lambda: jax.vmap(DENOISE)(X, T).x_0, X.shape),
    "vmap of a guided denoiser": (
        lambda: (
            jax.vmap(
                guidance.classifier(DENOISE, S, lambda x, t: -jnp.sum(x**2)),
            )(X, T).grad
        ),
        X.shape,
    ),
    "vmap over eta": (lambda: jax.vmap(draws)(jnp.array([0.0, 1.0])), (2, *X.shape)),
    "jit over eta": (lambda: jax.jit(draws)(0.5), X.shape),
    "grad by eta": (lambda: jax.grad(lambda eta: draws(eta).sum())(0.5), ()),
    "a closed-over schedule in jit": (
        lambda: jax.jit(
            lambda x: editing.edit(KEYS, DENOISE, STEP, PADDED, x, t=3),
        )(X),
        X.shape,
    ),
    "bfloat16 and a state": (
        lambda: (
            samplers.sample(
                *(KEYS, DENOISE, STEP, S),
                state=samplers.start(X.astype(jnp.bfloat16)),
            ).x
        ),
        X.shape,
    ),
    "negative ts are skipped": (
        lambda: samplers.sample(
            KEYS, DENOISE, STEP, S, X, ts=jnp.array([-1, 4], jnp.int32)
        ),
        X.shape,
    ),
    "shard_map": (
        lambda: jax.jit(
            jax.shard_map(
                lambda x, t: loss_of(x, t),
                mesh=jax.make_mesh((1,), ("b",), axis_types=(AxisType.Auto,)),
                in_specs=jax.P("b"),
                out_specs=jax.P("b"),
                check_vma=False,
            )
        )(X, T),
        (3,),
    ),
    "eval_shape": (lambda: jax.eval_shape(loss_of, X, T), (3,)),
    "conditioning of any name and shape": (
        lambda: (
            guidance.classifier_free(
                worded,
                {"text": {"a": jnp.ones((3, 5))}},
                {"text": {"a": jnp.zeros(5)}},
                2.0,
            )(X, T).x_0
        ),
        X.shape,
    ),
    "vmap of a posterior": (
        lambda: (
            jax.vmap(guidance.posterior(DENOISE, lambda x_0: -jnp.sum(x_0**2)))(
                X, T
            ).grad
        ),
        X.shape,
    ),
    "weights by a function": (
        lambda: loss_of(objective=Objective(weighting=lambda s, t: 1.0 + t)),
        (3,),
    ),
    "dropout of NNX, in a loss": (
        lambda: losses.training_loss(KEY, Dropping(), S, V, X, T).loss,
        (3,),
    ),
    "averages of NNX, in evaluation mode": (
        lambda: evaluated(Averaging())(X, T).x_0,
        X.shape,
    ),
    "one number as conditioning of all images": (
        lambda: DENOISE_LABELED(X, T, label=2, train=False, rngs={"a": KEY}).x_0,
        X.shape,
    ),
    "vmap of a denoiser with a label": (
        lambda: jax.vmap(lambda x, t, label: DENOISE_LABELED(x, t, label=label).x_0)(
            X, T, LABEL
        ),
        X.shape,
    ),
    "a step of one's own that goes up": (
        lambda: samplers.sample(
            KEYS, DENOISE, lambda *args: STEP(*args), S, X, ts=jnp.arange(10)
        ),
        X.shape,
    ),
    "a loss of data of any scale": (
        lambda: losses.training_loss(KEY, model, S, V, 200 + X, T).loss,
        (3,),
    ),
    "dropout of NNX, switched off": (
        lambda: evaluated(Dropping())(X, T).x_0,
        X.shape,
    ),
    "scales for each image": (
        lambda: guidance.classifier_free(labeled, LABEL, 0, jnp.ones(3))(X, T).x_0,
        X.shape,
    ),
    "null labels for each image": (
        lambda: guidance.classifier_free(labeled, LABEL, LABEL, 2)(X, T).x_0,
        X.shape,
    ),
    "a clip to one side": (
        lambda: diffusion.clip_x_0(DENOISE, -np.inf, 1)(X, T).x_0,
        X.shape,
    ),
    "integers as numbers": (
        lambda: schedules.sigmoid_alpha_bar_betas(9, start=-3, end=3, tau=1),
        (9,),
    ),
    "counts of NumPy": (
        lambda: schedules.cosine_betas(np.int64(9)),
        (9,),
    ),
    "a schedule without signal in the end": (
        lambda: schedules.make_schedule(schedules.jsd_betas(9)).betas,
        (9,),
    ),
    "a chain of one step": (
        lambda: schedules.make_schedule(BETAS, keep=[9]).betas,
        (1,),
    ),
    "a mask of bools": (
        lambda: samplers.inpaint(STEP, X, X[0] > 0)(KEYS, DENOISE, S, STATE, T).x,
        X.shape,
    ),
    "a check that reads no device": (lambda: no_transfers(), (3,)),
    "features of 8 bits": (lambda: metrics.moments(IMAGES.reshape(3, -1)).mean, (32,)),
}


def no_transfers():
    """A loss, jitted, where reading anything from the device is forbidden."""
    loss = jax.jit(lambda x, t: loss_of(x, t))
    with jax.transfer_guard_device_to_host("disallow"):
        return loss(X, T)


CASES = (
    *(process_cases, step_cases, number_cases, other_cases),
    *(output_cases, network_cases, guidance_cases, dropout_cases),
)


def outcome(call):
    """The name of the error that a call raises, and its words; or twice None."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None, None


def main():
    warnings.simplefilter("error")
    wrong = {}
    for cases in CASES:
        for name, (begins, call) in cases():
            assert name not in wrong, name
            wrong[name] = [begins, *outcome(call)]
    right = {}
    for name, (call, shape) in RIGHT.items():
        try:
            right[name] = [list(shape), list(np.shape(call()))]
        except Exception as error:
            right[name] = [list(shape), f"{type(error).__name__}: {error}"]
    print(json.dumps({"wrong": wrong, "right": right}))


if __name__ == "__main__":
    main()
