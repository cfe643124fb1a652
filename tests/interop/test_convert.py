"""Checkpoints in and runs out, and what the other side then computes."""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from support.jobs import evaluations
from support.peers import peer
from support.programs import convert, evaluate, failure, run_main, sample
from support.tiny_files import MODEL, save_like_diffusers
from support.tiny_runs import random_params

import jax_diffusion as jd
from jax_diffusion import config as settings
from jax_diffusion import data, diffusion, samplers, training
from jax_diffusion import pipeline as runs
from jax_diffusion.interop import (
    diffusers_config,
    exporting,
    importing,
    safetensors_files,
    torch_files,
)
from jax_diffusion.interop import layouts as weights
from jax_diffusion.interop.released import Released
from jax_diffusion.runtime import checkpoint

# diffusers warns of this and that while it is imported.
with_diffusers = pytest.mark.filterwarnings("default")

SIZE = 8
SCHEDULE = dict(name="cosine", num_steps=20)
EPS = dict(mean_type="eps", var_type="learned_range", loss="hybrid")
DATA = dict(name="digits", batch_size=16)


def config_of(model=None, schedule=None, objective=EPS, data=None):
    """A config of a run on 8 x 8 images."""
    sampling = dict(sampler="ddim", steps=2, spacing="sections", eta=0.0, n=4)
    return dict(
        seed=0,
        data=data or DATA,
        schedule=schedule or SCHEDULE,
        objective=objective,
        timesteps=dict(name="uniform"),
        model=MODEL | (model or {}),
        optimizer=dict(lr=1e-3),
        ema_decays=(0.99,),
        ema_warmup=True,
        total_steps=10,
        log_every=5,
        save_every=5,
        sample_every=5,
        sampling=sampling if objective else None,
    )


def make_run(workdir, *, image_shape=(SIZE, SIZE, 1), **changes):
    """A run as training leaves it, its only average random."""
    config = config_of(**changes)
    model = settings.build(config, image_shape[-1]).model
    params = random_params(model, image_shape)
    record = dict(config=json.loads(ConfigDict(config).to_json()), window=[])
    record["image_shape"] = list(image_shape)
    state = {"params": jax.tree.map(np.zeros_like, params)}
    state["ema_params"] = {"0.99": params}
    with checkpoint.make_manager(workdir) as manager:
        checkpoint.save(manager, 10, state, record)
    return workdir


@pytest.fixture
def program(monkeypatch):
    """Runs `convert` with its arguments."""
    return lambda *args: run_main(monkeypatch, convert, *args)


@pytest.fixture
def fails(monkeypatch, capsys):
    """Runs a program that must print one sentence and exit with 2; returns it."""

    return functools.partial(failure, monkeypatch, capsys)


def images(channels=1, n=2):
    rng = np.random.default_rng(1)
    return rng.normal(size=(n, SIZE, SIZE, channels)).astype(np.float32)


T = np.array([0.0, 17.0], np.float32)
LABEL = np.array([1, 3], np.int32)


def output(run, x, t=T, label=LABEL):
    model_fn = training.bind(run.model, run.params, jnp.asarray(label))
    fast = {"xla_backend_optimization_level": 0}  # to compile, that is
    return np.asarray(jax.jit(model_fn, compiler_options=fast)(x, t))


def assert_same_output(ours, theirs):
    """The difference is below 1e-4 of what it differs from."""
    difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert difference < 1e-4, difference


def trees_equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


# diffusers: in


def their_output(unet, x, t=T, label=None):
    torch = pytest.importorskip("torch")
    label = None if label is None else torch.tensor(label)
    with torch.no_grad():
        x = torch.tensor(x).permute(0, 3, 1, 2)
        y = unet(x, torch.tensor(t), class_labels=label).sample
    return y.permute(0, 2, 3, 1).numpy()


@pytest.mark.slow
@with_diffusers
@pytest.mark.parametrize("kind", ["safetensors", "bin", "flat", "old names"])
def test_a_folder_of_diffusers_computes_the_same_here(kind, tmp_path, program):
    unet = save_like_diffusers(tmp_path / "hub", kind == "safetensors")
    source = tmp_path / "hub"
    if kind == "flat":  # as google/ddpm-cifar10-32 lies on the hub
        source = shutil.copytree(tmp_path / "hub" / "unet", tmp_path / "flat")
        shutil.copy(tmp_path / "hub" / "scheduler" / "scheduler_config.json", source)
    if kind == "old names":
        file = source / "unet" / "diffusion_pytorch_model.bin"
        tensors = torch_files.read_torch(file)
        pairs = {new: old for old, new in weights.OLD_DIFFUSERS.items()}
        for new, old in pairs.items():
            tensors = {name.replace(new, old): a for name, a in tensors.items()}
        assert any(".query." in name for name in tensors)
        torch_files.write_torch(file, tensors)
    program("--checkpoint", source, "--workdir", tmp_path / "run")
    run = runs.load_run(tmp_path / "run")
    assert_same_output(output(run, images(3)), their_output(unet, images(3)))
    assert run.image_shape == (SIZE, SIZE, 3)
    schedule = settings.make_schedule(run.config.schedule)
    assert schedule.num_steps == 20
    assert run.objective.var_type == "fixed_small"


