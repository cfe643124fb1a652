"""The U-Net: parity with the official code, its sizes, and what must hold of any.

`support.golden_unets` says where the official numbers come from.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from support.golden_unets import (
    NETWORKS,
    floors,
    golden,
    golden_below,
    leaves_of,
    our_params,
    param_shapes,
)
from support.oracles import F32, F32_SUM, assert_mean, assert_moments, normal

from jax_diffusion.interop import layouts as weights
from jax_diffusion.models import cpu_convs, unet
from jax_diffusion.models.layers import timestep_embedding
from jax_diffusion.models.unet import Attention, ResBlock, UNet

FLOORS = 4  # their rounding error and ours, and twice that for another order of sums

# LLVM's optimization is most of the time that a network takes here, and gains nothing.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Nothing of improved_a is in no other network: it need not be computed each time.
COMPUTED = [
    pytest.param(name, marks=pytest.mark.slow) if name == "improved_a" else name
    for name in NETWORKS
]
networks = pytest.mark.parametrize("network", COMPUTED)


@functools.cache
def computed(network):
    """What golden/ holds of a network, computed by ours, by the names there."""
    arrays, (_, model) = golden(network), NETWORKS[network]
    label = jnp.asarray(arrays["y"]) if model.num_classes else None
    cotangent = arrays.get("run0/grad/g", np.zeros(arrays["run0/output"].shape))

    @jit  # all arrays are arguments, so that equal networks are compiled once
    def grads_and_output(params, x, t, label, cotangent):
        def loss(params, x):
            output, seen = model.apply(
                {"params": params}, x, t, label, capture_intermediates=True
            )
            return jnp.sum(output * cotangent), (output, seen["intermediates"])

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    found = {}
    with jax.default_matmul_precision("highest"):
        for run in ("run0", "run1"):
            x, t = (jnp.asarray(arrays[f"{run}/{name}"]) for name in "xt")
            grads, (output, seen) = grads_and_output(
                our_params(network), x, t, label, cotangent
            )
            found |= {f"{run}/output": output, f"{run}/grad/x": grads[1]}
            modules = (name for name in seen if name != "__call__")
            found |= {f"{run}/{name}": seen[name]["__call__"][0] for name in modules}
            by_name = weights.to_torch(grads[0], leaves_of(network))
            found |= {f"{run}/grad/params/{k}": v for k, v in by_name.items()}
    return found


# Modules whose output golden/ holds, by the names of each layout, and ours. Some of
# theirs are sequences of ours: the last of them.
HOOKS = {
    "time_embed": "time_1",
    "input_blocks.0": "conv_in",
    "input_blocks.1": "down_0_0",
    "input_blocks.2": "down_0_halve",
    "input_blocks.3": "down_1_0_attention",
    "middle_block.0": "mid_0",
    "middle_block.1": "mid_attention",
    "middle_block": "mid_1",
    "output_blocks.0": "up_1_0_attention",
    "output_blocks.1": "up_1_double",
    "output_blocks.2": "up_0_0",
    "output_blocks.3": "up_0_1",
    "temb.dense.1": "time_1",
    "conv_in": "conv_in",
    "down.0.downsample": "down_0_halve",
    "mid.block_1": "mid_0",
    "mid.attn_1": "mid_attention",
    "mid.block_2": "mid_1",
    "up.1.upsample": "up_1_double",
    "norm_out": "norm_out",
    "time_embedding": "time_1",
    "down_blocks.0.downsamplers.0": "down_0_halve",
    "mid_block.attentions.0": "mid_attention",
    "mid_block": "mid_1",
}


def assert_near(ours, official, floor):
    tolerance = FLOORS * floor[0] + 1e-6 * np.abs(official).max()
    np.testing.assert_allclose(ours, official, rtol=0, atol=tolerance)


# Parity with the official networks


@networks
def test_every_official_parameter_has_its_place_and_comes_back_bit_for_bit(network):
    official = golden_below(network, "params/")
    ours = weights.from_torch(official, leaves_of(network))
    shapes = jax.tree.map(jnp.shape, param_shapes(NETWORKS[network][1], (16, 16, 3)))
    assert jax.tree.map(jnp.shape, ours) == shapes
    back = weights.to_torch(ours, leaves_of(network))
    assert back.keys() == official.keys()
    assert all(np.array_equal(back[name], official[name]) for name in official)


@networks
@pytest.mark.parametrize("key", ["run0/output", "run1/output"])
def test_output_is_the_official_one(network, key):
    assert_near(computed(network)[key], golden(network)[key], floors(network)[key])


@networks
def test_what_comes_out_of_modules_is_official_too(network):
    hooks = golden_below(network, "run0/hooks/")
    hooks.pop("time_proj", None)  # the sinusoids, which are no module of ours
    assert hooks
    for name, official in hooks.items():
        if HOOKS[name] == "norm_out":  # ours has the SiLU inside
            official = official / (1 + np.exp(-official))
        ours = computed(network)[f"run0/{HOOKS[name]}"]
        assert_near(ours, official, floors(network)[f"run0/hooks/{name}"])


@pytest.mark.parametrize("network", COMPUTED[:4])
def test_gradients_are_the_official_ones(network):
    found, grads = computed(network), golden_below(network, "run0/grad/")
    del grads["g"]
    assert "x" in grads
    for name, official in grads.items():
        key = f"run0/grad/{name}"
        assert_near(found[key], official, floors(network)[key])


@pytest.mark.parametrize("dim", [32, 33, 128])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("improved", {}),
        ("ermongroup", dict(order="sin_cos", endpoint=True)),
        ("diffusers_flip0_shift1", dict(order="sin_cos", endpoint=True)),
        ("diffusers_flip1_shift0", {}),
    ],
)
def test_timestep_embedding_is_the_official_one(name, options, dim):
    t = golden("time_embedding")["t"]  # 0 to 3999, and fractions
    official = golden("time_embedding")[f"{name}/dim{dim}_exact_f64"]
    error = np.abs(timestep_embedding(jnp.asarray(t), dim, **options) - official)
    # Two roundings of an angle of up to t radians, and that of a wave.
    assert np.all(error <= 2 * t[:, None] * 2.0**-24 + F32["atol"])


# Sizes


def test_attention_follows_each_block_of_the_heights_asked_for_and_the_middle():
    model = UNet(multipliers=(1, 1, 1), num_res_blocks=1, attention_resolutions=(8,))
    names = [n for n in param_shapes(model, (16, 32, 3)) if "attention" in n]
    assert set(names) == {
        "down_1_0_attention",
        "mid_attention",
        "up_1_0_attention",
        "up_1_1_attention",
    }


# New networks

# The smallest network that has all kinds of blocks; it takes images of 8 pixels.
SMALL = dict(
    channels=8,
    num_groups=4,
    multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
)
X = jax.random.normal(jax.random.key(1), (2, 8, 8, 8))
IMAGES = X[..., :3]
EMB = jax.random.normal(jax.random.key(2), (2, 16))
T = jnp.array([999.0, 1000.0])

styles = pytest.mark.parametrize("style", ["openai", "ho"])
# Glorot scaled by 1e-10 draws weights below 1e-5; sums of a hundred stay below this.
NEARLY_ZERO = {"openai": 0.0, "ho": 1e-4}
# Layers of each kind: drawing the numbers of all of them takes long to compile.
DRAWN = "time_0", "conv_in", "down_0_halve", "down_1_0", "mid_attention", "conv_out"


@functools.cache
def new_params(style):
    model = UNet(**SMALL, init_style=style, num_classes=500)

    @jit
    def draw(key):
        params = model.init(key, IMAGES, T, jnp.zeros(2, jnp.int32))["params"]
        return {name: params[name] for name in (*DRAWN, "label")}

    return jax.device_get(draw(jax.random.key(0)))


@styles
def test_new_network_outputs_zero_whatever_its_inside(style):
    params = random_params() | {"conv_out": new_params(style)["conv_out"]}
    output = apply_small(params, IMAGES, T)
    np.testing.assert_allclose(output, 0, atol=NEARLY_ZERO[style])


@styles
def test_new_res_block_is_the_identity(style):
    block = ResBlock(channels=8, num_groups=4, init_style=style)
    init = jit(block.init_with_output, static_argnums=3)
    y, _ = init(jax.random.key(0), X, EMB, False)
    np.testing.assert_allclose(y, X, rtol=0, atol=NEARLY_ZERO[style])


@styles
def test_new_attention_is_the_identity(style):
    block = Attention(num_groups=4, num_heads=2, init_style=style)
    y, _ = jit(block.init_with_output)(jax.random.key(0), X)
    np.testing.assert_allclose(y, X, rtol=0, atol=NEARLY_ZERO[style])


def kernels(params):
    """Those that do not start at zero, and the biases beside them."""
    params = flatten_dict(params)
    for path, kernel in params.items():
        if path[-1] == "kernel" and path[-2] not in ("conv_out", "out"):
            yield path[-2], kernel, params[*path[:-1], "bias"]


def test_torch_style_draws_uniformly_up_to_the_root_of_one_over_fan_in():
    biases = []
    for _, kernel, bias in kernels(new_params("openai")):
        root = kernel[..., 0].size ** 0.5
        assert max(np.abs(kernel).max(), np.abs(bias).max()) * root <= 1 + 1e-6
        assert_moments(kernel.ravel() * root, 0, 1 / 3)
        biases.append(bias * root)
    assert_moments(np.concatenate(biases), 0, 1 / 3)


def test_ddpm_style_has_the_variance_of_glorot_each_of_q_k_and_v_for_itself():
    for name, kernel, bias in kernels(new_params("ho")):
        parts = np.split(kernel, 3, axis=-1) if name == "qkv" else [kernel]
        for part in parts:
            fans = part[..., 0].size + part[..., 0, :].size
            assert_moments(part.ravel(), 0, 2 / fans)
        assert not bias.any()


@styles
def test_label_table_starts_standard_normal(style):
    assert_moments(new_params(style)["label"]["embedding"].ravel(), 0, 1)


# What must hold of any network


def random_like(shapes):
    """Weights that let signals through, in place of zeros."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        draws = rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5
        return jnp.asarray(draws, jnp.float32)

    return jax.tree.map(draw, shapes)


