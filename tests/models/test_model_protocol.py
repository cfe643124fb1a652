"""What `models` asks of a network, checked for every row of `MODELS`.

A new row is tested as it is; a row of TINY makes it small, and so the test fast.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from flax.traverse_util import flatten_dict
from support.oracles import F32_SUM, normal

from jax_diffusion.models import MODELS, Network, Traits, bind, example_inputs, traits
from jax_diffusion.models.noisy_classifier import POOLS, NoisyClassifier
from jax_diffusion.models.unet import UNet

# LLVM's optimization is most of the time that a network takes here, and gains nothing.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

TRUNK = dict(
    channels=8,
    num_groups=4,
    multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
)
HEADS = dict(channels=8, multipliers=(1, 2), num_heads=2, head_dim=4)
TINY = {
    "unet": TRUNK | dict(num_classes=7, low_res=True),
    "annotated": HEADS | dict(num_groups=4),
    "lucidrains": HEADS,
    "dit": dict(channels=16, depth=2, num_heads=2, num_classes=7, cond_dim=3),
    "noisy_classifier": TRUNK | dict(num_labels=10),
}
ROWS = [name for name in MODELS if name != "encoder"]  # which is noisy_classifier
# Case -> row of MODELS and what differs from TINY. The first are the rows themselves.
CASES = {name: (name, {}) for name in ROWS} | {
    "unet-conditioned": ("unet", dict(cond_dim=3, token_dim=3)),
    "annotated-resnet": ("annotated", dict(use_convnext=False, full_skip=True)),
    **{f"noisy_classifier-{p}": ("noisy_classifier", dict(pool=p)) for p in POOLS[1:]},
}
rows = pytest.mark.parametrize("name", ROWS)
cases = pytest.mark.parametrize("case", CASES)
whole_cases = pytest.mark.parametrize(  # unet-conditioned is unet, and more
    "case", [case for case in CASES if case != "unet"]
)

X = normal(1, 2, 8, 8, 3)
T = jnp.array([999.0, 3.0])
LABEL = jnp.array([5, 2])
LOW_RES = normal(2, 2, 4, 4, 3)


def make(case, **more):
    """The network of a case, its output as wide as the config makes it."""
    name, options = CASES[case]
    options = TINY.get(name, {}) | options | more
    if traits(MODELS[name]).num_labels is None:
        options["out_channels"] = 3
    return MODELS[name](**options)


def takes(model):
    """Names of the network's fields."""
    return {field.name for field in dataclasses.fields(model)}


def param_shapes(model, image_shape=(8, 8, 3)):
    inputs = example_inputs(model, image_shape)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]


