"""Functions of one's own that do not fit: a sentence names the field of the config."""

import re
import textwrap

import jax
import pytest
from support.tiny import get_config

from jax_diffusion import config as configs
from jax_diffusion import train
from jax_diffusion.training import setup

OWN = """
import flax.linen as nn
import numpy as np

class Swapped(nn.Module):
    out_channels: int = 1

    @nn.compact
    def __call__(self, t, images, train=False):
        return images

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
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_functions.py").write_text(textwrap.dedent(OWN))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_functions", raising=False)
    return "own_functions"


def changed(group, fields):
    config = get_config()
    config.model = dict(name="support.tiny:TinyNet", channels=8)
    old = config[group].to_dict() if group in ("sampling", "optimizer") else {}
    if group == "optimizer":
        old = dict(lr=1e-3)
    config[group] = {**old, **fields}
    return configs.complete(config)


def built(config):
    made = setup.make_setup(config)
    shapes = jax.eval_shape(made.init)
    batch = made.batches.batch(0)
    jax.eval_shape(made.train_step, made.key, shapes, batch)


BATCH = dict(batch_size=16)
CASES = [
    ("schedule", "boom", dict(num_steps=10), "RuntimeError: boom"),
    ("schedule", "value", dict(num_steps=10), "ValueError: no field"),
    ("schedule", "text", dict(num_steps=10), "betas must be"),
    ("timesteps", "boom", {}, "RuntimeError: boom"),
    ("timesteps", "number", {}, "a TimestepSampler, .* which makes 3"),
    ("model", "boom", {}, "RuntimeError: boom"),
    ("model", "number", {}, "which makes 3"),
    ("model", "Swapped", {}, "TypeError"),
    ("model", "Fails", {}, "KeyError: 'train'"),
    ("model", "Narrow", {}, "TypeError: .*out_channels"),
    ("data", "boom", BATCH, "RuntimeError: boom"),
    ("data", "value", BATCH, "ValueError: no field"),
    ("data", "number", BATCH, "returns a int"),
    ("data", "odd", BATCH, "own_functions:odd"),
    ("optimizer", "boom", {}, "RuntimeError: boom"),
    ("optimizer", "number", {}, "returns int"),
    ("sampling", "boom", {}, "RuntimeError: boom"),
    ("sampling", "text", {}, "own_functions:text"),
]


@pytest.mark.parametrize(("group", "function", "fields", "words"), CASES)
def test_a_function_of_ones_own_that_does_not_fit_is_named(
    group, function, fields, words, own
):
    field = "spacing" if group == "sampling" else "name"
    where = f"config.{group}.{field} must be "
    with pytest.raises(ValueError, match=re.escape(where)) as error:
        built(changed(group, {field: f"{own}:{function}", **fields}))
    sentence = str(error.value)
    assert re.search(words, sentence) and f"{own}:{function}" in sentence
    assert sentence.startswith(where) and "\n" not in sentence
    if function in ("boom", "value"):
        cause = error.value.__cause__
        while cause.__cause__ is not None:
            cause = cause.__cause__
        assert "boom" in str(cause) or "no field" in str(cause)


@pytest.mark.parametrize(
    ("group", "fields", "sentence"),
    [
        (
            "schedule",
            dict(name="cosine", num_steps=9, offset=1e30),
            "config.schedule's ",
        ),
        (
            "schedule",
            dict(name="sigmoid_alpha_bar", num_steps=9, tau=1e9, start=-1e-9, end=0.0),
            "config.schedule's ",
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
        train.train(config, tmp_path / "run")