@functools.cache
def random_params():
    return random_like(param_shapes(UNet(**SMALL), (8, 8, 3)))


@functools.partial(jit, static_argnames="dtype")
def apply_small(params, x, t, dtype=jnp.float32):
    return UNet(**SMALL, dtype=dtype).apply({"params": params}, x, t)


def random_block(**options):
    """A residual block as a function, and its parameters."""
    block = ResBlock(channels=8, num_groups=4, **options)
    variables = jax.eval_shape(lambda: block.init(jax.random.key(0), X, EMB, False))
    return jit(block.apply, static_argnums=3), random_like(variables["params"])


@pytest.mark.slow
def test_bfloat16_network_tells_neighboring_timesteps_apart():
    x = jnp.stack([IMAGES[0]] * 2)
    ours = jnp.diff(apply_small(random_params(), x, T, dtype=jnp.bfloat16), axis=0)
    exact = jnp.diff(apply_small(random_params(), x, T), axis=0)
    # Rounding inside costs 0.01 of the output, which these timesteps change by 0.03.
    assert jnp.linalg.norm(ours - exact) < 0.5 * jnp.linalg.norm(exact)


@pytest.mark.slow
def test_transposing_gray_images_and_kernels_transposes_the_output():
    options = SMALL | dict(attention_resolutions=(), num_res_blocks=0)
    model = UNet(**options, out_channels=1, down_padding="bottom_right")
    params = random_like(param_shapes(model, (8, 8, 1)))
    apply = jit(model.apply)
    x = X[:, :4, :, :1]
    transposed = jax.tree.map(lambda p: p.swapaxes(0, 1) if p.ndim == 4 else p, params)
    y = apply({"params": params}, x, T)
    y_transposed = apply({"params": transposed}, x.swapaxes(1, 2), T)
    assert y.shape == x.shape
    np.testing.assert_allclose(y_transposed.swapaxes(1, 2), y, **F32_SUM)


