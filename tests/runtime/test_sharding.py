"""One mesh: who holds what, and that it changes nothing but the time."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jax_diffusion import schedules, timesteps, training
from jax_diffusion.diffusion import Objective
from jax_diffusion.models.unet import UNet
from jax_diffusion.runtime import sharding

FIRST = [1, 2, 4, 8]


def mesh_of(count, fsdp=1):
    return sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:count])


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({}, (8, 1)),
        ({"fsdp": 2}, (4, 2)),
        ({"data": 2, "fsdp": -1}, (2, 4)),
        ({"data": 1, "fsdp": 8}, (1, 8)),
    ],
)
def test_what_one_axis_leaves_the_other_takes(arguments, sizes):
    assert tuple(sharding.make_mesh(**arguments).shape.values()) == sizes


@pytest.mark.parametrize(
    "arguments",
    [{"fsdp": 3}, {"data": -1, "fsdp": -1}, {"data": 0}, {"data": 4}, {"fsdp": 16}],
)
def test_a_mesh_of_another_number_of_devices_is_refused(arguments):
    with pytest.raises(ValueError, match="number of devices, 8, got data = "):
        sharding.make_mesh(**arguments)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 64, 128), (None, None, None, "fsdp")),
        ((3, 3, 256, 128), (None, None, "fsdp", None)),
        ((4098, 12), (None, "fsdp")),  # the largest axis does not divide by four
        ((64,), (None,)),  # small
        ((4099, 3), (None, None)),  # no axis divides
    ],
)
def test_leaves_are_split_along_the_largest_axis_that_divides(shape, spec):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert sharding.state_sharding(mesh_of(8, 4), leaf).spec == PartitionSpec(*spec)


def test_without_fsdp_nothing_is_split():
    leaf = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    assert sharding.state_sharding(mesh_of(8), leaf).is_fully_replicated


@pytest.mark.parametrize("count", FIRST)
def test_rows_of_a_batch_go_to_devices_once_each(count):
    mesh, image = mesh_of(count), np.arange(48).reshape(16, 3)
    assert np.array_equal(sharding.host_rows(mesh, 16), np.arange(16))
    shared = sharding.global_batch(mesh, {"image": image}, 16)["image"]
    assert np.array_equal(shared, image)
    rows = [s.data.shape for s in shared.addressable_shards]
    assert rows == [(16 // count, 3)] * count


def test_a_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(ValueError, match="divisible by the number of devices, 8, got"):
        sharding.host_rows(mesh_of(8), 12)


def test_a_short_batch_is_filled_with_its_last_row():
    mesh = mesh_of(4)
    shared = sharding.shard_padded(mesh, {"x": np.arange(5)})["x"]
    assert shared.tolist() == [0, 1, 2, 3, 4, 4, 4, 4]


def test_arrays_are_spread_once():
    mesh = mesh_of(4)
    first = sharding.replicate(mesh, {"a": np.ones(3), "b": jnp.ones(3)})
    assert all(a.sharding.device_set == set(jax.devices()[:4]) for a in first.values())
    again = sharding.replicate(mesh, first)
    assert all(again[name] is first[name] for name in first)


@pytest.mark.parametrize(
    "arguments",
    [("host:1", 2, None), (None, 2, 0), ("host:1", 2, 2), ("host", 2, 0)],
)
def test_half_a_description_of_the_job_is_refused(arguments):
    with pytest.raises(ValueError, match=r"coordinator.*process_id.* got"):
        sharding.start(*arguments)


@pytest.mark.parametrize("number", [0, 7, 2**40])
def test_a_process_that_is_alone_is_the_first(number):
    assert sharding.broadcast_from_first(number) == number


@pytest.mark.parametrize("flag", [True, False])
def test_a_process_that_is_alone_decides_for_all_hosts(flag):
    assert sharding.true_on_all_hosts(flag) is flag


# Few channels, but kernels of more than MIN_SPLIT numbers.
UNET = UNet(
    out_channels=1,
    channels=16,
    multipliers=(1, 2),
    num_res_blocks=0,
    attention_resolutions=(4,),
    num_groups=4,
)


class TwoConvs(nn.Module):
    """Compiles in a fraction of the time of a UNet."""

    @nn.compact
    def __call__(self, x, timesteps, *, train=False):
        h = nn.Conv(32, (3, 3))(x) + nn.Dense(32)(timesteps[:, None])[:, None, None]
        h = nn.Conv(32, (3, 3))(nn.silu(h))
        return nn.Conv(1, (3, 3))(nn.silu(h))


SCHEDULE = schedules.make_schedule(schedules.cosine_betas(20))
SAMPLER = timesteps.loss_second_moment(20, history=1)
BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8),
    "label": np.zeros(8, np.int32),
}


QUICK = {"xla_backend_optimization_level": "0"}  # compiling is most of the time


@functools.cache
def train_on(model, count, fsdp=1):
    """Losses of a few updates, the last state in NumPy, and whether any is split."""
    mesh = mesh_of(count, fsdp)
    tx, _ = training.make_optimizer(lr=1e-3, total_steps=100, grad_clip=1.0)
    key = jax.random.key(0)

    def init():
        return training.init_state(key, model, tx, SAMPLER, (8, 8, 1), (0.9,))

    step = training.make_train_step(
        model, tx, SCHEDULE, Objective(), SAMPLER, ema_decays=(0.9,)
    )
    shapes = jax.eval_shape(init)
    step, shardings = sharding.jit_step(mesh, step, shapes)
    key = jax.device_put(key, sharding.replicated(mesh))
    batch = sharding.global_batch(mesh, BATCH, 8)
    step = step.lower(key, shapes, batch).compile(compiler_options=QUICK)
    init = jax.jit(init, out_shardings=shardings, compiler_options=QUICK)
    state, losses = init(), []
    for _ in range(4):
        state, metrics = step(key, state, batch)
        losses.append(metrics["loss"])
    split = [not a.sharding.is_fully_replicated for a in jax.tree.leaves(state.params)]
    return np.array(losses), jax.device_get(state), any(split)


@pytest.mark.parametrize(
    ("model", "count", "fsdp"),
    [
        (TwoConvs(), 4, 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *((TwoConvs(), *sizes) for sizes in [(2, 2), (8, 1), (8, 8)]),
                (UNET, 8, 4),
            )
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else type(value).__name__,
)
def test_training_is_the_same_on_any_mesh(model, count, fsdp):
    losses, state, split = train_on(model, count, fsdp)
    alone = train_on(model, 1)
    assert split == (fsdp > 1) and state.timestep_state.counts.any()
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (state, alone[1])), strict=True):
        # Adam divides by the root of a second moment: where that is next to nothing, a
        # rounding of the gradient moves a parameter by a share of the learning rate.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    histories = (state.timestep_state, alone[1].timestep_state)
    for a, b in zip(*histories, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
