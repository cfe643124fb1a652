"""Minutes until the annotated DDPM has learned something, here and in its original.

    python -m tests.benchmarks.tutorial [--torch-python PYTHON] [--original]

The setting is that of the text (Rogge & Rasul 2022, first edition): Fashion-MNIST with
flips in batches of 128, T = 200, betas from 1e-4 to 0.02 as they are, eps predicted,
Huber loss, Adam 1e-3. Two networks are trained as `jax_diffusion.train` does until the
mean loss of the last 20 steps is below --loss: the text's own one ("annotated") and
that of configs/fashion_mnist.py, without labels ("default"). The original's time is
--original-steps times the seconds of a step in the best of PyTorch's eager mode,
channels-last and `torch.compile`, which take turns; --original trains it, too, and
prints its own steps.

Then 64 images are drawn by ancestral sampling. All 200 steps cost the same, so that
rounds of 10 of them are timed, both sides in turns.

The last line has ratios, ours over the original's: `loss_*` of the seconds of our
training loop, without compilation and reading of data, and `sample_*`. Leave the
machine alone while it runs, 40 minutes on two cores and another 20 with --original.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from jax_diffusion.runtime import cpu

cpu.tune()  # as the programs do

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from jax_diffusion import config as configs  # noqa: E402
from jax_diffusion import diffusion, samplers, training  # noqa: E402
from jax_diffusion.models import init_params  # noqa: E402
from jax_diffusion.training import setup as setups  # noqa: E402
from tests.benchmarks import worker  # noqa: E402
from tests.benchmarks.unet import HERE, MODES, time_in_turns  # noqa: E402

NETWORKS = {"annotated": "fashion_mnist_annotated", "default": "fashion_mnist"}
DATA = "/usr/share/datasets/fashion-mnist"
WINDOW = 20  # steps whose mean loss counts
IMAGES, STEPS, TIMED_STEPS = 64, 200, 10  # of sampling


class Training(NamedTuple):
    """What it took to reach the loss, or not to reach it.

    Attributes:
        reached: whether the loss was reached.
        losses: of each step.
        seconds: of each step, its batch included.
        load_seconds: until the data were in memory.
        compile_seconds: of the train step and the first parameters.
    """

    reached: bool
    losses: list[float]
    seconds: list[float]
    load_seconds: float
    compile_seconds: float

    def __str__(self) -> str:
        mean = statistics.fmean(self.losses[-WINDOW:])
        return (
            f"loss {mean:.4f}{'' if self.reached else ' (not reached)'} after "
            f"{len(self.seconds)} steps, {sum(self.seconds):.1f} s, median "
            f"{statistics.median(self.seconds):.4f} s a step, besides "
            f"{self.compile_seconds:.1f} s of compilation and "
            f"{self.load_seconds:.1f} s of reading data"
        )


def load_config(name: str, data: str = DATA) -> configs.Config:
    """The text's config, its own betas included, with the network of another config."""
    folder = HERE.parents[1] / "configs"
    changes = [f"--config.data.path={data}"]
    config = configs.load_config(folder / f"{NETWORKS['annotated']}.py", changes)
    config.model = configs.load_config(folder / f"{NETWORKS[name]}.py").model
    if "num_classes" in config.model:
        del config.model.num_classes
    return config


def train(config: configs.Config, loss: float, max_steps: int) -> Training:
    """Trains until the mean of the last losses is below `loss`."""
    begun = time.perf_counter()
    setup = setups.make_setup(config)
    loaded = time.perf_counter()
    compiled = setups.compile_step(setup, fresh=True)
    state = compiled.init()
    cpu.release_memory()
    found = Training(
        False, [], [], loaded - begun, compile_seconds=time.perf_counter() - loaded
    )
    with contextlib.closing(setup.batches.stream(0, setup.rows)) as batches:
        while len(found.losses) < max_steps:
            begun = time.perf_counter()
            batch = setup.place(next(batches))
            state, metrics = compiled.step(setup.key, state, batch)
            found.losses.append(float(metrics["loss"]))
            found.seconds.append(time.perf_counter() - begun)
            last = found.losses[-WINDOW:]
            if len(last) == WINDOW and statistics.fmean(last) < loss:
                return found._replace(reached=True)
            if len(found.losses) == 2:
                cpu.release_memory()  # as `train` does
            if len(found.losses) % 50 == 0:
                print(f"  {found}", flush=True)
    return found