@pytest.mark.slow
@with_diffusers
@pytest.mark.parametrize(
    "options",
    [
        dict(flip_sin_to_cos=True, freq_shift=0, downsample_padding=1),
        dict(resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4),
        dict(attention_head_dim=4),
        dict(num_class_embeds=5, out_channels=3),
    ],
    ids=str,
)
def test_every_switch_of_diffusers_computes_the_same(options, tmp_path, program):
    unet = save_like_diffusers(tmp_path / "hub", True, **options)
    program("--checkpoint", tmp_path / "hub", "--workdir", tmp_path / "run")
    run = runs.load_run(tmp_path / "run")
    label = LABEL if "num_class_embeds" in options else None
    theirs = their_output(unet, images(3), label=label)
    assert_same_output(output(run, images(3)), theirs)


@pytest.mark.slow
@with_diffusers
@pytest.mark.parametrize(
    "options",
    [
        dict(beta_schedule="linear"),
        dict(beta_schedule="scaled_linear", beta_end=0.03),
        dict(beta_schedule="sigmoid"),
        dict(beta_schedule="squaredcos_cap_v2"),
        dict(beta_schedule="linear", rescale_betas_zero_snr=True),
        dict(trained_betas=np.linspace(0.1, 0.3, 20).tolist()),
    ],
    ids=str,
)
def test_schedules_of_diffusers_are_known(options):
    diffusers = peer("diffusers")
    kinds = dict(num_train_timesteps=20, prediction_type="v_prediction")
    kinds["variance_type"] = "fixed_large"
    scheduler = diffusers.DDPMScheduler(**kinds, **options)
    schedule, objective = diffusers_config.process_from_scheduler(scheduler.config)
    betas = settings.make_betas(schedule)
    np.testing.assert_allclose(betas, scheduler.betas.numpy(), rtol=1e-3, atol=1e-7)
    assert objective == dict(mean_type="v", var_type="fixed_large", loss="l2")


@pytest.mark.slow
@with_diffusers
def test_a_converted_folder_is_sampled_and_scored(tmp_path, program, monkeypatch):
    save_like_diffusers(tmp_path / "hub", True)
    program("--checkpoint", tmp_path / "hub", "--workdir", tmp_path / "run")
    options = ("--n", 3, "--steps", 2)
    where = ("--workdir", tmp_path / "run")
    run_main(monkeypatch, sample, *where, "--out", tmp_path / "a.npz", *options)
    with np.load(tmp_path / "a.npz") as found:
        assert found["arr_0"].shape == (3, SIZE, SIZE, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (30, SIZE, SIZE, 3))
    np.savez(tmp_path / "data.npz", pixels.astype(np.uint8))
    data = ("--data", f"npz:{tmp_path / 'data.npz'}", "--metrics", "bpd")
    run_main(monkeypatch, evaluate, *where, *data)
    (found,) = evaluations(tmp_path / "run")
    assert found["images"]["bits_per_dim"] == 3
    assert np.isfinite(found["scores"]["bits_per_dim"])


# diffusers: out


@pytest.mark.slow
@with_diffusers
@pytest.mark.parametrize(
    ("changes", "channels"),
    [
        (dict(), 1),
        (dict(model=dict(num_heads=2), objective=dict(mean_type="x_0")), 3),
        (dict(model=dict(head_channels=4, num_classes=5)), 1),
        (
            dict(
                model=dict(
                    scale_shift=False,
                    embedding_order="sin_cos",
                    embedding_endpoint=True,
                    down_padding="bottom_right",
                    norm_epsilon=1e-6,
                ),
                objective=dict(mean_type="v", var_type="fixed_small"),
                schedule=SCHEDULE | dict(zero_terminal_snr=True),
            ),
            3,
        ),
    ],
    ids=["digits", "heads", "head channels and classes", "ho"],
)
def test_a_run_computes_the_same_in_diffusers(changes, channels, tmp_path, program):
    diffusers = peer("diffusers")
    torch = pytest.importorskip("torch")
    shape = (SIZE, SIZE, channels)
    make_run(tmp_path / "run", image_shape=shape, **changes)
    program("--workdir", tmp_path / "run", "--to", "diffusers", "--out", tmp_path / "d")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "d")
    run = runs.load_run(tmp_path / "run")
    label = LABEL if training.num_classes(run.model) else None
    x = images(channels)
    theirs = their_output(pipeline.unet.eval(), x, label=label)
    ours = output(run, x)
    assert_same_output(ours, theirs)

    scheduler, schedule = (
        pipeline.scheduler,
        settings.make_schedule(run.config.schedule),
    )
    np.testing.assert_allclose(scheduler.betas.numpy(), schedule.betas, rtol=1e-6)
    np.testing.assert_array_equal(scheduler.timesteps.numpy()[::-1], schedule.timesteps)
    assert scheduler.config.variance_type == run.objective.var_type
    # A step from t > 0: our mean, and our deviation times the noise that they draw.
    t = 7
    torch_x, torch_y = (torch.tensor(a).permute(0, 3, 1, 2) for a in (x, ours))
    step = scheduler.step(torch_y, t, torch_x, generator=torch.manual_seed(0))
    noise = torch.randn(torch_x.shape, generator=torch.manual_seed(0))
    mean, std = our_step(run, schedule, x, ours, t)
    found = step.prev_sample.permute(0, 2, 3, 1).numpy()
    expected = mean + std * noise.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


