"""Our side of `tests.benchmarks.unet`."""

import functools

from jax_diffusion.runtime import cpu

cpu.tune()  # as the programs do

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jax_diffusion import (  # noqa: E402
    diffusion,
    samplers,
    schedules,
    timesteps,
    training,
)
from jax_diffusion.models.annotated import AnnotatedUNet  # noqa: E402
from jax_diffusion.models.unet import UNet  # noqa: E402
from tests.benchmarks import worker  # noqa: E402

STEPS = 10  # of DDIM
BETAS = schedules.linear_betas(1000)
OBJECTIVE = diffusion.Objective()

CIFAR10 = UNet(
    scale_shift=False,
    init_style="ho",
    norm_epsilon=1e-6,
    embedding_order="sin_cos",
    embedding_endpoint=True,
    down_padding="bottom_right",
)
DIGITS = UNet(
    out_channels=1,
    channels=32,
    multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_groups=8,
)
ANNOTATED = AnnotatedUNet()
SHAPES = {CIFAR10: (32, 32, 3), DIGITS: (8, 8, 1), ANNOTATED: (28, 28, 1)}


def train_step(model, batch_size, dtype=jnp.float32):
    """Forward, backward, Adam and one average, as `train` runs it."""
    model, shape = model.clone(dtype=dtype), SHAPES[model]
    schedule = schedules.make_schedule(BETAS)
    tx, _ = training.make_optimizer(lr=2e-4, total_steps=1000)
    sampler = timesteps.uniform(1000)
    quick = {"xla_backend_optimization_level": "0"}

    def init(key):
        return training.init_state(key, model, tx, sampler, shape, (0.9999,))

    step = training.make_train_step(
        model, tx, schedule, OBJECTIVE, sampler, ema_decays=(0.9999,)
    )
    image = np.random.default_rng(0).integers(0, 256, (batch_size, *shape), np.uint8)
    batch = {"image": image, "label": np.zeros(batch_size, np.int32)}
    key = jax.random.key(1)
    first = jax.jit(init, compiler_options=quick).lower(key).compile()
    shapes = jax.eval_shape(init, key)
    compiled = jax.jit(step, donate_argnums=1).lower(key, shapes, batch).compile()
    cpu.release_memory()
    worker.mark()
    state = first(key)

    def run():
        nonlocal state
        state, metrics = compiled(key, state, batch)
        return jax.block_until_ready(metrics)

    run(), run()
    cpu.release_memory()  # as `train` does
    return run


def network(model, batch_size):
    """Parameters, the network, and a batch of noise."""
    shape = SHAPES[model]
    quick = {"xla_backend_optimization_level": "0"}
    init = functools.partial(jax.jit, compiler_options=quick)(model.init)
    inputs = training.example_inputs(model, shape)
    params = init(jax.random.key(0), **inputs)["params"]
    keys = samplers.image_keys(jax.random.key(1), jnp.arange(batch_size))
    return params, keys, samplers.normal(keys, shape)


def sample(model, batch_size):
    """DDIM, all steps in one program."""
    params, keys, x_T = network(model, batch_size)
    keep = schedules.spaced_steps(1000, STEPS)
    short = schedules.make_schedule(BETAS, keep=keep)

    @jax.jit
    def draw(params, schedule, keys, x_T):
        model_fn = training.bind(model, params, None)
        denoise_fn = diffusion.denoiser(model_fn, schedule, OBJECTIVE)
        denoise_fn = diffusion.clip_x_0(denoise_fn)
        return samplers.sample(keys, denoise_fn, samplers.ddim_step, schedule, x_T)

    return lambda: jax.block_until_ready(draw(params, short, keys, x_T))


def bare_calls(model, batch_size):
    """As many calls of the network alone as `sample` makes."""
    params, _, x_T = network(model, batch_size)
    apply = jax.jit(lambda params, x, t: model.apply({"params": params}, x, t))
    t = jnp.zeros(batch_size)

    def run():
        for _ in range(STEPS):
            jax.block_until_ready(apply(params, x_T, t))

    return run


CASES = {
    "train_step": lambda: train_step(CIFAR10, 8),
    "bf16_step": lambda: train_step(CIFAR10, 8, jnp.bfloat16),
    "digits_step": lambda: train_step(DIGITS, 64),
    "sample": lambda: sample(CIFAR10, 8),
    "digits_sample": lambda: sample(DIGITS, 64),
    "annotated_step": lambda: train_step(ANNOTATED, 128),
    "annotated_sample": lambda: sample(ANNOTATED, 64),
    "bare_calls": lambda: bare_calls(CIFAR10, 8),
}

if __name__ == "__main__":
    worker.serve(CASES)