def ancestral(name: str) -> worker.Case:
    """The last steps of ancestral sampling, with parameters of no meaning."""
    schedule, objective, model = configs.build(load_config(name), 1)
    shape, quick = (28, 28, 1), {"xla_backend_optimization_level": "0"}
    init = jax.jit(lambda key: init_params(model, key, shape), compiler_options=quick)
    params = init(jax.random.key(0))
    keys = samplers.image_keys(jax.random.key(1), jnp.arange(IMAGES))
    x_T, ts = samplers.normal(keys, shape), jnp.arange(TIMED_STEPS)[::-1]

    @jax.jit
    def draw(params, schedule, keys, x_T):
        model_fn = training.bind(model, params, None)
        denoise_fn = diffusion.denoiser(model_fn, schedule, objective)
        step_fn = samplers.ddpm_step
        return samplers.sample(keys, denoise_fn, step_fn, schedule, x_T, ts=ts)

    return lambda: jax.block_until_ready(draw(params, schedule, keys, x_T))


def time_to_loss(
    args: argparse.Namespace, names: list[str], theirs: list[str]
) -> dict[str, float]:
    """Times PyTorch's step, trains our networks; ratios by name."""
    sides = {mode: (theirs, f"annotated_step/{mode}") for mode in MODES}
    times = time_in_turns(sides, args.rounds)
    best = min(times, key=times.__getitem__)
    original = args.original_steps * times[best]
    print("PyTorch, a step:", *(f"{mode} {t:.4f} s" for mode, t in times.items()))
    print(f"original: {args.original_steps} x {times[best]:.4f} s = {original:.1f} s")
    ratios = {}
    for name in names:
        found = train(load_config(name, args.data), args.loss, args.max_steps)
        print(f"{name}: {found}", flush=True)
        if found.reached:
            ratios[f"loss_{name}"] = sum(found.seconds) / original
    if args.original:
        limits = args.data, str(args.loss), str(args.max_steps), best
        subprocess.run([*theirs, *limits], check=True)
    return ratios


def time_sampling(args: argparse.Namespace, theirs: list[str]) -> dict[str, float]:
    """Times both sides' sampling; ratios by name."""
    ours = [sys.executable, "-m", "tests.benchmarks.tutorial", "--serve"]
    sides = {name: (ours, name) for name in NETWORKS}
    sides |= {mode: (theirs, f"ancestral/{mode}") for mode in MODES}
    times = time_in_turns(sides, args.rounds)
    rates = {side: IMAGES * TIMED_STEPS / STEPS / t for side, t in times.items()}
    print("images/s:", *(f"{side} {r:.2f}" for side, r in rates.items()), flush=True)
    best = min(times[mode] for mode in MODES)
    return {f"sample_{name}": times[name] / best for name in NETWORKS}


def main() -> None:
    """Prints a line for each thing measured, and all ratios in the last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=DATA, help="folder of the four IDX files")
    parser.add_argument("--loss", type=float, default=0.060)
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--original-steps", type=int, default=470)
    parser.add_argument("--original", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--only", default="default,annotated,sample")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        worker.serve({name: lambda name=name: ancestral(name) for name in NETWORKS})
        return
    wanted, ratios = args.only.split(","), {}
    theirs = [args.torch_python, str(HERE / "tutorial_pytorch.py")]
    names = [name for name in wanted if name in NETWORKS]
    if names or args.original:
        ratios |= time_to_loss(args, names, theirs)
    if "sample" in wanted:
        ratios |= time_sampling(args, theirs)
    print(*(f"{name}={ratio:.2f}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    main()