@functools.cache
def random_params(case):
    """Weights of the right size from NumPy: JAX compiles anew for every shape."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.ndim == 1:  # biases and norms: not at zero or one, to be seen
            return jnp.asarray(rng.uniform(0.1, 1.0, leaf.shape), jnp.float32)
        draws = rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5
        return jnp.asarray(draws, jnp.float32)

    return jax.tree.map(draw, param_shapes(make(case)))


def call(model, params, x, t, label, low_res, **options):
    """The network as the trainer calls it; pixels of x are its vector and tokens."""
    if traits(model).low_res:
        options["low_res"] = low_res
    if traits(model).cond_dim:
        options["cond"] = x[:, 0, 0]
    if traits(model).token_dim:
        options["tokens"] = x[:, :3, 1]
        options["tokens_mask"] = x[:, :3, 1, 0] < 1
    return bind(model, params, label, **options)(x, t)


@functools.cache
def compiled(case, dtype):
    return jit(functools.partial(call, make(case, dtype=dtype)))


def output(case, x=X, t=T, label=LABEL, low_res=LOW_RES, dtype=jnp.float32):
    return compiled(case, dtype)(random_params(case), x, t, label, low_res)


@cases
def test_a_network_returns_float32_images_or_logits(case):
    model, y = make(case), output(case)
    num_labels = traits(model).num_labels
    assert isinstance(model, Network)
    assert y.shape == (X.shape if num_labels is None else (2, num_labels))
    assert y.dtype == jnp.float32 and np.isfinite(y).all()


@cases
def test_batch_mates_do_not_matter_and_timesteps_labels_and_low_res_do(case):
    def swapped(a):  # the second image comes first, beside another one
        return jnp.stack([a[1], -a[0]])

    y, others = output(case), (swapped(X), jnp.array([3.0, 500.0]))
    y_other = output(case, *others, jnp.array([2, 0]), swapped(LOW_RES))
    np.testing.assert_allclose(y_other[0], y[1], **F32_SUM)
    assert jnp.abs(output(case, t=T[::-1]) - y).max() > 0.01
    model = make(case)
    if traits(model).num_classes is not None:
        assert jnp.abs(output(case, label=LABEL[::-1]) - y).max() > 0.01
    if traits(model).low_res:
        assert jnp.abs(output(case, low_res=-LOW_RES) - y).max() > 0.01


@pytest.mark.slow
@whole_cases
def test_a_bfloat16_network_outputs_float32_near_the_float32_network(case):
    ours, exact = output(case, dtype=jnp.bfloat16), output(case)
    assert ours.dtype == jnp.float32
    # bfloat16 rounds by up to 0.004
    assert 1e-4 < jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact) < 0.05
    assert 1e-4 < jnp.abs(ours - exact).max() / jnp.abs(exact).max() < 0.05


@rows
def test_a_bfloat16_network_norms_and_softmaxes_in_float32(name):
    model = make(name, dtype=jnp.bfloat16)
    inputs = (random_params(name), X, T, LABEL, LOW_RES)
    jaxpr = jax.make_jaxpr(functools.partial(call, model))(*inputs)
    ops = re.findall(r":(\w+)\[[\d,]*\] = (\w+)", str(jaxpr))
    of = {op: [dtype for dtype, o in ops if o == op] for _, op in ops}
    assert set(of["rsqrt"]) == set(of["exp"]) == {"f32"}
    for op in {"sin", "cos", "logistic"} & of.keys():
        assert set(of[op]) == {"f32"}, op
    convolutions = of["conv_general_dilated"]
    if name == "unet":  # whose last one is float32
        convolutions = convolutions[:-1]
    assert set(convolutions) == {"bf16"} and "bf16" in of["dot_general"]


@rows
def test_parameters_are_float32_and_the_only_variables_whatever_the_dtype(name):
    model = make(name, dtype=jnp.bfloat16)
    inputs = example_inputs(model, (8, 8, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))
    assert variables.keys() == {"params"}
    leaves = jax.tree.leaves(variables)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.slow
@rows
def test_init_is_finite_and_decided_by_the_key(name):
    model = make(name)
    inputs = jax.eval_shape(lambda: example_inputs(model, (8, 8, 3)))
    one, again, other = (  # one array at a time: together they compile for long
        jax.device_get(model.lazy_init(jax.random.key(n), **inputs)) for n in (0, 0, 1)
    )
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(one))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, again))
    assert not jax.tree.all(jax.tree.map(np.array_equal, one, other))


@rows
def test_dropout_needs_a_key_and_only_when_training(name):
    has_dropout = "dropout" in takes(make(name))
    model = make(name, **dict(dropout=0.1) if has_dropout else {})

    def shape(train):
        f = functools.partial(call, model, train=train)
        return jax.eval_shape(f, random_params(name), X, T, LABEL, LOW_RES).shape

    assert shape(train=False) == output(name).shape
    if has_dropout:
        with pytest.raises(InvalidRngError, match="dropout"):
            shape(train=True)
    else:
        assert shape(train=True) == output(name).shape


@pytest.mark.slow
@pytest.mark.parametrize("case", [*ROWS[1:], "unet-conditioned", "annotated-resnet"])
def test_every_parameter_has_a_finite_gradient_that_is_not_zero(case):
    model = make(case)

    def loss(params):
        return jnp.mean(call(model, params, X, T, LABEL, LOW_RES) ** 3)

    for path, grad in flatten_dict(jit(jax.grad(loss))(random_params(case))).items():
        assert jnp.all(jnp.isfinite(grad)) and jnp.any(grad != 0), path


@rows
@pytest.mark.parametrize("size", [(6, 8), (8, 6)])
def test_images_that_do_not_halve_or_fill_patches_are_refused_in_one_sentence(
    name, size
):
    deeper, message = {}, "divisible by 4 .*halved 2 times, got"
    if "multipliers" in takes(make(name)):
        deeper["multipliers"] = (1, 2, 2)
    if "patch_size" in takes(make(name)):
        deeper["patch_size"] = 4
        message = "patch_size must divide height and width of the images, got 4 for"
    message += rf" {size[0]} x {size[1]}"
    with pytest.raises(ValueError, match=rf"^[^.]*{message}\.(\n|$)"):
        param_shapes(make(name, **deeper), (*size, 3))


# traits


def test_traits_of_a_network_are_its_fields_and_of_a_class_their_defaults():
    assert traits(UNet()) == traits(UNet) == traits(MODELS["unet"]) == Traits()
    assert traits(UNet(num_classes=10, low_res=True)) == Traits(10, None, True)
    assert traits(NoisyClassifier(num_labels=9)) == Traits(num_labels=9)
    assert traits(MODELS["encoder"]) == traits(NoisyClassifier) == Traits(None, 1000)
    assert MODELS["encoder"] is MODELS["noisy_classifier"]


def test_traits_of_what_says_nothing_are_those_of_a_denoiser_without_labels():
    @dataclasses.dataclass
    class Bare:
        num_labels: int  # no default: a classifier all the same

    assert traits(lambda **options: None) == traits(object()) == Traits()
    assert traits(Bare) == Traits(num_labels=0) and traits(Bare(3)).num_labels == 3
