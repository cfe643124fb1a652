"""The rows of `tests.benchmarks.accelerator` that have a time."""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_diffusion import config as settings
from jax_diffusion import diffusion, samplers, schedules, training
from jax_diffusion.runtime import device_peaks

from . import roofline

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30


class Found(NamedTuple):
    """What a row tells; an empty cell is left empty."""

    result: str
    share: str = ""  # of the roofline
    compiling: str = ""  # seconds
    program: str = ""  # GiB


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: what is measured or checked.
        group: rows of a group take about the same time.
        run: returns what was found; anything that it raises is printed instead.
        published: numbers of others.
        is_check: whether the exit status depends on it.
        is_elsewhere: whether it runs in a process of its own.
    """

    name: str
    group: str
    run: Callable[[], Found]
    published: str = ""
    is_check: bool = False
    is_elsewhere: bool = False


class Unsupported(Exception):
    """What a device or an installation cannot do; no failure of ours."""


class NoTimeLeft(Exception):
    """A row would not end before the deadline."""


def seconds_left(deadline: float) -> float:
    """Seconds until a deadline of `time.monotonic`; raises NoTimeLeft if none are."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise NoTimeLeft
    return left


def need_cudnn() -> None:
    """Raises Unsupported if the device is not one of CUDA."""
    if "cuda" not in jax.devices()[0].client.platform_version.lower():
        raise Unsupported("cuDNN is for CUDA")


def quick(platform: str) -> dict[str, int] | None:
    """Options of the compiler: a CPU is not measured, so its programs may be slow."""
    return {"xla_backend_optimization_level": 0} if platform == "cpu" else None


class Sizes(NamedTuple):
    """How large everything is.

    Attributes:
        cifar10, imagenet64: side of the images, and what differs from the config file.
        batches: images of a CIFAR-10 step; sampling and PyTorch have the first number.
        imagenet64_batches: the first one that fits is measured.
        attention: images, heads and channels of a head.
        sides: of the images whose pixels attend to each other.
        conv: images, side and channels of the 3 x 3 convolution.
        steps: of DDIM.
        seconds: how long each case is repeated.
    """

    cifar10: tuple[int, tuple[str, ...]]
    imagenet64: tuple[int, tuple[str, ...]]
    batches: tuple[int, ...]
    imagenet64_batches: tuple[int, ...]
    attention: tuple[int, int, int]
    sides: tuple[int, ...]
    conv: tuple[int, int, int]
    steps: int
    seconds: float


SMALLER = tuple(
    f"--config.model.{field}"
    for field in (
        *("channels=8", "multipliers=1,", "num_res_blocks=0", "num_groups=4"),
        *("attention_resolutions=8,", "num_heads=1"),
    )
)
FULL = Sizes(
    cifar10=(32, ()),
    imagenet64=(64, ()),
    batches=(128, 256, 512),
    imagenet64_batches=(64, 32, 16, 8),
    attention=(64, 4, 64),
    sides=(16, 32),
    conv=(128, 32, 128),
    steps=20,
    seconds=1.5,
)
TOY = Sizes(
    cifar10=(8, SMALLER),
    imagenet64=(8, SMALLER),
    batches=(2,),
    imagenet64_batches=(2,),
    attention=(1, 1, 8),
    sides=(2,),
    conv=(1, 8, 4),
    steps=2,
    seconds=0.0,
)

# Words -> dtype of the network, and precision of products of float32.
PRECISIONS = {
    "bfloat16": ("bfloat16", None),
    "TF32": ("float32", "tensorfloat32"),
    "float32": ("float32", "highest"),
}


class Parts(NamedTuple):
    """What a config describes; parameters on the host, of no meaning."""

    model: Any
    tx: Any
    schedule: Any
    objective: Any
    timesteps: Any
    decays: tuple[float, ...]
    params: Any
    shape: tuple[int, int, int]


@functools.cache
def parts(name: str, side: int, overrides: tuple[str, ...]) -> Parts:
    """Reads a config."""
    config = settings.load_config(str(CONFIGS / f"{name}.py"), overrides)
    schedule = settings.make_schedule(config.schedule)
    objective = settings.make_objective(config.objective, schedule)
    model = settings.make_model(config.model, objective, num_channels=3)
    sampler = settings.make_timestep_sampler(config.timesteps, schedule)
    optimizer = dict(config.optimizer, total_steps=config.total_steps)
    tx, _ = training.make_optimizer(**optimizer)
    shape, rng = (side, side, 3), np.random.default_rng(0)

    def init(key):
        return model.init(key, **training.example_inputs(model, shape))["params"]

    def draw(leaf):
        a = rng.standard_normal(leaf.shape, np.float32)
        return a / np.float32(max(1.0, math.prod(leaf.shape[:-1])) ** 0.5)

    params = jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0)))
    decays = tuple(config.ema_decays)
    return Parts(model, tx, schedule, objective, sampler, decays, params, shape)


