"""What a network of one's own goes through: training, checkpoints, sampling, export."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_diffusion import diffusion, export, models, samplers, schedules, timesteps
from jax_diffusion.diffusion import Objective
from jax_diffusion.runtime import checkpoint
from jax_diffusion.training import init_state, make_train_step

SCHEDULE = schedules.make_schedule(schedules.cosine_betas(50))
OBJECTIVE = Objective("v")
POINTS = np.array([[0.7, -0.3], [-0.5, 0.5]], np.float32)  # the data are near these


def round_trip(network, workdir):
    """Asserts that a network of two functions learns POINTS and goes through it all."""
    tx, sampler, decays = optax.adam(3e-3), timesteps.uniform(50), (0.9,)
    state = init_state(jax.random.key(0), network, tx, sampler, (2,), decays)
    step = make_train_step(
        network, tx, SCHEDULE, OBJECTIVE, sampler, ema_decays=decays, microbatches=2
    )

    @jax.jit
    def train(state):
        def one(state, i):
            which = jax.random.bernoulli(jax.random.key(i), shape=(128,)).astype(int)
            image = jnp.asarray(POINTS)[which]
            return step(jax.random.key(1), state, {"image": image})

        return jax.lax.scan(one, state, jnp.arange(1000))

    trained, metrics = train(state)
    assert metrics["loss"][-40:].mean() < 0.75 * metrics["loss"][:10].mean()

    manager = checkpoint.make_manager(workdir)
    with checkpoint.closing(manager):
        checkpoint.save(manager, 1000, trained, {})
    whole = jax.tree.map(lambda a: a.sharding, trained)
    manager = checkpoint.make_manager(workdir)
    with checkpoint.closing(manager):
        restored, _ = checkpoint.restore_or_init(manager, lambda: state, whole)
    jax.tree.map(np.testing.assert_array_equal, restored, trained)
    params = checkpoint.load_params(workdir, ema="0.9")

    def draw(params, seed, ids, label):
        keys = samplers.image_keys(jax.random.key(seed), ids)
        model_fn = models.bind(network, params, None)
        denoise_fn = diffusion.denoiser(model_fn, SCHEDULE, OBJECTIVE)
        x_T = samplers.normal(keys, (2,))
        return samplers.sample(keys, denoise_fn, samplers.ddpm_step, SCHEDULE, x_T)

    ids = np.arange(200, dtype=np.int32)
    drawn = np.asarray(jax.jit(draw)(params, np.uint32(3), ids, ids))
    near = np.linalg.norm(drawn[:, None] - POINTS, axis=-1).min(axis=1) < 0.25
    assert near.mean() > 0.6  # of pure noise, 0.1
    exported = export.load_sampler(export.export_sampler(draw, params))(3, ids)
    np.testing.assert_allclose(exported, drawn, rtol=1e-3, atol=1e-3)