def test_norm_does_not_feel_a_large_offset():
    apply, params = random_block()
    x = jnp.round(X * 256) / 256  # exact after adding the offset, too
    change = apply({"params": params}, x, EMB, False) - x
    x_far = x + 4096
    change_far = apply({"params": params}, x_far, EMB, False) - x_far
    # At the offset float32 is 2^-12 apart; the mean and the sum are rounded to that.
    np.testing.assert_allclose(change_far, change, rtol=0, atol=0.01)


def test_dropout_drops_its_share_scales_up_the_rest_and_rests_when_not_training():
    apply, params = random_block(dropout=0.25)
    identity = jnp.zeros((3, 3, 8, 8)).at[1, 1].set(jnp.eye(8))
    params["conv_out"] = {"kernel": identity, "bias": jnp.zeros(8)}
    kept = apply({"params": params}, X, EMB, False) - X
    rngs = {"dropout": jax.random.key(0)}
    dropped = apply({"params": params}, X, EMB, True, rngs=rngs) - X
    is_kept = jnp.abs(dropped) > 1e-5
    assert_mean(is_kept[jnp.abs(kept) > 1e-3], 0.75)
    np.testing.assert_allclose(dropped, is_kept * kept / 0.75, **F32_SUM)


@pytest.mark.slow
def test_doubling_folded_into_the_kernel_is_doubling_and_then_convolving():
    x, kernel = X[:, :4, :6], jnp.asarray(normal(3, 3, 3, 8, 5))
    grad = normal(4, 2, 8, 12, 5)

    def plain(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        doubled = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return jax.lax.conv_general_dilated(
            doubled, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=dimensions
        )

    ours, back = jax.vjp(cpu_convs.conv_of_doubled, x, kernel)
    expected, plain_back = jax.vjp(plain, x, kernel)
    np.testing.assert_allclose(ours, expected, **F32_SUM)
    for a, b in zip(back(grad), plain_back(grad), strict=True):
        np.testing.assert_allclose(a, b, **F32_SUM)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "resample"), [("float32", "resblock"), ("bfloat16", "conv")]
)
def test_computing_blocks_again_changes_no_gradient(dtype, resample):
    def grads(remat):
        small = SMALL | dict(num_res_blocks=0, dropout=0.1)
        model = UNet(**small, dtype=dtype, resample=resample, remat=remat)
        params = random_like(param_shapes(model, (8, 8, 3)))

        @jit
        def grad(params):
            rngs = {"dropout": jax.random.key(3)}
            apply = functools.partial(model.apply, rngs=rngs, train=True)
            return jax.grad(lambda p: jnp.sum(apply({"params": p}, IMAGES, T) ** 2))(
                params
            )

        return grad(params)

    stored, again = grads(None), grads("nothing_saveable")
    for a, b in zip(*map(jax.tree.leaves, (stored, again)), strict=True):
        assert np.isfinite(a).all()
        # Roundings to bfloat16 and the order of sums are the compiler's: with
        # xla_allow_excess_precision off, one network differs from itself by 0.046.
        share = 1e-5 if dtype == "float32" else 0.03
        assert np.linalg.norm(a - b) <= share * np.linalg.norm(a) + 1e-12
    if dtype == "float32":  # the gradient as a whole
        moved = jax.tree.map(jnp.subtract, stored, again)
        assert optax.tree.norm(moved) <= 1e-6 * optax.tree.norm(stored)