FLOW = dict(
    schedule=dict(name="flow", num_steps=1000),
    objective=dict(mean_type="flow", var_type="fixed_small"),
)
EDM = dict(
    schedule=dict(name="edm", num_steps=1000, sigma_max=40.0),
    objective=dict(mean_type="x_0", weighting="edm", sigma_data=0.6, precondition=True),
)


@pytest.mark.slow
@with_diffusers
def test_a_flow_draws_the_same_images_in_the_pipeline_of_diffusers(tmp_path, program):
    diffusers, torch = peer("diffusers"), pytest.importorskip("torch")
    make_run(tmp_path / "run", image_shape=(SIZE, SIZE, 3), **FLOW)
    program("--workdir", tmp_path / "run", "--to", "diffusers", "--out", tmp_path / "d")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "d")
    pipeline.set_progress_bar_config(disable=True)
    seeded = torch.manual_seed(0)
    drawn = pipeline(2, seeded, num_inference_steps=10, output_type="np").images
    x_T = torch.randn((2, 3, SIZE, SIZE), generator=torch.manual_seed(0))
    x = our_samples(tmp_path / "run", x_T.permute(0, 2, 3, 1).numpy(), 10)
    np.testing.assert_allclose(drawn, np.clip(x / 2 + 0.5, 0, 1), rtol=0, atol=1e-4)


@pytest.mark.slow
@with_diffusers
@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("EDMEulerScheduler", "ddim"),
        ("EDMDPMSolverMultistepScheduler", "dpmpp_2m"),
    ],
)
def test_edm_draws_the_same_images_with_schedulers_of_diffusers(
    name, sampler, tmp_path, program
):
    diffusers, torch = peer("diffusers"), pytest.importorskip("torch")
    make_run(tmp_path / "run", image_shape=(SIZE, SIZE, 3), **EDM)
    program("--workdir", tmp_path / "run", "--to", "diffusers", "--out", tmp_path / "d")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "d", subfolder="unet")
    kind = getattr(diffusers, name)
    scheduler = kind.from_pretrained(tmp_path / "d", subfolder="scheduler")
    scheduler.set_timesteps(10)
    x_T = 40 * np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3))
    x = torch.tensor(x_T, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x).prev_sample
    ours = our_samples(tmp_path / "run", np.float32(x_T), 10, sampler)
    assert_same_output(ours, x.permute(0, 2, 3, 1).numpy())


def our_samples(workdir, x_T, steps, sampler="ddim"):
    """What a run draws from x_T, nothing clipped."""
    run = runs.load_run(workdir)
    schedule = settings.make_schedule(run.config.schedule, steps=steps)
    model_fn = training.bind(run.model, run.params, None)
    denoise_fn = diffusion.denoiser(model_fn, schedule, run.objective)
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(len(x_T)))
    step_fn = samplers.SAMPLERS[sampler].step
    draw = jax.jit(lambda x: samplers.sample(keys, denoise_fn, step_fn, schedule, x))
    return np.asarray(draw(jnp.asarray(x_T)))


@pytest.mark.parametrize("changes", [FLOW, EDM], ids=["flow", "edm"])
def test_a_process_of_levels_comes_back_from_a_folder(changes, tmp_path, program):
    make_run(tmp_path / "run", **changes)
    program("--workdir", tmp_path / "run", "--to", "diffusers", "--out", tmp_path / "d")
    program("--checkpoint", tmp_path / "d", "--workdir", tmp_path / "back")
    run, back = (runs.load_run(tmp_path / name) for name in ("run", "back"))
    tables = [settings.make_schedule(r.config.schedule) for r in (run, back)]
    assert trees_equal(*tables) and trees_equal(run.params, back.params)
    names = ("mean_type", "precondition", "sigma_data")
    for name in names[: 3 if run.objective.precondition else 2]:
        assert getattr(run.objective, name) == getattr(back.objective, name)


