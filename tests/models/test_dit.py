"""The Diffusion Transformer: parity with facebookresearch/DiT, its sizes, its switches.

golden/processes/dit/ holds two small networks with random weights and what they
compute, made by models.py of facebookresearch/DiT at ed81ce2 in float32;
noise_floor.json its rounding error.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from support.oracles import F32, normal
from support.tiny_runs import random_params

from jax_diffusion.interop import dit_layout
from jax_diffusion.interop.layouts import to_torch
from jax_diffusion.models import init_params
from jax_diffusion.models.dit import FREQUENCIES, PUBLISHED, DiT, positions
from jax_diffusion.models.folding import unfold
from jax_diffusion.models.layers import timestep_embedding

GOLDEN = Path(__file__).parents[1] / "golden" / "processes" / "dit"
NOISE_FLOOR = json.loads((GOLDEN / "noise_floor.json").read_text())
TABLES = json.loads((GOLDEN / "tables.json").read_text())
FLOORS = 4  # their rounding error and ours, and twice that for another order of sums

# LLVM's optimization is most of the time that a network takes here, and gains nothing.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Modules whose output golden/ holds, and ours.
HOOKS = {
    "x_embedder": "patches",
    "t_embedder": "time_1",
    "blocks.0.attn": "block_0/out",
    "blocks.0.mlp": "block_0/mlp_1",
    "blocks.0": "block_0",
    "blocks.1": "block_1",
    "final_layer": "out",
}
networks = pytest.mark.parametrize("file", ["tiny_a", "tiny_b"])
computed_networks = pytest.mark.parametrize(
    "file", ["tiny_a", pytest.param("tiny_b", marks=pytest.mark.slow)]
)


@functools.cache
def golden(file):
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        return dict(arrays)


def below(file, prefix):
    arrays = golden(file).items()
    return {k.removeprefix(prefix): v for k, v in arrays if k.startswith(prefix)}


@functools.cache
def network(file):
    """What the official constructor makes, in our words, and the shape of an image."""
    given = json.loads((GOLDEN / f"{file}.json").read_text())["constructor"]
    channels = given["in_channels"]
    model = DiT(
        channels=given["hidden_size"],
        depth=given["depth"],
        num_heads=given["num_heads"],
        patch_size=given["patch_size"],
        mlp_ratio=given["mlp_ratio"],
        out_channels=channels * (1 + given["learn_sigma"]),
        num_classes=given["num_classes"] + (given["class_dropout_prob"] > 0),
    )
    return model, (given["input_size"], given["input_size"], channels)


def param_shapes(model, image_shape):
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0), image_shape))


def our_params(file):
    model, image_shape = network(file)
    shapes = param_shapes(model, image_shape)
    return dit_layout.from_dit(below(file, "params/"), model, shapes, image_shape)


@functools.cache
def computed(file):
    """What golden/ holds of a network, computed by ours, by the names there."""
    arrays, (model, _) = golden(file), network(file)
    params, cotangent = our_params(file), jnp.asarray(arrays["run0/grad/g"])

    @jit
    def grads_and_output(params, x, t, y):
        def loss(params, x):
            options = dict(capture_intermediates=True)
            output, seen = model.apply({"params": params}, x, t, y, **options)
            return jnp.sum(output * cotangent), (output, seen["intermediates"])

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    found = {}
    with jax.default_matmul_precision("highest"):
        for run in ("run0", "run1"):
            inputs = (jnp.asarray(arrays[f"{run}/{name}"]) for name in "xty")
            grads, (output, seen) = grads_and_output(params, *inputs)
            found |= {f"{run}/output": output, f"{run}/grad/x": grads[1]}
            flat = flatten_dict(seen, sep="/")
            for theirs, ours in HOOKS.items():
                (of_module,) = flat[f"{ours}/__call__"]
                found[f"{run}/hooks/{theirs}"] = of_module
            by_name = to_torch(grads[0], dit_layout.leaves(grads[0]))
            found |= {f"{run}/grad/params/{k}": v for k, v in by_name.items()}
    table = jnp.asarray(params["label"]["embedding"])
    found["run0/hooks/y_embedder"] = table[arrays["run0/y"]]
    return found


def assert_near(ours, official, floor):
    tolerance = max(FLOORS * floor, 1e-5 * np.abs(official).max())
    np.testing.assert_allclose(
        np.reshape(ours, official.shape), official, rtol=0, atol=tolerance
    )


# Parity with the official network


@networks
def test_every_official_dit_parameter_has_its_place_and_comes_back_bit_for_bit(file):
    official, (model, image_shape) = below(file, "params/"), network(file)
    back = dit_layout.to_dit(our_params(file), model, image_shape)
    assert back.keys() == official.keys()
    assert all(np.array_equal(back[name], official[name]) for name in official)


@computed_networks
def test_output_modules_and_gradients_of_dit_are_the_official_ones(file):
    inputs = {f"run{i}/{name}" for i in (0, 1) for name in "xty"} | {"run0/grad/g"}
    floors, compared = NOISE_FLOOR[f"{file}.npz"], 0
    for key, official in golden(file).items():
        if key.startswith("run") and key not in inputs:
            floor = floors[key.removesuffix("_f64")][0]
            assert_near(computed(file)[key.removesuffix("_f64")], official, floor)
            compared += 1
    assert compared == len([key for key in golden(file) if key[:3] == "run"]) - 7


@pytest.mark.slow
def test_official_guidance_of_dit_is_that_of_its_first_three_channels():
    arrays, (model, image_shape) = golden("tiny_a"), network("tiny_a")
    x, t, y = (jnp.asarray(arrays[f"cfg/{name}"]) for name in "xty")
    x = jnp.concatenate([x[:2], x[:2]])  # with a label, and with the null label
    assert (y[2:] == model.num_classes - 1).all()
    with jax.default_matmul_precision("highest"):
        both = jit(model.apply)({"params": our_params("tiny_a")}, x, t, y)
    cond, uncond = both[:2, ..., :3], both[2:, ..., :3]
    guided = uncond + 4.0 * (cond - uncond)
    ours = both.at[..., :3].set(jnp.concatenate([guided, guided]))
    floor, _ = NOISE_FLOOR["tiny_a.npz"]["cfg/output"]
    for key in ("cfg/output", "cfg/output_f64"):
        assert_near(ours, arrays[key], floor)
    assert image_shape[-1] == 4  # so the fourth is not guided


def test_embeddings_of_positions_and_timesteps_of_dit_are_the_official_ones():
    tables = golden("tables")
    for case in TABLES["pos_embed"]:
        every = 1 if case["rows"] == "all" else 37
        ours = positions(case["grid"], case["grid"], case["dim"])[::every]
        np.testing.assert_allclose(ours, tables[case["key"]], rtol=0, atol=2.0**-24)
    t = tables["timestep_embedding/t"]
    for case in TABLES["timestep_embedding"]:
        ours = timestep_embedding(jnp.asarray(t), case["dim"])
        error = np.abs(ours - tables[f"{case['key']}_f64"])
        assert np.all(error <= 2 * t[:, None] * 2.0**-24 + F32["atol"])
    assert FREQUENCIES == 256


def test_patches_of_dit_are_cut_and_put_together_in_the_official_order():
    tables = golden("tables")
    image, tokens = tables["patchify/image"], tables["patchify/tokens"]
    model = DiT(channels=12, depth=1, num_heads=1, patch_size=2, out_channels=3)
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape), param_shapes(model, (8, 8, 3))
    )
    identity = np.eye(12).reshape(12, 3, 2, 2)  # of [out, in, size, size]
    params["patches"]["kernel"] = np.moveaxis(identity, (0, 1), (-1, -2))
    apply = jit(functools.partial(model.apply, capture_intermediates=True))
    _, seen = apply({"params": params}, image, jnp.zeros(2))
    (ours,) = seen["intermediates"]["patches"]["__call__"]
    np.testing.assert_array_equal(ours.reshape(tokens.shape), tokens)
    blocks = jnp.asarray(tables["unpatchify/tokens"]).reshape(2, 4, 4, 12)
    np.testing.assert_array_equal(unfold(blocks, 2), tables["unpatchify/image"])


# Sizes


def closed_form(c, depth, patch, out_channels, learned_labels=1001):
    """Parameters of a DiT on latents of 4 channels, counted on paper."""
    patches = 4 * patch**2 * c + c
    time = 256 * c + c + c * c + c
    modulation, attention, mlp = 6 * c * c + 6 * c, 4 * c * c + 4 * c, 8 * c * c + 5 * c
    last = 2 * c * c + 2 * c + (c + 1) * out_channels * patch**2
    blocks = depth * (modulation + attention + mlp)
    return patches + time + learned_labels * c + blocks + last


@pytest.mark.parametrize(
    "size", ["S", *(pytest.param(s, marks=pytest.mark.slow) for s in ("B", "L")), "XL"]
)
def test_published_sizes_of_dit_have_the_published_numbers_of_parameters(size):
    millions = {"S": 33, "B": 130, "L": 458, "XL": 675}
    for name, counts in TABLES["parameter_counts"].items():
        kind, patch = name.removeprefix("DiT-").split("/")
        for learns, count in counts.items() if kind == size else ():
            out_channels = 8 if learns == "learn_sigma" else 4
            found = closed_form(
                *(PUBLISHED[size]["channels"], PUBLISHED[size]["depth"]),
                *(int(patch), out_channels),
            )
            assert found == count["without_pos_embed"]
    model = DiT(**PUBLISHED[size], patch_size=2, out_channels=8, num_classes=1001)
    shapes = param_shapes(model, (32, 32, 4))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    official = TABLES["parameter_counts"][f"DiT-{size}/2"]["learn_sigma"]
    assert count == official["without_pos_embed"]
    assert round(count / 1e6) == millions[size]


def test_names_and_shapes_of_dit_s_2_are_the_official_ones():
    model = DiT(**PUBLISHED["S"], patch_size=2, out_channels=8, num_classes=1001)
    official = TABLES["DiT-S/2_state_dict_shapes"]
    wanted = dit_layout.leaves(param_shapes(model, (32, 32, 4)))
    found = {leaf.names[0]: leaf.their_shape for leaf in wanted}
    found["pos_embed"] = dit_layout.position_embedding(model, (32, 32, 4)).shape
    assert official.items() <= {name: [*a] for name, a in found.items()}.items()
    more = {name for name in found if name not in official}
    assert more == {
        name.replace(".0.", f".{i}.", 1)
        for name in official
        if name.startswith("blocks.0.")
        for i in range(1, 12)
    }


# Switches


SMALL = DiT(channels=16, depth=2, num_heads=2, patch_size=4, out_channels=6)


@pytest.mark.slow
def test_a_new_dit_outputs_zero_and_its_blocks_are_the_identity():
    x, t = normal(1, 2, 8, 12, 3), jnp.array([3.0, 900.0])

    @jit
    def init_and_apply(key):
        params = init_params(SMALL, key, (8, 12, 3))
        return SMALL.apply({"params": params}, x, t, capture_intermediates=True)

    y, seen = init_and_apply(jax.random.key(0))
    assert y.shape == (2, 8, 12, 6) and not y.any()
    blocks = [seen["intermediates"][f"block_{i}"]["__call__"][0] for i in (0, 1)]
    np.testing.assert_array_equal(*blocks)
    (patches,) = seen["intermediates"]["patches"]["__call__"]
    tokens = patches.reshape(2, 6, 16) + positions(2, 3, 16)[None]
    np.testing.assert_allclose(blocks[0], tokens, **F32)


@pytest.mark.slow
def test_computing_blocks_of_dit_again_changes_no_gradient():
    x, t = normal(1, 2, 8, 12, 3), jnp.array([3.0, 900.0])
    params = random_params(SMALL, (8, 12, 3))

    def grads(model):
        def loss(params):
            return jnp.sum(model.apply({"params": params}, x, t) ** 2)

        return jit(jax.grad(loss))(params)

    stored, again = grads(SMALL), grads(SMALL.clone(remat="nothing_saveable"))
    for a, b in zip(*map(jax.tree.leaves, (stored, again)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(channels=18), "channels must be divisible by 4 and by num_heads = 2"),
        (dict(num_heads=3), "channels must be divisible by 4 and by num_heads = 3"),
        (dict(depth=0), "depth must be an integer"),
        (dict(patch_size=0), "patch_size must be an integer"),
        (dict(mlp_ratio=0.0), "mlp_ratio must be a number"),
        (dict(remat="all"), "remat must be one of"),
        (dict(cond_dim=-1), "cond_dim must be an integer in"),
    ],
)
def test_wrong_fields_of_dit_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SMALL.clone(**options)


@pytest.mark.parametrize(
    ("options", "shape", "label", "message"),
    [
        (
            {},
            (8, 8, 3),
            [1, 2],
            "label must not be given to a network with num_classes = None",
        ),
        (
            dict(num_classes=7),
            (8, 8, 3),
            None,
            "label must be given to a network with num_classes = 7, got None",
        ),
        ({}, (8, 3), None, r"x must be images \[b, h, w, c\], got shape \(2, 8, 3\)"),
        ({}, (2, 8, 8, 3), None, r"x must be images \[b, h, w, c\], got shape"),
    ],
)
def test_inputs_that_do_not_fit_dit_are_refused(options, shape, label, message):
    x, t = jnp.zeros((2, *shape)), jnp.zeros(2)
    given = (x, t) if label is None else (x, t, jnp.array(label))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: SMALL.clone(**options).init(jax.random.key(0), *given))


@pytest.mark.slow
def test_vectors_move_dit_through_its_embedding_and_have_no_place_in_the_layout():
    model = SMALL.clone(cond_dim=5)
    x, t, cond = normal(1, 2, 8, 8, 3), jnp.array([3.0, 900.0]), normal(2, 2, 5)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, t, cond=cond))
    assert shapes["params"]["cond"]["kernel"].shape == (5, 16)
    with pytest.raises(ValueError, match=r"layout 'dit' must have .* got cond\."):
        dit_layout.leaves({"cond": shapes["params"]["cond"]})
    without = dict(random_params(SMALL, (8, 8, 3)))
    params = without | {"cond": {"kernel": normal(3, 5, 16), "bias": jnp.zeros(16)}}
    apply = jit(model.apply)
    plain = jit(SMALL.apply)({"params": without}, x, t)
    y = apply({"params": params}, x, t, cond=cond.at[1].set(0.0))
    np.testing.assert_allclose(y[1], plain[1], **F32)
    assert np.abs(y[0] - plain[0]).max() > 0.01
    message = r"^cond must not be given to a network with cond_dim = 0, got float32"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(SMALL.apply, {"params": without}, x, t, cond=cond)
    with pytest.raises(ValueError, match=r"^cond must be given .* got None"):
        jax.eval_shape(model.apply, {"params": params}, x, t)
    with pytest.raises(ValueError, match=r"^cond must be a float array \[2, 5\]"):
        jax.eval_shape(model.apply, {"params": params}, x, t, cond=cond[:, :4])
