"""Fine-tuning by a reward, whose gradient goes back through a whole chain."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.test_util import check_grads
from support.oracles import gaussian_rows

from jax_diffusion import diffusion, samplers, schedules

SCHEDULE = schedules.make_schedule(schedules.cosine_betas(20))
ROWS = gaussian_rows(SCHEDULE, 0.0, 0.3)  # the data before: N(0, 0.3^2)
KEYS = samplers.image_keys(jax.random.key(0), jnp.arange(512))


def draw(params, keys):
    def denoise_fn(x_t, t):
        gain, offset, log_var = ROWS[:, t, None]
        x_0 = gain * x_t + offset + (1 - gain) * params["bias"]
        return diffusion.Prediction(params["scale"] * x_0, log_var)

    x_T = samplers.normal(samplers.fold_in(keys, 20), (1,))
    return samplers.sample(keys, denoise_fn, samplers.ddpm_step, SCHEDULE, x_T)


@pytest.mark.slow
def test_a_reward_moves_the_samples_and_its_gradient_is_that_of_finite_differences():
    loss_fn = jax.jit(lambda params, keys: jnp.mean((draw(params, keys) - 0.6) ** 2))
    params = {"bias": jnp.zeros(()), "scale": jnp.ones(())}
    check_grads(lambda p: loss_fn(p, KEYS), (params,), 1, ["rev"], 0.01, 0.01, 0.01)

    tx, grad_fn = optax.adam(0.05), jax.jit(jax.grad(loss_fn))
    before, opt_state = loss_fn(params, KEYS), tx.init(params)
    for i in range(60):
        grads = grad_fn(params, samplers.fold_in(KEYS, 100 + i))
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
    assert before > 0.4 and loss_fn(params, KEYS) < 0.06
    assert abs(draw(params, KEYS).mean() - 0.6) < 0.1