def our_step(run, schedule, x, y, t):
    """Mean and standard deviation of x_{t-1}, x_0 clipped."""
    t = jnp.full(len(x), t, jnp.int32)
    denoise_fn = diffusion.denoiser(lambda *_: jnp.asarray(y), schedule, run.objective)
    predicted = diffusion.clip_x_0(denoise_fn)(jnp.asarray(x), t)
    mean, _ = diffusion.q_posterior(schedule, predicted.x_0, jnp.asarray(x), t)
    return np.asarray(mean), np.exp(0.5 * np.asarray(predicted.log_var))


@pytest.mark.slow
@with_diffusers
def test_the_pipeline_of_diffusers_draws_from_a_run(tmp_path, program):
    diffusers = peer("diffusers")
    make_run(tmp_path / "run", image_shape=(SIZE, SIZE, 3))
    program("--workdir", tmp_path / "run", "--to", "diffusers", "--out", tmp_path / "d")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "d")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    assert drawn.shape == (2, SIZE, SIZE, 3) and np.isfinite(drawn).all()


def test_a_folder_for_diffusers_comes_back(tmp_path, program):
    changes = dict(model=dict(head_channels=4, num_classes=5))
    make_run(tmp_path / "run", image_shape=(SIZE, SIZE, 3), **changes)
    program("--workdir", tmp_path / "run", "--to", "diffusers", "--out", tmp_path / "d")
    program("--checkpoint", tmp_path / "d", "--workdir", tmp_path / "back")
    run, back = (runs.load_run(tmp_path / name) for name in ("run", "back"))
    assert trees_equal(run.params, back.params)
    np.testing.assert_allclose(
        *(settings.make_betas(r.config.schedule) for r in (run, back))
    )
    assert run.objective == back.objective


# OpenAI


def openai_run(workdir, **changes):
    model = dict(channels=32, num_groups=32, num_heads=2, num_classes=5)
    return make_run(workdir, image_shape=(SIZE, SIZE, 3), model=model | changes)


@pytest.mark.slow
def test_a_run_for_improved_diffusion_and_back(tmp_path, program, monkeypatch):
    openai_run(tmp_path / "run")
    out = tmp_path / "new" / "a.pt"
    program("--workdir", tmp_path / "run", "--to", "openai", "--out", out)
    flags = json.loads(out.with_suffix(".json").read_text())
    assert flags == exporting.openai_arguments(runs.load_run(tmp_path / "run"))
    assert flags["model"] == dict(
        in_channels=3,
        model_channels=32,
        out_channels=6,
        num_res_blocks=1,
        attention_resolutions=[2],
        channel_mult=[1, 2],
        num_heads=2,
        num_classes=5,
        use_scale_shift_norm=True,
        dropout=0.0,
    )
    betas = flags["diffusion"].pop("betas")
    np.testing.assert_array_equal(betas, settings.make_betas(SCHEDULE))
    assert flags["diffusion"] == dict(
        model_mean_type="EPSILON",
        model_var_type="LEARNED_RANGE",
        rescale_timesteps=False,
    )
    back_by_name(tmp_path, program, monkeypatch, out, "--name", "tiny")
    torch = pytest.importorskip("torch")
    state_dict = torch.load(out, weights_only=True)
    assert state_dict["input_blocks.0.0.weight"].shape == (32, 3, 3, 3)
    assert state_dict["middle_block.1.qkv.weight"].shape == (192, 64, 1)


TINY = Released(
    "openai",
    SIZE,
    MODEL | dict(channels=32, num_groups=32, num_heads=2, num_classes=5),
    SCHEDULE,
    EPS,
    dict(name="synthetic", image_size=SIZE, batch_size=16),
)


def back_by_name(tmp_path, program, monkeypatch, file, *args):
    """Converts a file of `openai_run` by the registry; it must be as it was."""
    monkeypatch.setitem(importing.RELEASED, "tiny", TINY)
    program("--checkpoint", file, "--workdir", tmp_path / "back", *args)
    run, back = (runs.load_run(tmp_path / name) for name in ("run", "back"))
    assert trees_equal(run.params, back.params)
    assert (run.model, run.objective) == (back.model, back.objective)
    assert back.ema == "none" and back.image_shape == (SIZE, SIZE, 3)
    return back


def openai_tensors(tmp_path):
    openai_run(tmp_path / "run")
    return exporting.state_dict(runs.load_run(tmp_path / "run"), "openai")


