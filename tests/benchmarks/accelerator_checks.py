"""The rows of `tests.benchmarks.accelerator` that are right or wrong.

Everything is float32 with the precision "highest" unless a row says otherwise: products
in TF32 or bfloat16 would miss these tolerances. As a program it checks one row:

    export XLA_FLAGS=--xla_gpu_deterministic_ops=true
    python -m tests.benchmarks.accelerator_checks

trains, stops, resumes, and says whether the result is the same bit for bit.
"""

import functools
import os
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_diffusion import diffusion, samplers, schedules, timesteps, training
from jax_diffusion.models.attention import full_attention
from jax_diffusion.models.unet import UNet
from jax_diffusion.runtime import checkpoint
from tests.support import golden_unets

from .accelerator_speed import (
    Found,
    Row,
    Unsupported,
    compile_program,
    need_cudnn,
    quick,
    seconds_left,
)

OUTPUT = 1e-4  # of the largest output of a network: sums in another order
STEP = 1e-4  # of the norm of an update, by plain gradient descent
IMAGES = 1e-3  # of pixels in [-1, 1]: a sampler amplifies those of its network
ATTENTION = 0.02  # in bfloat16, which rounds by up to 0.004, several times

FLAG = "--xla_gpu_deterministic_ops=true"
NETWORK = "ermongroup_e"  # of the golden ones, trained and sampled here
STEPS = 10  # of DDIM
BETAS = schedules.linear_betas(1000)
SMALL = UNet(
    channels=8,
    num_groups=4,
    multipliers=(1,),
    num_res_blocks=0,
    attention_resolutions=(8,),
    dropout=0.1,
)


def within(what: str, error: float, tolerance: float) -> Found:
    """Raises AssertionError unless an error is at most its tolerance."""
    text = f"{what} {error:.1e}, tolerance {tolerance:.0e}"
    if not error <= tolerance:  # nan is wrong, too
        raise AssertionError(text)
    return Found(text)


def distance(ours, reference) -> float:
    """The norm of a difference of trees over that of the second one."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    pairs = [[np.asarray(a, np.float64) for a in pair] for pair in pairs]
    total = sum(np.sum(b**2) for _, b in pairs)
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / total))


def on(device, function, *args):
    """Compiles and runs a function on a device; the result is on the host."""
    options = dict(precision="highest", compiler_options=quick(device.platform))
    with jax.default_device(device):
        args = jax.device_put(args, device)
        compiled, _ = compile_program(function, *args, **options)
        return jax.device_get(compiled(*args))


@functools.cache
def official(model: UNet):
    """A function of all arrays, so that networks of one kind are compiled once."""
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args))


def golden(network: str) -> Found:
    """Outputs of a network with random weights beside those of its official code."""
    arrays, (_, model) = golden_unets.golden(network), golden_unets.NETWORKS[network]
    params, worst = golden_unets.our_params(network), 0.0
    for run in ("run0", "run1"):
        args = [arrays[f"{run}/x"], arrays[f"{run}/t"]]
        args += [arrays["y"]] if model.num_classes else []
        args = [jnp.asarray(a) for a in args]
        with jax.default_matmul_precision("highest"):
            found = official(model)(params, *args)
        expected = arrays[f"{run}/output"]
        error = np.abs(found - expected).max() / np.abs(expected).max()
        worst = max(worst, float(error)) if not np.isnan(error) else np.nan
    return within("off by", worst, OUTPUT)


def beside_cpu() -> tuple:
    """The device, and a CPU to compare it with."""
    try:
        return jax.devices()[0], jax.devices("cpu")[0]
    except RuntimeError as error:
        raise Unsupported("JAX_PLATFORMS leaves out the CPU") from error


def step_beside_cpu() -> Found:
    """The update of one train step; of Adam's, the smallest gradients would matter."""
    model, tx = golden_unets.NETWORKS[NETWORK][1], optax.sgd(1.0)
    schedule, sampler = schedules.make_schedule(BETAS), timesteps.uniform(1000)
    step = training.make_train_step(
        model, tx, schedule, diffusion.Objective(), sampler, ema_decays=()
    )
    params = golden_unets.our_params(NETWORK)
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    batch = {"image": image, "label": np.zeros(8, np.int32)}

    def update(key, params, batch):
        state = training.start_state(params, tx, sampler, ())
        state, metrics = step(key, state, batch)
        return jax.tree.map(jnp.subtract, state.params, params), metrics["loss"]

    ours, cpu = (on(d, update, jax.random.key(1), params, batch) for d in beside_cpu())
    return within("update off by", distance(ours, cpu), STEP)


def sampler_beside_cpu() -> Found:
    """Images that DDIM draws from the same keys."""
    model = golden_unets.NETWORKS[NETWORK][1]
    keep = schedules.spaced_steps(1000, STEPS)
    schedule = schedules.make_schedule(BETAS, keep=keep)

    def draw(params, key):
        keys = samplers.image_keys(key, jnp.arange(4))
        model_fn = training.bind(model, params, None)
        denoise_fn = diffusion.denoiser(model_fn, schedule, diffusion.Objective())
        denoise_fn = diffusion.clip_x_0(denoise_fn)
        x_T = samplers.normal(keys, (16, 16, 3))
        return samplers.sample(keys, denoise_fn, samplers.ddim_step, schedule, x_T)

    args = golden_unets.our_params(NETWORK), jax.random.key(1)
    ours, cpu = (on(device, draw, *args) for device in beside_cpu())
    return within("pixels off by", float(np.abs(ours - cpu).max()), IMAGES)