def compile_program(function, *args, precision=None, **options):
    """Compiles; returns the program, and the seconds that it took."""
    options.setdefault("compiler_options", quick(jax.default_backend()))
    begun = time.perf_counter()
    with jax.default_matmul_precision(precision):
        compiled = jax.jit(function, **options).lower(*args).compile()
    return compiled, time.perf_counter() - begun


def mean_seconds(run: Callable[[], Any], seconds: float) -> float:
    """Mean seconds of a call; calls are repeated for `seconds` and none waits for the
    one before."""
    for _ in range(2):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        once = time.perf_counter() - begun
    count = max(2, min(500, round(seconds / once)))
    begun = time.perf_counter()
    for _ in range(count):
        last = run()
    jax.block_until_ready(last)
    return (time.perf_counter() - begun) / count


def operations(function, *args, platform: str) -> float:
    """Operations of a program, lowered for a platform of JAX and not compiled.

    JAX's clients of CUDA and TPU count only what they have compiled, and there miss
    what XLA hands to cuDNN and cuBLAS. So the client of the CPU counts, for any
    platform; nan if JAX_PLATFORMS leaves it out, or it cannot.
    """
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    try:
        with jax.default_device(jax.devices("cpu")[0]):
            traced = jax.jit(function).trace(*shapes)
            found = traced.lower(lowering_platforms=(platform,)).cost_analysis()
    except RuntimeError:
        return math.nan
    return (found or {}).get("flops", math.nan)


def share(function, args, compiled, dtype: str, elapsed: float) -> str:
    """The least time by the roofline over the time that was needed.

    Operations are those of `operations`. Bytes are those that XLA counts in the
    compiled program, which lack what cuDNN and cuBLAS move: a program that is bound by
    that traffic may have a share that is too small.
    """
    device = jax.devices()[0]
    peak = device_peaks.PEAKS.get(device.device_kind)
    if peak is None:
        return "unknown"
    platform = {"gpu": "cuda"}.get(device.platform, device.platform)
    flops = operations(function, *args, platform=platform)
    if math.isnan(flops):
        return "unknown"
    cost = roofline.cost(compiled)
    cost = cost._replace(flops=flops, bytes=float(np.nan_to_num(cost.bytes)))
    least = roofline.seconds(cost, peak, dtype, overlap=True)
    return f"{least / elapsed:.0%}"


def program_gib(compiled) -> str:
    """Memory that XLA plans for a program: arguments, results and what is between."""
    plan = compiled.memory_analysis()
    if plan is None:
        return "unknown"
    size = plan.argument_size_in_bytes + plan.output_size_in_bytes
    size += plan.temp_size_in_bytes - plan.alias_size_in_bytes
    return f"{size / GIB:.3g}"


def train_step(found: Parts, batch_size: int, kind: str, remat, seconds) -> Found:
    """Forward, backward, optimizer and averages, as `train` compiles them."""
    dtype, precision = PRECISIONS[kind]
    model = found.model.clone(dtype=dtype, remat=remat)
    tx, schedule, objective, timesteps, decays = found[1:6]
    step = training.make_train_step(
        model, tx, schedule, objective, timesteps, ema_decays=decays
    )

    def start(params):
        return training.start_state(params, tx, timesteps, decays)

    state, key = jax.jit(start)(found.params), jax.random.key(1)
    shape = (batch_size, *found.shape)
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    batch = jax.device_put({"image": image, "label": np.zeros(batch_size, np.int32)})
    shapes = jax.eval_shape(lambda *args: args, key, state, batch)
    compiled, compiling = compile_program(
        step, key, state, batch, precision=precision, donate_argnums=1
    )

    def run():
        nonlocal state
        state, metrics = compiled(key, state, batch)
        return metrics

    elapsed = mean_seconds(run, seconds)
    return Found(
        f"{batch_size / elapsed:,.0f} images/s",
        share(step, shapes, compiled, dtype, elapsed),
        f"{compiling:.1f}",
        program_gib(compiled),
    )


def cifar10_step(sizes: Sizes, batch_size: int, kind: str, remat=None) -> Found:
    """`train_step` of configs/cifar10.py."""
    found = parts("cifar10", *sizes.cifar10)
    return train_step(found, batch_size, kind, remat, sizes.seconds)


def imagenet64_step(sizes: Sizes, deadline: float) -> Found:
    """`train_step` of configs/imagenet64.py in bfloat16, of a batch that fits."""
    found, longest = parts("imagenet64", *sizes.imagenet64), 0.0
    for size in sizes.imagenet64_batches:
        if seconds_left(deadline) < longest:
            raise NoTimeLeft
        begun = time.monotonic()
        try:
            row = train_step(found, size, "bfloat16", None, sizes.seconds)
            return row._replace(result=f"{row.result}, batch {size}")
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        longest = max(longest, time.monotonic() - begun)
    raise MemoryError(f"{sizes.imagenet64_batches[-1]} images do not fit")