@pytest.mark.slow
def test_a_file_is_known_by_its_name_and_then_used(
    tmp_path, program, monkeypatch, capsys
):
    torch_files.write_torch(tmp_path / "tiny.pt", openai_tensors(tmp_path))
    run = back_by_name(tmp_path, program, monkeypatch, tmp_path / "tiny.pt")
    count = sum(a.size for a in jax.tree.leaves(run.params))
    assert f"{count:,} parameters of a unet" in capsys.readouterr().out
    where = ("--workdir", tmp_path / "back")
    out = ("--out", tmp_path / "a.npz", "--n", 4, "--steps", 2)
    run_main(monkeypatch, sample, *where, *out)
    with np.load(tmp_path / "a.npz") as found:
        np.testing.assert_array_equal(found["arr_1"], range(4))


def average(tensors):
    return {f"module.{name}": array for name, array in tensors.items()}


def other(tensors):
    return {f"module.{name}": array + 1 for name, array in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: [
            other(t),
            {"state": {}, "param_groups": [{"lr": 0.1}]},
            3,
            9,
            average(t),
        ],
        lambda t: {"step": 3, "model": other(t), "ema": average(t), "opt": {"lr": 1.0}},
        lambda t: {"state_dict": average(t), "epoch": 7},
        lambda t: {"model": average(t)},
    ],
    ids=["ddim", "ema", "state_dict", "model"],
)
def test_the_average_in_a_training_checkpoint_is_found(
    wrap, tmp_path, program, monkeypatch
):
    torch = pytest.importorskip("torch")
    tree = wrap(openai_tensors(tmp_path))
    as_torch = jax.tree.map(
        lambda a: torch.tensor(a) if isinstance(a, np.ndarray) else a, tree
    )
    torch.save(as_torch, tmp_path / "tiny.ckpt")
    back_by_name(tmp_path, program, monkeypatch, tmp_path / "tiny.ckpt")


@pytest.mark.slow
def test_other_safetensors_are_known_by_name(tmp_path, program, monkeypatch):
    tensors, file = openai_tensors(tmp_path), tmp_path / "tiny.safetensors"
    safetensors_files.write_safetensors(file, tensors, {"format": "pt"})
    back_by_name(tmp_path, program, monkeypatch, file)


CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({config!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["openai", "openai_new", "ddpm", "diffusers"])
def test_a_network_of_ones_own_is_described_by_a_config(layout, tmp_path, program):
    changes = dict(model=dict(scale_shift=False, num_heads=2))
    make_run(tmp_path / "run", **changes)
    run = runs.load_run(tmp_path / "run")
    (tmp_path / "config.py").write_text(CONFIG.format(config=config_of(**changes)))
    wanted = weights.leaves(run.params, layout, lambda channels: 2)
    file = tmp_path / "own.pth"
    torch_files.write_torch(file, weights.to_torch(run.params, wanted))
    program(
        *("--checkpoint", file, "--workdir", tmp_path / "back"),
        *("--config", tmp_path / "config.py", "--layout", layout),
    )
    back = runs.load_run(tmp_path / "back")
    assert trees_equal(run.params, back.params) and back.model == run.model


@pytest.mark.slow
def test_a_classifier_is_converted(tmp_path, program, monkeypatch):
    model = dict(name="encoder", num_labels=10, pool="attention", num_heads=2)
    config = config_of(model=model, objective=None)
    model = settings.build(config, 1).model
    params = random_params(model, (SIZE, SIZE, 1))
    wanted = weights.leaves(params, "openai", lambda channels: 2)
    file = tmp_path / "classifier.pt"
    torch_files.write_torch(file, weights.to_torch(params, wanted))
    (tmp_path / "config.py").write_text(CONFIG.format(config=config))
    program(
        *("--checkpoint", file, "--workdir", tmp_path / "back"),
        *("--config", tmp_path / "config.py"),
    )
    back = runs.load_run(tmp_path / "back")
    assert trees_equal(params, back.params)
    assert back.model == model and back.objective is None
    run_main(monkeypatch, evaluate, "--workdir", tmp_path / "back")
    (found,) = evaluations(tmp_path / "back")
    assert 0 <= found["scores"]["accuracy"] <= 1


# Our own .safetensors


@pytest.mark.parametrize("ema", [None, "none"])
def test_safetensors_and_back_is_bit_exact(ema, tmp_path, program):
    make_run(tmp_path / "run", schedule=SCHEDULE | dict(rescale_timesteps=True))
    out, options = tmp_path / "new" / "a.safetensors", ["--ema", ema] if ema else []
    program(
        "--workdir", tmp_path / "run", "--to", "safetensors", "--out", out, *options
    )
    program("--checkpoint", out, "--workdir", tmp_path / "back")
    run, back = (
        runs.load_run(tmp_path / "run", ema),
        runs.load_run(tmp_path / "back"),
    )
    assert trees_equal(run.params, back.params)
    assert bool(np.any(back.params["conv_in"]["kernel"])) == (ema is None)
    assert (run.model, run.objective) == (back.model, back.objective)
    assert run.config.schedule == back.config.schedule


@pytest.mark.slow
def test_annotated_networks_come_back_from_safetensors_too(tmp_path, program):
    config = config_of(objective=dict(mean_type="eps", loss="huber"))
    config["model"] = dict(name="annotated", channels=16, multipliers=(1, 2))
    params = random_params(settings.build(config, 1).model, (SIZE, SIZE, 1))
    record = dict(config=config, image_shape=(SIZE, SIZE, 1), window=[])
    checkpoint.save_params(
        tmp_path / "run", params, record | dict(config=config | dict(ema_decays=()))
    )
    out = tmp_path / "a.safetensors"
    program("--workdir", tmp_path / "run", "--to", "safetensors", "--out", out)
    program("--checkpoint", out, "--workdir", tmp_path / "back")
    assert trees_equal(params, runs.load_run(tmp_path / "back").params)


def test_safetensors_with_other_parameters_are_refused(tmp_path, program, fails):
    make_run(tmp_path / "run")
    out = tmp_path / "a.safetensors"
    program("--workdir", tmp_path / "run", "--to", "safetensors", "--out", out)
    tensors, metadata = safetensors_files.read_safetensors(out)
    tensors["new.kernel"] = tensors.pop("conv_in.bias")
    safetensors_files.write_safetensors(out, tensors, metadata)
    back = tmp_path / "back"
    error = fails(convert, "--checkpoint", out, "--workdir", back)
    assert "conv_in.bias (8,) is missing" in error and not back.exists()
    assert "new.kernel (8,) is unexpected" in error


def test_load_checkpoint_is_convert_and_load_run_without_a_workdir(tmp_path, program):
    config = config_of(model=dict(num_classes=3), objective=EPS | dict(mean_type="v"))
    make_run(tmp_path / "run", model=dict(num_classes=3))
    out = tmp_path / "a.safetensors"
    program("--workdir", tmp_path / "run", "--to", "safetensors", "--out", out)
    program("--checkpoint", out, "--workdir", tmp_path / "back")
    before = sorted(tmp_path.rglob("*"))
    run, back = jd.load_checkpoint(out), jd.load_run(tmp_path / "back")
    assert sorted(tmp_path.rglob("*")) == before and run.workdir is None
    assert trees_equal(run.params, back.params) and run.config == back.config
    assert (run.model, run.objective) == (back.model, back.objective)
    assert (run.image_shape, run.ema, run.step) == (back.image_shape, "none", 0)

    tensors = exporting.state_dict(run, "openai")
    torch_files.write_torch(tmp_path / "mine.pt", tensors)
    mine = jd.load_checkpoint(tmp_path / "mine.pt", config=config)
    assert trees_equal(mine.params, run.params)
    assert mine.objective.mean_type == "v"  # as the config says


def test_read_checkpoint_is_what_load_checkpoint_builds_of(tmp_path, program):
    make_run(tmp_path / "run", model=dict(num_classes=3))
    out = tmp_path / "a.safetensors"
    program("--workdir", tmp_path / "run", "--to", "safetensors", "--out", out)
    params, config, image_shape = importing.read_checkpoint(out)
    run = jd.load_checkpoint(out)
    assert trees_equal(params, run.params) and image_shape == run.image_shape
    assert settings.build(config, image_shape[-1]).model == run.model


# Mistakes


@pytest.mark.slow
def test_what_improved_diffusion_cannot_compute_is_named(tmp_path, fails):
    cases = [
        (
            dict(num_groups=16, norm_epsilon=1e-6),
            "num_groups = 16, norm_epsilon = 1e-06",
        ),
        (dict(resample="resblock", head_channels=8), "head_channels = 8"),
        (dict(multipliers=(2, 3)), r"multipliers = (2, 3)"),
        (dict(down_padding="bottom_right"), "down_padding = 'bottom_right'"),
        (dict(block_size=2), "block_size = 2"),
    ]
    for i, (changes, words) in enumerate(cases):
        workdir, out = openai_run(tmp_path / str(i), **changes), tmp_path / "a.pt"
        error = fails(convert, "--workdir", workdir, "--to", "openai", "--out", out)
        assert words in error and not out.exists()


@pytest.mark.slow
def test_what_diffusers_cannot_compute_is_named(tmp_path, fails):
    cases = [
        (dict(model=dict(multipliers=(2, 4))), "multipliers = (2, 4)"),
        (dict(model=dict(resample="pool")), "resample = 'pool'"),
        (dict(model=dict(resample="resblock")), "resample = 'resblock'"),
        (dict(model=dict(low_res=True)), "low_res = True"),
        (
            dict(model=dict(num_heads=2, attention_resolutions=(8, 4))),
            "num_heads = 2 at several widths",
        ),
        (dict(objective=dict(mean_type="mu")), "got 'mu'"),
        (dict(objective=dict(var_type="learned", loss="vlb")), "'learned'"),
        (dict(schedule=SCHEDULE | dict(rescale_timesteps=True)), "1000 steps, got 20"),
        (FLOW | dict(objective=dict(mean_type="x_0")), "got 'flow' with mean_type 'x"),
        (EDM | dict(objective=dict(mean_type="eps")), "got 'edm' with mean_type 'eps'"),
        (dict(schedule=dict(name="vdm", num_steps=20)), "got 'vdm' with mean_type"),
    ]
    for i, (changes, words) in enumerate(cases):
        workdir, out = make_run(tmp_path / str(i), **changes), tmp_path / "d"
        error = fails(convert, "--workdir", workdir, "--to", "diffusers", "--out", out)
        assert words in error and not out.exists()


def test_a_classifier_cannot_go_to_diffusers_or_openai(tmp_path, fails):
    run = make_run(tmp_path / "run", model=dict(name="encoder"), objective=None)
    for to, out in (("openai", "a.pt"), ("diffusers", "d")):
        arguments = ("--workdir", run, "--to", to, "--out", tmp_path / out)
        assert "got NoisyClassifier" in fails(convert, *arguments)
        assert not (tmp_path / out).exists()


def test_a_prediction_of_v_cannot_go_to_improved_diffusion(tmp_path, fails):
    model = dict(channels=32, num_groups=32)
    run = make_run(tmp_path / "run", model=model, objective=dict(mean_type="v"))
    out = tmp_path / "a.pt"
    error = fails(convert, "--workdir", run, "--to", "openai", "--out", out)
    assert "got 'v'" in error and not out.exists()


def test_bad_command_lines_end_in_one_sentence(tmp_path, fails, monkeypatch):
    monkeypatch.setitem(importing.RELEASED, "tiny", TINY)
    run, new = make_run(tmp_path / "run"), tmp_path / "new"
    torch_files.write_torch(tmp_path / "a.pt", {"weight": np.zeros(3, np.float32)})
    torch_files.write_torch(tmp_path / "tiny.pt", {"weight": np.zeros(3, np.float32)})
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    out = ("--to", "safetensors", "--out")
    cases = [
        (("--workdir", new), "got neither"),
        (("--workdir", new, "--checkpoint", "a", "--to", "openai"), "got both"),
        (("--workdir", new, "--checkpoint", tmp_path / "none.pt"), "none.pt"),
        (("--workdir", new, "--checkpoint", tmp_path / "a.pt"), "got 'a'"),
        (
            ("--workdir", new, "--checkpoint", tmp_path / "a.pt", "--name", "b"),
            "got 'b'",
        ),
        (
            ("--workdir", new, "--checkpoint", tmp_path / "text.pt", "--name", "tiny"),
            "whole PyTorch file",
        ),
        (("--workdir", new, "--checkpoint", tmp_path / "tiny.pt"), "is missing"),
        (("--workdir", new, "--checkpoint", tmp_path / "empty"), "config.json"),
        (("--workdir", run, "--to", "onnx", "--out", new), "got 'onnx'"),
        (("--workdir", run, *out, tmp_path / "a.pt"), "--out must name a new"),
        (("--workdir", run, "--to", "safetensors"), "got None"),
        (("--workdir", run, *out, new), "must end in .safetensors"),
        (("--workdir", run, "--to", "openai", "--out", new), "must end in .pt"),
        (("--workdir", new, *out, tmp_path / "b.safetensors"), "holds none"),
        (
            ("--workdir", run, *out, tmp_path / "b.safetensors", "--ema", "0.5"),
            "got '0.5'",
        ),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in cases:
        assert words in fails(convert, *arguments), arguments
        assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_never_written_over(tmp_path, program, fails):
    make_run(tmp_path / "run")
    out = tmp_path / "a.safetensors"
    program("--workdir", tmp_path / "run", "--to", "safetensors", "--out", out)
    error = fails(convert, "--checkpoint", out, "--workdir", tmp_path / "run")
    assert "workdir must be new" in error
    assert checkpoint.latest_step(tmp_path / "run") == 10


@pytest.mark.slow
def test_files_that_hold_no_network_are_refused(tmp_path, fails, monkeypatch):
    monkeypatch.setitem(importing.RELEASED, "tiny", TINY)
    torch = pytest.importorskip("torch")
    for i, tree in enumerate([{"step": 3}, [1, 2], {}, {1: torch.zeros(2)}]):
        torch.save(tree, tmp_path / "tiny.pt")
        arguments = (
            "--checkpoint",
            tmp_path / "tiny.pt",
            "--workdir",
            tmp_path / str(i),
        )
        assert "must hold tensors by name" in fails(convert, *arguments)


# Super-resolution


LOW_RES = dict(model=dict(low_res=True, num_classes=5), image_shape=(SIZE, SIZE, 3))


def write_low_res(path, n=3, labels=(4, 0, 2), channels=3):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (n, SIZE // 2, SIZE // 2, channels), np.uint8)
    np.savez(path, small, *(() if labels is None else [np.array(labels)]))
    return small


@pytest.mark.slow
def test_small_images_are_enlarged_and_go_round(tmp_path, monkeypatch):
    run = runs.load_run(make_run(tmp_path / "run", **LOW_RES))
    small = write_low_res(tmp_path / "low.npz")
    arguments = ("--workdir", tmp_path / "run", "--low-res", tmp_path / "low.npz")
    out = ("--out", tmp_path / "a.npz", "--n", 5, "--batch-size", 2, "--steps", 2)
    run_main(monkeypatch, sample, *arguments, *out)
    with np.load(tmp_path / "a.npz") as found:
        drawn, labels = found["arr_0"], found["arr_1"]
    np.testing.assert_array_equal(labels, [4, 0, 2, 4, 0])

    # Images 3 and 4 again, by hand: from the first two small images and their labels.
    schedule = settings.make_schedule(run.config.schedule, steps=2)
    draw = runs.make_sampler(
        *(run.model, run.objective, run.image_shape),
        *(runs.SamplingOptions(), runs.TaskOptions()),
        num_steps=2,
    )

    def by_hand(low_res):
        rows = {"ids": [3, 4], "label": [4, 0], "low_res": low_res}
        rows = {name: jnp.asarray(a) for name, a in rows.items()}
        frames = draw({"model": run.params}, schedule, 0, rows, {"eta": 0.0})
        return data.to_uint8(frames)[-1].astype(int)

    low_res = data.from_uint8(small[:2])
    assert np.abs(by_hand(low_res) - drawn[3:]).max() <= 1
    assert np.abs(by_hand(-low_res) - drawn[3:]).max() > 1


@pytest.mark.slow
def test_small_images_must_fit_the_network(tmp_path, fails):
    with_low_res = make_run(tmp_path / "low", **LOW_RES)
    without = make_run(tmp_path / "run")
    write_low_res(tmp_path / "low.npz")
    write_low_res(tmp_path / "grey.npz", channels=1)
    write_low_res(tmp_path / "labels.npz", labels=(4, 5, 0))
    (tmp_path / "text.npz").write_text("no images")
    option = "--low-res must be given for a network with low_res and for no other"
    cases = [
        (with_low_res, None, f"{option}, got None"),
        (without, "low.npz", option),
        (with_low_res, "grey.npz", "must have 3 channels, got 1"),
        (with_low_res, "labels.npz", "must be below 5, got 5"),
        (with_low_res, "text.npz", "must be a .npz or .npy file of plain arrays, got"),
        (with_low_res, "none.npz", "--low-res must exist, got"),
    ]
    for workdir, file, words in cases:
        arguments = ("--workdir", workdir, "--out", tmp_path / "out", "--steps", 2)
        more = ("--low-res", tmp_path / file) if file else ()
        assert words in fails(sample, *arguments, *more)
        assert not (tmp_path / "out").exists()
    error = fails(evaluate, "--workdir", with_low_res)
    assert "must be of a network without low_res" in error
    assert not (with_low_res / "evaluation").exists()


def test_a_super_resolution_run_for_improved_diffusion(tmp_path, program):
    openai_run(tmp_path / "run", low_res=True)
    out = tmp_path / "a.pt"
    program("--workdir", tmp_path / "run", "--to", "openai", "--out", out)
    tensors = torch_files.read_torch(out)
    assert tensors["input_blocks.0.0.weight"].shape == (32, 6, 3, 3)


def test_data_to_score_on_must_fit_the_run(tmp_path, fails):
    run = make_run(tmp_path / "run")
    for shape, words in (
        ((20, 6, 6, 1), "must be 6 x 6, got"),
        ((20, 8, 8, 3), re.escape("data must be (8, 8, 1), as the run's")),
    ):
        np.savez(tmp_path / "a.npz", np.zeros(shape, np.uint8))
        data = f"npz:{tmp_path / 'a.npz'}"
        error = fails(evaluate, "--workdir", run, "--metrics", "bpd", "--data", data)
        assert re.search(words, error) and not (run / "evaluation").exists()