def cudnn_attention() -> Found:
    """Flash attention of cuDNN beside XLA's, with its gradients, masked and not."""
    need_cudnn()
    rng, worst = np.random.default_rng(0), 0.0
    q, k, v, g = jnp.asarray(rng.normal(size=(4, 4, 256, 4, 64)), jnp.bfloat16)
    lengths = jnp.array([256, 2, 130, 0])
    for shown in (None, jnp.arange(256)[None, :] < lengths[:, None]):

        def loss(q, k, v, implementation, shown=shown):
            mask = None
            if shown is not None:  # as in CrossAttention
                mask = shown[:, None, None, :]
                v = jnp.where(shown[:, :, None, None], v, 0)
            h = full_attention(q, k, v, mask, implementation=implementation)
            return jnp.sum((h * g).astype(jnp.float32)), h

        gradient = jax.jit(
            jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3
        )
        ours, xla = (gradient(q, k, v, name) for name in ("cudnn", "xla"))
        worst = max(worst, distance(ours, xla))
    return within("off by", worst, ATTENTION)


def resumed() -> Found:
    """A training that stops and goes on, compiled anew, beside one that does not stop.

    The process must have been started with deterministic operations (`FLAG`).
    """
    if jax.default_backend() == "gpu" and FLAG not in os.environ.get("XLA_FLAGS", ""):
        raise AssertionError(f"XLA_FLAGS must have {FLAG}")
    tx, _ = training.make_optimizer(lr=1e-3, total_steps=100)
    schedule, sampler = schedules.make_schedule(BETAS), timesteps.uniform(1000)
    step = training.make_train_step(
        SMALL, tx, schedule, diffusion.Objective(), sampler, ema_decays=(0.9,)
    )
    key, rng = jax.random.key(1), np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 16, 8, 8, 3), np.uint8)

    def init():
        key = jax.random.key(0)
        return training.init_state(key, SMALL, tx, sampler, (8, 8, 3), (0.9,))

    def train(state, images):
        for image in images:
            batch = {"image": image, "label": np.zeros(len(image), np.int32)}
            state, _ = compiled(key, state, batch)
        return state

    options = quick(jax.default_backend())
    compiled, start = jax.jit(step, compiler_options=options), jax.jit(init)()
    whole = train(start, images)
    with tempfile.TemporaryDirectory() as folder:
        manager = checkpoint.make_manager(folder)
        with checkpoint.closing(manager):
            checkpoint.save(manager, 2, train(start, images[:2]), {})
        manager = checkpoint.make_manager(folder)
        with checkpoint.closing(manager):
            places = jax.tree.map(lambda a: a.sharding, start)
            half, _ = checkpoint.restore_or_init(manager, init, places)
    jax.clear_caches()  # a new process compiles anew, and may find other algorithms
    ours = train(half, images[2:])
    pairs = zip(
        *(jax.tree.leaves(jax.device_get(s)) for s in (ours, whole)), strict=True
    )
    wrong = sum(a.tobytes() != b.tobytes() for a, b in pairs)
    if wrong or int(ours.step) != 4:
        raise AssertionError(f"{wrong} arrays differ after resuming")
    return Found("the same bit for bit")


def resumed_in_a_process(deadline: float) -> Found:
    """`resumed` in a process with deterministic operations; a TPU is for one alone."""
    if jax.default_backend() == "tpu":
        return resumed()
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"
    more = {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if jax.default_backend() == "cpu":
        more["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-m", "tests.benchmarks.accelerator_checks"]
    options = dict(env=os.environ | more, timeout=seconds_left(deadline))
    ended = subprocess.run(command, capture_output=True, text=True, **options)
    lines = (ended.stderr if ended.returncode else ended.stdout).strip().splitlines()
    if ended.returncode:
        raise AssertionError(lines[-1] if lines else f"status {ended.returncode}")
    return Found(lines[-1])


def rows(networks, deadline: float) -> list[Row]:
    """All rows with a verdict, for these golden networks; resumed training is last."""
    checks = {
        f"golden U-Net {name}": functools.partial(golden, name) for name in networks
    }
    checks |= {
        "train step beside the CPU": step_beside_cpu,
        "DDIM beside the CPU": sampler_beside_cpu,
        "cuDNN attention beside XLA's, bfloat16": cudnn_attention,
    }
    resume = functools.partial(resumed_in_a_process, deadline)
    return [
        *(Row(name, "check", run, is_check=True) for name, run in checks.items()),
        Row("resumed training", "resumed", resume, is_check=True, is_elsewhere=True),
    ]


if __name__ == "__main__":
    print(resumed().result)