def sampling(sizes: Sizes, kind: str) -> Found:
    """DDIM of the CIFAR-10 network, all steps in one program."""
    dtype, precision = PRECISIONS[kind]
    found = parts("cifar10", *sizes.cifar10)
    model, batch_size = found.model.clone(dtype=dtype), sizes.batches[0]
    keep = schedules.spaced_steps(1000, sizes.steps)
    schedule = schedules.make_schedule(schedules.linear_betas(1000), keep=keep)
    keys = samplers.image_keys(jax.random.key(1), jnp.arange(batch_size))
    params, x_T = jax.device_put(found.params), samplers.normal(keys, found.shape)

    def draw(params, schedule, keys, x_T):
        model_fn = training.bind(model, params, None)
        denoise_fn = diffusion.denoiser(model_fn, schedule, found.objective)
        denoise_fn = diffusion.clip_x_0(denoise_fn)
        return samplers.sample(keys, denoise_fn, samplers.ddim_step, schedule, x_T)

    args = (params, schedule, keys, x_T)
    compiled, compiling = compile_program(draw, *args, precision=precision)
    elapsed = mean_seconds(lambda: compiled(*args), sizes.seconds)
    rate = f"{batch_size * sizes.steps / elapsed:,.0f} image-steps/s"
    # XLA counts the body of the loop over steps once: no share of the roofline.
    return Found(rate, "", f"{compiling:.1f}", program_gib(compiled))


def backward_ms(function, sizes: Sizes, *arrays, counted=None) -> Found:
    """Milliseconds of a function and its gradient in bfloat16.

    `counted` has the same operations, in a form in which XLA counts them.
    """
    args = [jnp.asarray(a, jnp.bfloat16) for a in arrays]

    def with_gradient(function):
        def loss(*args):
            return jnp.sum(function(*args).astype(jnp.float32) ** 2)

        return jax.value_and_grad(loss, argnums=tuple(range(len(args))))

    compiled, compiling = compile_program(with_gradient(function), *args)
    elapsed = mean_seconds(lambda: compiled(*args), sizes.seconds)
    return Found(
        f"{1000 * elapsed:.3f} ms",
        share(with_gradient(counted or function), args, compiled, "bfloat16", elapsed),
        f"{compiling:.1f}",
        program_gib(compiled),
    )


def attention(sizes: Sizes, side: int, implementation: str) -> Found:
    """`jax.nn.dot_product_attention` of all pixels."""
    if implementation == "cudnn":
        need_cudnn()
    images, heads, channels = sizes.attention
    shape = (3, images, side**2, heads, channels)
    attend, plain = (
        functools.partial(jax.nn.dot_product_attention, implementation=name)
        for name in (implementation, "xla")
    )
    arrays = np.random.default_rng(0).normal(size=shape)
    return backward_ms(attend, sizes, *arrays, counted=plain)


def convolution(sizes: Sizes, layout: str) -> Found:
    """A 3 x 3 convolution with channels last, NHWC, or first, NCHW."""
    images, side, channels = sizes.conv
    size = dict(N=images, H=side, W=side, C=channels)
    kernel = {"NHWC": "HWIO", "NCHW": "OIHW"}[layout]
    window = dict(H=3, W=3, I=channels, O=channels)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[size[axis] for axis in layout])
    weight = rng.normal(size=[window[axis] for axis in kernel])

    def convolve(x, weight):
        numbers = (layout, kernel, layout)
        return lax.conv_general_dilated(
            x, weight, (1, 1), "SAME", dimension_numbers=numbers
        )

    return backward_ms(convolve, sizes, x, weight)


def rows(sizes: Sizes, published: dict[str, str], deadline: float) -> list[Row]:
    """All rows with a time, the most telling first."""
    first, *more = sizes.batches

    def step(kind, batch_size, remat=None):
        name = f"CIFAR-10 step, {kind}, batch {batch_size}"
        run = functools.partial(cifar10_step, sizes, batch_size, kind, remat)
        name += ", remat" if remat else ""
        told = published["step"] if kind == "bfloat16" and not remat else ""
        return Row(name, "step", run, told)

    def draw(kind):
        run = functools.partial(sampling, sizes, kind)
        told = published["draw"] if kind == "bfloat16" else ""
        return Row(f"CIFAR-10 DDIM, {kind}", "draw", run, told)

    attend = [
        Row(
            f"attention of {side} x {side}, {implementation}",
            "operation",
            functools.partial(attention, sizes, side, implementation),
        )
        for side in sizes.sides
        for implementation in ("xla", "cudnn")
    ]
    convolve = [
        Row(
            f"3 x 3 convolution, {layout}",
            "operation",
            functools.partial(convolution, sizes, layout),
        )
        for layout in ("NHWC", "NCHW")
    ]
    imagenet64 = functools.partial(imagenet64_step, sizes, deadline)
    return [
        *(step("bfloat16", first), draw("bfloat16"), step("TF32", first)),
        *(*attend, *convolve),
        step("bfloat16", first, "nothing_saveable"),
        Row("ImageNet-64 step, bfloat16", "large", imagenet64),
        step("float32", first),
        *(step(kind, size) for size in more for kind in PRECISIONS),
        draw("float32"),
    ]
