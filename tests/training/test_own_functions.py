"""Functions of one's own that do not fit: a sentence names the field of the config."""

import re
import sys

import jax
import numpy as np
import pytest
from support.programs import sample
from support.tiny import get_config
from support.tiny_runs import make_run

from jax_diffusion import config as configs
from jax_diffusion.evaluation import during_training, evaluate
from jax_diffusion.pipeline import SamplingOptions, load_run, sample_images
from jax_diffusion.schedules import betas
from jax_diffusion.train import train
from jax_diffusion.training import setup

OWN = """
import flax.linen as nn
import jax.numpy as jnp

from jax_diffusion.evaluation import Metric
from jax_diffusion.pipeline.tasks import Task
from jax_diffusion.timesteps import TimestepSampler, uniform

class Swapped(nn.Module):
    out_channels: int = 1

    @nn.compact
    def __call__(self, t, images, train=False):
        return images

class Renamed(nn.Module):
    out_channels: int = 1
    num_classes: int = 10
    low_res: bool = True

    @nn.compact
    def __call__(self, images, sigma, kind, *, low_res, train=False):
        time = nn.Dense(1)(sigma[:, None])[:, None, None]
        small = low_res.mean((1, 2), keepdims=True)
        return nn.Dense(self.out_channels)(images + small + time)

class Fails(nn.Module):
    out_channels: int = 1

    @nn.compact
    def __call__(self, x, timesteps, *, train=False):
        if train:
            raise KeyError("train")
        return nn.Dense(self.out_channels)(x)

class Narrow(nn.Module):
    @nn.compact
    def __call__(self, x, timesteps, *, train=False):
        return x

def number(*args, **kwargs):
    return 3

def text(*args, **kwargs):
    return "abc"

def boom(*args, **kwargs):
    raise RuntimeError("boom")

def value(*args, **kwargs):
    raise ValueError("no field begins this")

def odd(split, path, image_size):
    return {}, object()

def undrawn(num_steps):
    return TimestepSampler(lambda: (), boom, lambda state, t, loss: state)

def halves(num_steps):
    def sample(key, state, batch_size):
        return jnp.full(batch_size, 0.5), jnp.ones(batch_size)
    return TimestepSampler(lambda: (), sample, lambda state, t, loss: state)

def forgetful(num_steps):
    return uniform(num_steps)._replace(init=lambda: 0, update=lambda state, t, loss: ())

def still(keys, denoise_fn, schedule, state, t):
    return state.x

def wide(keys, denoise_fn, schedule, state, t):
    return state._replace(x=state.x[..., :1, :])

def hasty(keys, denoise_fn):
    pass

def hasty3(samples, reference, more):
    pass

def listed(samples, reference):
    return [1.0]

row = Metric("pixels", number, needs_reference_features=True)

def gray(context, options):
    return context.x_T(context.keys)[None]

def flat(context, options):
    return gray(context, options)[0]

def none(context, options):
    return gray(context, options)[:0]

def whole_numbers(context, options):
    return gray(context, options).astype(int)

task = Task(boom)
uncallable = Task(3)
pair = (1, 2)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_functions.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_functions"
    sys.modules.pop("own_functions", None)


def changed(group, fields):
    config = get_config()
    config.model = dict(name="support.tiny:TinyNet", channels=8)
    old = dict(sampling=config.sampling.to_dict(), optimizer=dict(lr=1e-3))
    config[group] = {**old.get(group, {}), **fields}
    return configs.complete(config)


def built(config):
    made = setup.make_setup(config)
    shapes = jax.eval_shape(made.init)
    batch = made.batches.batch(0)
    jax.eval_shape(made.train_step, made.key, shapes, batch)


BATCH = dict(batch_size=16)
STEPS = dict(num_steps=10)
CASES = [
    ("schedule", "own:boom", STEPS, "RuntimeError: boom"),
    ("schedule", "own:value", STEPS, "no field begins this"),
    ("schedule", "own:text", STEPS, "betas must be a vector"),
    ("timesteps", "own:boom", {}, "RuntimeError: boom"),
    ("timesteps", "own:number", {}, "makes 3, without init, sample, update"),
    ("timesteps", "own:undrawn", {}, "RuntimeError: boom"),
    ("timesteps", "own:halves", {}, "t must be .*float32"),
    ("timesteps", "own:forgetful", {}, "update must return a state like"),
    ("timesteps", "math:sqrt", {}, "TypeError: "),
    ("timesteps", "builtins:max", {}, "tells which arguments it takes"),
    ("model", "own:boom", {}, "RuntimeError: boom"),
    ("model", "own:number", {}, "makes 3, without init and apply"),
    ("model", "own:Swapped", {}, "got float32 .16."),
    ("model", "own:Fails", {}, "KeyError: 'train'"),
    ("model", "own:Narrow", {}, "TypeError: .*out_channels"),
    ("data", "own:boom", BATCH, "RuntimeError: boom"),
    ("data", "own:value", BATCH, "no field begins this"),
    ("data", "own:number", BATCH, "it returns 3"),
    ("data", "own:odd", BATCH, "images must be uint8"),
    ("data", "builtins:max", BATCH, "no signature found"),
    ("optimizer", "own:boom", {}, "RuntimeError: boom"),
    ("optimizer", "own:number", {}, "it returns 3"),
    ("optimizer", "builtins:max", {}, "tells which arguments it takes"),
    ("spacing", "own:boom", {}, "RuntimeError: boom"),
    ("spacing", "own:text", {}, "got 'abc'"),
    ("spacing", "math:sqrt", {}, "TypeError: "),
    ("sampler", "own:boom", {}, "RuntimeError: boom"),
    ("sampler", "own:value", {}, "no field begins this"),
    ("sampler", "own:still", {}, "state like the one .* got float32"),
    ("sampler", "own:wide", {}, "with x float32"),
]


@pytest.mark.parametrize(("group", "function", "fields", "words"), CASES)
def test_a_function_of_ones_own_that_does_not_fit_is_named(
    group, function, fields, words, own
):
    function, field = function.replace("own", own), "name"
    if group in ("spacing", "sampler"):
        group, field = "sampling", group
    where = f"config.{group}.{field} must be "
    with pytest.raises(ValueError, match=re.escape(where)) as error:
        built(changed(group, {field: function, **fields}))
    sentence = str(error.value)
    assert re.search(words, sentence) and function.partition(":")[2] in sentence
    assert sentence.startswith(where) and "\n" not in sentence
    if function.endswith((":boom", ":value")):
        cause = error.value
        while cause.__cause__ is not None:
            cause = cause.__cause__
        assert words.endswith(str(cause))


def test_a_network_of_ones_own_may_name_what_it_is_given_as_it_likes(own):
    fields = {"name": f"{own}:Renamed"}
    config = changed("model", fields)
    config.model, config.low_res_size = fields, 4
    built(config)


def test_a_field_that_a_network_of_ones_own_does_not_have_is_named_with_it(own):
    words = f"^config.model of '{own}:Narrow' has no field 'channels'"
    config = changed("model", {})
    config.model = dict(name=f"{own}:Narrow", channels=8)
    with pytest.raises(ValueError, match=words):
        configs.check_config(config)


def test_a_sampler_of_ones_own_with_other_arguments_is_refused(own):
    with pytest.raises(ValueError, match=r"sampler must be a function of .*got one of"):
        SamplingOptions(sampler=f"{own}:hasty")


TASK_CASES = [
    ("boom", "RuntimeError: boom"),
    ("value", "no field begins this"),
    ("task", "RuntimeError: boom"),
    ("number", "it must return frames, float \\[k, 1, 8, 8, 1\\], got 3"),
    ("text", "got 'abc'"),
    ("flat", "got float32 \\[1, 8, 8, 1\\]"),
    ("none", "got float32 \\[0, 1, 8, 8, 1\\]"),
    ("whole_numbers", "got int32 "),
    ("hasty3", "TypeError: missing a required argument: 'more'"),
    ("undrawn", "TypeError: too many positional arguments"),
    ("pair", "got \\(1, 2\\)"),
    ("uncallable", "got 3"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    shape, model = (8, 8, 1), dict(name="support.networks:Tiny")
    workdir = tmp_path_factory.mktemp("run") / "run"
    return load_run(make_run(workdir, shape=shape, model=model))


@pytest.mark.parametrize(("function", "words"), TASK_CASES)
def test_a_task_of_ones_own_that_does_not_fit_is_named_and_nothing_is_written(
    function, words, run, own, tmp_path, monkeypatch
):
    rule = r"task must be a Task or a function \(context, options\) -> frames, got "
    words = f"{rule}'{own}:{function}': .*{words}"
    with pytest.raises(ValueError, match=f"^{words}"):
        sample_images(run, n=2, steps=1, task=f"{own}:{function}")
    told = ["sample", "--workdir", str(run.workdir), "--task", f"{own}:{function}"]
    for out in ("new", "new.npz"):
        told_out = [*told, "--steps", "1", "--out", str(tmp_path / out)]
        monkeypatch.setattr("sys.argv", told_out)
        with pytest.raises(ValueError, match=f"^--{words}"):
            sample.main()
    assert not [*tmp_path.glob("new*")]


def test_a_task_of_ones_own_draws(run, own):
    drawn = sample_images(run, n=2, steps=1, task=f"{own}:gray")
    assert drawn.shape == (2, 8, 8, 1) and np.ptp(drawn) > 100


METRIC_CASES = [
    ("boom", "RuntimeError: boom"),
    ("value", "no field begins this"),
    ("text", "it returns 'abc'"),
    ("listed", r"it returns \[1.0\]"),
    ("row", "it computes 3 instead of scores"),
]


@pytest.mark.parametrize(("function", "words"), METRIC_CASES)
def test_a_metric_of_ones_own_that_does_not_fit_is_named(function, words, own):
    images = np.random.default_rng(0).integers(0, 255, (4, 4, 4, 1), np.uint8)
    with pytest.raises(ValueError, match=words) as error:
        evaluate(images, reference=images, metrics=f"{own}:{function}")
    rule = "metrics must be a Metric or a function"
    assert rule in str(error.value) and f"{own}:{function}" in str(error.value)


def test_a_metric_of_ones_own_with_other_arguments_is_named_before_training(own):
    fields = dict(n=4, reference=4, bpd_images=0, inception="")
    words = "metric must name a function of two .*own_functions:hasty3"
    with pytest.raises(ValueError, match=words):
        during_training.check_fields(f"{own}:hasty3", **fields)


@pytest.mark.parametrize(
    ("group", "fields", "sentence"),
    [
        (
            "schedule",
            dict(name="cosine", num_steps=9, offset=1e30),
            "config.schedule must describe a noise schedule, got one where ",
        ),
        (
            "schedule",
            dict(name="sigmoid_alpha_bar", num_steps=9, tau=1e9, start=-1e-9, end=0.0),
            "config.schedule must describe a noise schedule, got one where ",
        ),
        (
            "schedule",
            dict(name="cosine", num_steps=9, min_beta=0.9, max_beta=0.1),
            "config.schedule.min_beta must be at most max_beta = 0.1, got 0.9.",
        ),
        ("schedule", dict(name="jsd", num_steps=9), "config.objective.mean_type must"),
        (
            "data",
            dict(name="digits", path="x", **BATCH),
            "config.data.path must be left",
        ),
        ("data", dict(name="synthetic", path="x", **BATCH), "config.data.path must be"),
        ("data", dict(name="npz", **BATCH), "config.data.path must be a .npz"),
        (
            "model",
            dict(name="unet", channels=8, num_groups=4, dtype="float64"),
            "config.model.dtype must be of at most 32 bits",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_its_field(group, fields, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        built(changed(group, fields))
    assert str(error.value).startswith(sentence)


def test_init_from_of_a_config_is_named_as_such(tmp_path):
    config = get_config()
    config.init_from = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^config\.init_from must be "):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    "fields",
    [
        dict(start=-1e-9, end=0.0, tau=1e9),
        dict(start=-1e308, end=1e308),
        dict(tau=1e-308),
    ],
)
def test_extremes_of_a_sigmoid_raise_no_warning(fields):
    try:  # every warning is an error in tests
        made = betas.sigmoid_alpha_bar_betas(9, **fields)
    except ValueError as error:
        assert "alpha_bar_fn must return" in str(error)
    else:
        assert made.shape == (9,)
