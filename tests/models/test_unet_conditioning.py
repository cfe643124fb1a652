"""Vectors and tokens that say what is wanted, as inputs of the U-Net."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_model_protocol import jit
from support.oracles import F32_SUM, normal

from jax_diffusion import diffusion, guidance, schedules
from jax_diffusion.models import bind, example_inputs, init_params, traits
from jax_diffusion.models.unet import UNet

PLAIN = UNet(
    channels=8,
    num_groups=4,
    multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
)
MODEL = PLAIN.clone(cond_dim=3, token_dim=5)
X, T = normal(1, 2, 8, 8, 3), jnp.array([999.0, 3.0])
COND, TOKENS = normal(2, 2, 3), normal(3, 2, 4, 5)
MASK = jnp.array([[True, True, False, True], [False, True, True, False]])
NULL = traits(MODEL).null


@functools.cache
def params():
    """Weights of which none is zero, as it would be at the start."""
    drawn = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0), (8, 8, 3)))
    leaves, tree = jax.tree.flatten(drawn)
    return jax.tree.unflatten(tree, [0.3 * normal(4, *leaf.shape) for leaf in leaves])


@jit
def network(params, x, t, told):
    return bind(MODEL, params, None, **told)(x, t)


def model_fn(x, t, cond, tokens, tokens_mask):
    told = dict(cond=cond, tokens=tokens, tokens_mask=tokens_mask)
    return network(params(), x, t, told)


def test_masked_tokens_have_no_influence_bit_for_bit_even_if_nan():
    y = model_fn(X, T, COND, TOKENS, MASK)
    others = jnp.where(MASK[..., None], TOKENS, jnp.nan)
    np.testing.assert_array_equal(model_fn(X, T, COND, others, MASK), y)
    assert np.abs(model_fn(X, T, COND, TOKENS, ~MASK) - y).max() > 0.01


def test_all_tokens_masked_is_the_null_whatever_they_are():
    none = jnp.zeros_like(MASK)
    null = model_fn(X, T, COND, jnp.zeros_like(TOKENS), none)
    np.testing.assert_array_equal(model_fn(X, T, COND, 1e30 * TOKENS, none), null)


@pytest.mark.slow
def test_tokens_are_a_set_and_padding_them_changes_nothing():
    y = model_fn(X, T, COND, TOKENS, MASK)
    order = jnp.array([2, 0, 3, 1])
    swapped = model_fn(X, T, COND, TOKENS[:, order], MASK[:, order])
    np.testing.assert_allclose(swapped, y, **F32_SUM)
    told = dict(cond=COND, tokens=TOKENS[:, :3])  # no mask: all count
    few = network(params(), X, T, told)
    first = jnp.broadcast_to(jnp.arange(4) < 3, MASK.shape)
    np.testing.assert_allclose(model_fn(X, T, COND, TOKENS, first), few, **F32_SUM)


@pytest.mark.slow
def test_vectors_matter_and_masked_nan_tokens_leave_gradients_finite():
    y = model_fn(X, T, COND, TOKENS, MASK)
    assert np.abs(model_fn(X, T, -COND, TOKENS, MASK) - y).max() > 0.01
    tokens = jnp.where(MASK[..., None], TOKENS, jnp.nan)

    def loss(cond, tokens):
        told = dict(cond=cond, tokens=tokens, tokens_mask=MASK)
        return jnp.sum(bind(MODEL, params(), None, **told)(X, T) ** 2)

    params()  # outside of the trace

    of_cond, of_tokens = jit(jax.grad(loss, (0, 1)))(COND, tokens)
    assert np.isfinite(of_cond).all() and (of_cond != 0).all()
    assert ((of_tokens != 0) == MASK[..., None]).all()


@pytest.mark.slow
def test_conditioning_adds_parameters_and_leaves_the_others_as_they_are():

    def new(model):  # array by array: together they compile for long
        inputs = jax.eval_shape(lambda: example_inputs(model, (8, 8, 3)))
        return model.lazy_init(jax.random.key(7), **inputs)["params"]

    plain, more = new(PLAIN), new(MODEL)
    added = {name for name in more if name not in plain}
    assert added == {"cond"} | {name for name in more if "cross_attention" in name}
    shared = {name: more[name] for name in plain}
    assert jax.tree.all(jax.tree.map(np.array_equal, plain, shared))


@pytest.mark.slow
def test_guidance_of_1_is_the_conditional_and_of_0_the_unconditional_prediction():
    schedule = schedules.make_schedule(schedules.cosine_betas(10))
    denoise_fn = diffusion.denoiser(model_fn, schedule, diffusion.Objective("v"))
    told = dict(cond=COND, tokens=TOKENS, tokens_mask=MASK)
    none = dict(cond=0 * COND, tokens=0 * TOKENS, tokens_mask=MASK & False)
    t = jnp.array([9, 2])
    for scale, alone in ((1.0, told), (0.0, none)):
        guided = guidance.classifier_free(denoise_fn, told, NULL, scale)
        exact = denoise_fn(X, t, **alone).x_0
        np.testing.assert_allclose(guided(X, t).x_0, exact, **F32_SUM)


@pytest.mark.parametrize(
    ("model", "given", "told"),
    [
        (MODEL, dict(cond=COND), "tokens must be given to a network with token_dim"),
        (MODEL, dict(tokens=TOKENS), "cond must be given to a network with cond_dim"),
        (PLAIN, dict(cond=COND), r"cond must not be given to a network with cond_dim"),
        (
            MODEL,
            dict(cond=COND[:, :2], tokens=TOKENS),
            r"cond must be a float array \[2, 3\], got float32 \[2, 2\]\.",
        ),
        (
            MODEL,
            dict(cond=COND, tokens=TOKENS[:, 0]),
            r"tokens must be a float array \[2, n, 5\], got float32 \[2, 5\]\.",
        ),
        (
            MODEL,
            dict(cond=COND, tokens=TOKENS, tokens_mask=MASK[:, :2]),
            r"tokens_mask must be a bool array \[2, 4\], got bool \[2, 2\]\.",
        ),
        (PLAIN, dict(tokens_mask=MASK), "tokens_mask needs tokens, got bool"),
    ],
)
def test_conditioning_of_another_shape_is_refused(model, given, told):
    with pytest.raises(ValueError, match=told):
        jax.eval_shape(bind(model, {}, None, **given), X, T)


@pytest.mark.parametrize("field", ["cond_dim", "token_dim"])
def test_sizes_of_conditioning_are_integers_from_0(field):
    with pytest.raises(ValueError, match=f"^{field} must be an integer"):
        PLAIN.clone(**{field: -1})