def sandwiched(params):
    """Kernels of one more axis, zero but for their middle."""

    def widen(path, p):
        is_conv = path[-1] == "kernel" and p.ndim > 2
        zeros = jnp.zeros_like(p)
        return jnp.stack([zeros, p, zeros], axis=1) if is_conv else p

    return unflatten_dict({k: widen(k, p) for k, p in flatten_dict(params).items()})


@pytest.mark.slow
def test_three_dimensional_network_sees_slices_as_a_flat_one_sees_images():
    model = UNet(**SMALL)
    params = random_params()
    # An axis in front: kernels [3, 3, i, o] -> [3, 3, 3, i, o], middle slice only.
    front = jax.tree.map(
        lambda p: jnp.stack([0 * p, p, 0 * p]) if p.ndim == 4 else p, params
    )
    x = IMAGES[:, None]
    y = jit(model.apply)({"params": front}, x, T)
    assert y.shape == x.shape  # the first axis, of size 1, is not halved
    np.testing.assert_allclose(y[:, 0], apply_small(params, IMAGES, T), **F32_SUM)


@pytest.mark.slow
def test_one_dimensional_network_sees_a_line_as_a_flat_one_sees_its_stripes():
    model = UNet(**SMALL)
    line = IMAGES[:, :, 0]
    params = random_like(param_shapes(model, (8, 3)))
    flat = sandwiched(params)
    stripes = jnp.repeat(line[:, :, None], 8, axis=2)
    y = jit(model.apply)({"params": params}, line, T)
    assert y.shape == line.shape
    for column in range(8):
        z = apply_small(flat, stripes, T)[:, :, column]
        np.testing.assert_allclose(z, y, **F32_SUM)


