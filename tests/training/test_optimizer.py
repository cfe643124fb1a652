"""Optimizers: learning rate by step, clipping, any function of optax by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.oracles import F32

from jax_diffusion import training

PARAMS = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.zeros(2)}
GRADS = {"w": jnp.array([[0.3, -0.1], [0.2, 0.4]]), "b": jnp.ones(2)}


def make(**options):
    return training.make_optimizer(**{"lr": 1.0, "total_steps": 10, **options})


def after(tx, updates=3):
    """The parameters after some updates by the same gradient."""
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(updates):
        change, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, change)
    return params


def assert_same(a, b):
    for one, other in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("decay", "late"), [("constant", 1.0), ("linear", 0.25), ("cosine", 0.1464466)]
)
def test_learning_rate_warms_up_and_decays(decay, late):
    _, lr = make(total_steps=110, warmup_steps=10, decay=decay)
    assert float(lr(0)) == 0 and float(lr(5)) == 0.5
    np.testing.assert_allclose(lr(10 + 75), late, **F32)


def test_clipping_bounds_the_gradient_before_adam_sees_it():
    tx, _ = make(grad_clip=1.0)
    params = {"w": jnp.zeros(2)}
    _, state = tx.update({"w": jnp.array([30.0, 40.0])}, tx.init(params), params)
    first_moment = state[1][0].mu["w"]
    np.testing.assert_allclose(first_moment, [0.06, 0.08], **F32)  # 0.1 * unit gradient


def test_the_default_optimizer_is_optax_adamw_with_the_same_arguments():
    tx, lr_fn = make(b1=0.8, epsilon=1e-6, weight_decay=0.1, decay="linear")
    same = optax.adamw(lr_fn, b1=0.8, b2=0.999, eps=1e-6, weight_decay=0.1)
    assert_same(after(tx), after(same))


def test_an_optimizer_of_optax_by_name_warms_up_decays_and_clips():
    options = dict(warmup_steps=1, decay="cosine", grad_clip=0.5)
    tx, lr_fn = make(name="optax.contrib:muon", beta=0.9, **options)
    muon = optax.contrib.muon(lr_fn, beta=0.9)
    assert_same(after(tx), after(optax.chain(optax.clip_by_global_norm(0.5), muon)))
    _, decayed = make(**options)
    assert [float(lr_fn(n)) for n in range(9)] == [float(decayed(n)) for n in range(9)]


def test_lr_and_learning_rate_mean_the_same():
    tx, lr_fn = make(lr=None, learning_rate=0.5)
    assert float(lr_fn(3)) == 0.5
    assert_same(after(tx), after(make(lr=0.5)[0]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(decay="step"), "decay must be one of"),
        (dict(lr=0.0), "lr must be a number > 0, got 0.0"),
        (
            dict(lr=None, learning_rate=-1.0),
            "learning_rate must be a number > 0, got -1.0",
        ),
        (dict(warmup_steps=-1), "warmup_steps must be an integer in .*, got -1"),
        (dict(learning_rate=0.1), "lr or learning_rate .* got 1.0 and 0.1"),
        (dict(lr=None), "lr or learning_rate .* got None and None"),
        (dict(lr=float("nan")), "lr must be a number > 0, got nan"),
        (dict(grad_clip=-1.0), "grad_clip must be a number > 0, got -1.0"),
        (dict(b1=2.0), r"b1 must be a number in \[0, 1\), got 2.0"),
        (dict(b2=1.0), r"b2 must be a number in \[0, 1\), got 1.0"),
        (dict(epsilon=0.0), "epsilon must be a number > 0, got 0.0"),
        (dict(weight_decay=-0.1), "weight_decay must be a number >= 0, got -0.1"),
        (dict(weight_decay="x"), "weight_decay must be a number, got 'x'"),
        (dict(name="optax:adam", b1="x"), "b1 must be .*, got 'x'"),
        (dict(name="adamv"), "optimizer must be one of .*did you mean 'adamw'"),
        (dict(name="optax:adamv"), "importable .* got 'optax:adamv'"),
        (dict(weight_decai=1), "no argument 'weight_decai'; did you mean 'weight_dec"),
        (dict(name="optax:adam", b1=2.0), r"b1 must be a number in \[0, 1\), got 2.0"),
        (dict(name="optax:adam", b2=-0.1), r"b2 must be .*, got -0.1"),
        (dict(name="optax:sgd", momentum=2.0), r"momentum must be .*, got 2.0"),
        (dict(name="optax:lbfgs"), "name must be an optimizer .*'optax:lbfgs'"),
        (dict(name="optax:rprop"), "name must be an optimizer .*'optax:rprop'"),
        (
            dict(name="optax.contrib:sophia"),
            "name must be an optimizer .*'optax.contrib:sophia'",
        ),
        (
            dict(name="support.optimizers:broken"),
            "name must be an optimizer .*: KeyError: 'x'",
        ),
        (dict(name="math:sqrt"), "name must be .*'math:sqrt' has no argument"),
        (dict(name="optax:lion", epsilon=1), "'optax:lion' has no argument 'epsilon'"),
        (dict(name="optax:clip"), "'optax:clip' has no argument 'learning_rate'"),
        (
            dict(name="support.optimizers:none"),
            "name must be an optimizer .*: it returns {}",
        ),
        (
            dict(name="support.optimizers:needy"),
            "must be given its arguments, got missing .* 'momentum'",
        ),
    ],
    ids=str,
)
def test_bad_optimizer_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words) as error:
        make(**options)
    assert str(error.value).endswith((".", "?")) and "\n" not in str(error.value)
