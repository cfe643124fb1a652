"""Softmax attention of all networks: which implementation of JAX computes it.

There is no cuDNN where these tests run: what it gets and what is said when it is
missing are tested here, its results by `tests.benchmarks.accelerator` on a GPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracles import normal

from jax_diffusion import config as configs
from jax_diffusion import export
from jax_diffusion.models import MODELS, example_inputs
from jax_diffusion.models import attention as attentions

# LLVM's optimization is most of the time that a network takes here, and gains nothing.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

TRUNK = dict(channels=8, num_groups=4, multipliers=(1, 2), num_res_blocks=1)
TRUNK |= dict(attention_resolutions=(4,))
HEADS = dict(channels=8, multipliers=(1, 2), num_heads=2, head_dim=8)
NETWORKS = {
    "unet": TRUNK | dict(token_dim=3),
    "annotated": HEADS,
    "lucidrains": HEADS,
    "dit": dict(channels=16, depth=1, num_heads=2),
    "noisy_classifier": TRUNK | dict(num_labels=10, pool="attention"),
}
names = pytest.mark.parametrize("name", NETWORKS)


def make(name, **options):
    return MODELS[name](**NETWORKS[name], **options)


def program(model):
    """The text of a network's program for three platforms, as an export has it."""
    inputs = example_inputs(model, (4, 4, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))
    traced = jax.jit(lambda params: model.apply(params, **inputs)).trace(params)
    return traced.lower(lowering_platforms=export.PLATFORMS).as_text()


def test_every_network_has_the_field_and_by_default_jax_chooses():
    for name in NETWORKS.keys() | MODELS.keys():
        fields = {field.name: field for field in dataclasses.fields(MODELS[name])}
        assert fields["attention_implementation"].default is None, name


@names
def test_exported_xla_attention_is_the_program_that_jax_chooses(name):
    assert program(make(name, attention_implementation="xla")) == program(make(name))


def test_xla_attention_computes_the_default_bit_for_bit():
    q, k, v = (normal(n, 2, 5, 2, 8) for n in range(3))
    mask = jnp.array([[True, True, False, True, False], [True] * 5])[:, None, None]
    for recompute in (True, False):
        attend = functools.partial(attentions.full_attention, recompute=recompute)
        for given in ((q, k, v), (q, k, v, mask)):
            default, xla = (
                jit(functools.partial(attend, implementation=implementation))(*given)
                for implementation in (None, "xla")
            )
            assert np.array_equal(default, xla) and np.isfinite(default).all()


@names
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention_implementation="flash"), r"must be one of \('xla', 'cudnn'\)"),
        (
            dict(attention_implementation="cudnn"),
            "may be 'cudnn' with dtype bfloat16 or float16 only, got dtype float32",
        ),
    ],
)
def test_an_unknown_implementation_and_cudnn_in_float32_are_refused(
    name, options, message
):
    with pytest.raises(ValueError, match=f"^attention_implementation {message}"):
        make(name, **options)


def say(error):
    def attend(*args, **options):
        raise error

    return attend


@names
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cuDNN is not detected."),
        NotImplementedError("The head dim must be <= 128 and a multiple of 8."),
    ],
)
def test_what_cudnn_cannot_compute_is_said_in_one_sentence(name, error, monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", say(error))
    model = make(name, attention_implementation="cudnn", dtype="bfloat16")
    rule = r"attention_implementation must be None or 'xla' where cuDNN cannot compute"
    with pytest.raises(ValueError, match=rf"^{rule}.*\({str(error)[:-1]}\)\.(\n|$)"):
        program(model)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="where there is no cuDNN")
@names
def test_without_cudnn_jax_itself_says_so_when_a_network_is_called(name):
    model = make(name, attention_implementation="cudnn", dtype=jnp.bfloat16)
    with pytest.raises((ValueError, NotImplementedError), match=r"cuDNN|cpu"):
        program(model)


@pytest.fixture
def cudnn(monkeypatch):
    """A stand-in that refuses what cuDNN refuses and computes by XLA; its calls."""
    attend, calls = jax.nn.dot_product_attention, []

    def stand_in(q, k, v, mask=None, *, implementation=None):
        if implementation == "cudnn":
            assert q.dtype == k.dtype == v.dtype == jnp.bfloat16
            assert mask is None or mask.shape[2:] == (q.shape[1], k.shape[1])
            calls.append(mask is not None)
        return attend(q, k, v, mask=mask)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return calls


@names
def test_cudnn_gets_the_dtype_and_the_masks_that_it_takes(name, cudnn):
    inputs = example_inputs(make(name), (4, 4, 3))

    def shape(model):
        return jax.eval_shape(
            lambda: model.init_with_output(jax.random.key(0), **inputs)
        )

    default = shape(make(name, dtype=jnp.bfloat16))
    assert not cudnn
    chosen = make(name, dtype=jnp.bfloat16, attention_implementation="cudnn")
    assert shape(chosen) == default
    assert set(cudnn) == ({False, True} if name == "unet" else {False})


def test_a_mask_for_cudnn_hides_the_same_keys(cudnn):
    q, k, v = (normal(n, 2, 5, 2, 8).astype(jnp.bfloat16) for n in range(3))
    mask = jnp.array([[True, True, False, True, False], [True] * 5])[:, None, None]
    expected, found = (
        attentions.full_attention(q, k, v, mask, implementation=implementation)
        for implementation in (None, "cudnn")
    )
    assert cudnn and np.array_equal(expected, found)
    assert not np.array_equal(attentions.full_attention(q, k, v), found)


def test_a_config_names_the_implementation():
    path = "configs/smoke.py"
    chosen = "--config.model.attention_implementation=xla"
    config = configs.load_config(path, [chosen])
    assert configs.build(config, 1).model.attention_implementation == "xla"
    none = configs.load_config(path, [chosen, f"{chosen[:-3]}None"])
    assert configs.build(none, 1).model.attention_implementation is None
    wrong = configs.load_config(path, [f"{chosen[:-3]}flash"])
    with pytest.raises(
        ValueError, match=r"config\.model\.attention_implementation must"
    ):
        configs.build(wrong, 1)
