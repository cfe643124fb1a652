"""Fine-tuning by a reward, whose gradient goes back through a whole chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from support.oracles import gaussian_rows

from jax_diffusion import diffusion, samplers, schedules

SCHEDULE = schedules.make_schedule(schedules.cosine_betas(20))
ROWS = gaussian_rows(SCHEDULE, 0.0, 0.3)  # the data before: N(0, 0.3^2)
KEYS = samplers.image_keys(jax.random.key(0), jnp.arange(512))


def denoiser(params):
    def denoise_fn(x_t, t):
        gain, offset, log_var = ROWS[:, t, None]
        x_0 = gain * x_t + offset + (1 - gain) * params["bias"]
        return diffusion.Prediction(params["scale"] * x_0, log_var)

    return denoise_fn


def draw(params, keys):
    x_T = samplers.normal(samplers.fold_in(keys, 20), (1,))
    return samplers.sample(keys, denoiser(params), samplers.ddpm_step, SCHEDULE, x_T)


def loss_fn(params, keys):  # the reward is highest at 0.6
    return jnp.mean((draw(params, keys) - 0.6) ** 2)


def test_a_reward_moves_the_samples_and_its_gradient_is_that_of_finite_differences():
    params = {"bias": jnp.zeros(()), "scale": jnp.ones(())}
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    before, grads = value_and_grad(params, KEYS)
    for name in params:
        ends = [
            value_and_grad(params | {name: params[name] + step}, KEYS)[0]
            for step in (-0.01, 0.01)
        ]
        slope = (ends[1] - ends[0]) / 0.02
        np.testing.assert_allclose(grads[name], slope, rtol=0.01, atol=1e-3)

    tx = optax.adam(0.05)
    opt_state = tx.init(params)
    for i in range(60):
        _, grads = value_and_grad(params, samplers.fold_in(KEYS, 100 + i))
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
    after = loss_fn(params, KEYS)
    assert before > 0.4 and after < 0.06
    assert abs(draw(params, KEYS).mean() - 0.6) < 0.1