def test_folding_moves_blocks_of_pixels_into_channels_and_back():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    folded = unet.fold(x, 2)
    assert folded.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(folded[1, 1, 2, 2 * 3 : 3 * 3], x[1, 3, 4])
    np.testing.assert_array_equal(unet.unfold(folded, 2), x)


@pytest.mark.slow
def test_network_of_folded_pixels_is_the_network_on_the_folded_image():
    inner = UNet(**SMALL, out_channels=12)
    params = random_like(param_shapes(inner, (8, 8, 12)))
    outer = UNet(**SMALL, block_size=2)
    x = normal(9, 2, 16, 16, 3)
    ours = jit(outer.apply)({"params": params}, x, T)
    expected = jit(inner.apply)({"params": params}, unet.fold(x, 2), T)
    np.testing.assert_allclose(ours, unet.unfold(expected, 2), **F32_SUM)


@pytest.mark.slow
def test_super_resolution_sees_the_small_image_enlarged():
    plain, model = UNet(**SMALL), UNet(**SMALL, low_res=True)
    params = random_like(param_shapes(plain, (8, 8, 6)))
    small = jnp.broadcast_to(normal(5, 2, 1, 1, 3), (2, 2, 2, 3))  # of one color
    large = jnp.broadcast_to(small[:, :1, :1], (2, 8, 8, 3))
    both = jnp.concatenate([IMAGES, large], axis=-1)
    ours = jit(model.apply)({"params": params}, IMAGES, T, low_res=small)
    expected = jit(plain.apply)({"params": params}, both, T)
    np.testing.assert_allclose(ours, expected, **F32_SUM)
    with pytest.raises(ValueError, match="low_res = True needs low_res images"):
        model.init(jax.random.key(0), IMAGES, T)
    with pytest.raises(ValueError, match="low_res = False takes no low_res images"):
        plain.init(jax.random.key(0), IMAGES, T, low_res=small)


@pytest.mark.slow
def test_bfloat16_is_within_two_per_cent_of_the_norm():
    ours = apply_small(random_params(), IMAGES, T, dtype=jnp.bfloat16)
    exact = apply_small(random_params(), IMAGES, T)
    assert jnp.linalg.norm(ours - exact) < 0.02 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("name", ["resample", "embedding_order", "down_padding"])
def test_unknown_choices_are_named(name):
    with pytest.raises(ValueError, match=f"^{name} must be one of .*, got 'round'"):
        UNet(**SMALL, **{name: "round"})


@pytest.mark.parametrize(
    ("options", "label", "message"),
    [
        (dict(channels=10), None, "divisible by num_groups = 4 .* got 10"),
        (dict(num_heads=3), None, "by num_heads = 3, got 8"),
        (
            dict(num_classes=7),
            None,
            "label must be given to a network with num_classes = 7, got None",
        ),
        (
            dict(),
            [1, 2],
            r"label must not be given to a network with num_classes = None, got .* .2.",
        ),
    ],
)
def test_wrong_channels_and_labels_are_named_in_one_sentence(options, label, message):
    label = None if label is None else jnp.array(label)
    with pytest.raises(ValueError, match=rf"^[^.]*{message}\.(\n|$)"):
        UNet(**SMALL | options).init(jax.random.key(0), IMAGES, T, label)
