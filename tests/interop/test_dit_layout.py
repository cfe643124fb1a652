"""Checkpoints of facebookresearch/DiT in and out: names, positions, arguments."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from models.test_dit import GOLDEN, NOISE_FLOOR, assert_near, below, golden
from support.oracles import F32
from support.programs import convert, run_main
from support.tiny_files import save_like_torch, tiny_run
from support.tiny_runs import random_params

import jax_diffusion as jd
from jax_diffusion import config as configs
from jax_diffusion import training
from jax_diffusion.interop import dit_layout, exporting, foreign, torch_files

CONSTRUCTOR = json.loads((GOLDEN / "tiny_a.json").read_text())["constructor"]
MODEL = dict(name="dit", channels=32, depth=2, num_heads=2, num_classes=6)
SCHEDULE = dict(name="linear", num_steps=1000)


def config_of(objective=None, data=None, **model):
    """What the official network of golden/ is in a config."""
    return foreign.config_of(
        MODEL | model,
        SCHEDULE,
        objective or dict(mean_type="eps", var_type="learned_range", loss="hybrid"),
        data or dict(name="synthetic", image_size=8, batch_size=16),
    )


def dit_run(
    image_shape=(8, 8, 4), label_dropout=0.0, objective=None, schedule=None, **model
):
    """A run of a network with random weights."""
    config = config_of(objective or dict(mean_type="eps"), **model)
    config |= dict(label_dropout=label_dropout, schedule=schedule or SCHEDULE)
    built = configs.build(config, image_shape[-1])
    return jd.pipeline.Run(
        config=configs.complete(ConfigDict(config)),
        model=built.model,
        params=random_params(built.model, image_shape),
        objective=built.objective,
        image_shape=image_shape,
    )


@pytest.fixture
def file(tmp_path):
    """The official network as its trainer saves it."""
    tensors = below("tiny_a", "params/")
    others = {name: a + 1 for name, a in tensors.items()}
    path = tmp_path / "0050000.pt"
    save_like_torch(path, {"ema": tensors, "model": others})
    return path


def output(run, x, t, y):
    model_fn = training.bind(run.model, run.params, jnp.asarray(y))
    fast = {"xla_backend_optimization_level": 0}  # to compile, that is
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(model_fn, compiler_options=fast)(x, t))


def test_a_checkpoint_of_dit_computes_what_the_official_network_does(file):
    run = jd.load_checkpoint(file, config=config_of())
    assert run.image_shape == (8, 8, 4) and run.model.out_channels == 8
    arrays = golden("tiny_a")
    ours = output(run, *(arrays[f"run1/{name}"] for name in "xty"))
    assert_near(
        ours, arrays["run1/output"], NOISE_FLOOR["tiny_a.npz"]["run1/output"][0]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("blocks.1.attn.qkv.bias"),
            r"blocks.1.attn.qkv.bias \(96,\) is",
        ),
        (lambda t: t.pop("pos_embed"), r"pos_embed \(1, 16, 32\) is missing"),
        (
            lambda t: t.update({"blocks.2.mlp.fc1.bias": np.zeros(3, np.float32)}),
            r"blocks.2.mlp.fc1.bias \(3,\) is unexpected",
        ),
        (
            lambda t: t.update({"final_layer.linear.bias": np.zeros(3, np.float32)}),
            r"final_layer.linear.bias should be \(32,\) and is \(3,\)",
        ),
        (
            lambda t: t.update(pos_embed=t["pos_embed"][:, ::-1]),
            "pos_embed must be the fixed sinusoids of columns and rows, got numbers",
        ),
    ],
)
def test_tensors_of_another_dit_are_named_in_one_sentence(change, words, tmp_path):
    tensors = dict(below("tiny_a", "params/"))
    change(tensors)
    tensors = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
    torch_files.write_torch(tmp_path / "a.pt", tensors)
    with pytest.raises(ValueError, match=words) as error:
        jd.load_checkpoint(tmp_path / "a.pt", config=config_of())
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(name="unet"), "config.model.name must be 'dit' to read tensors"),
        (dict(depth=3), "blocks.2.mlp.fc1.bias .* is missing"),
        (dict(depth=33), "config.model.depth must fit 32 tensors, got 33"),
        (dict(num_classes=None), "y_embedder.embedding_table.weight .* is unexpected"),
        (dict(patch_size=3), "patch_size must divide height and width .* for 8 x 8"),
    ],
)
def test_a_config_of_another_network_than_the_dit_in_a_file_is_refused(
    config, words, file
):
    config = config_of(**config)
    if config["model"]["name"] == "unet":
        config["model"] = dict(name="unet", channels=8, num_groups=4)
    with pytest.raises(ValueError, match=words):
        jd.load_checkpoint(file, config=config)


def test_a_dit_has_no_place_in_other_layouts(file):
    with pytest.raises(ValueError, match=r"only the networks 'unet' and .* got DiT"):
        jd.load_checkpoint(file, config=config_of(), layout="openai")


def test_convert_reads_and_writes_dit_bit_for_bit(file, tmp_path, monkeypatch):
    config = config_of() | dict(ema_decays=(0.9,))
    text = "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
    (tmp_path / "own.py").write_text(f"{text}    return ConfigDict({config!r})\n")
    workdir, out = tmp_path / "run", tmp_path / "out.pt"
    where = ("--checkpoint", file, "--config", tmp_path / "own.py")
    run_main(monkeypatch, convert, *where, "--workdir", workdir)
    run_main(monkeypatch, convert, "--workdir", workdir, "--to", "dit", "--out", out)
    found = {name: np.asarray(a) for name, a in torch_files.read_torch(out).items()}
    official = below("tiny_a", "params/")
    assert found.keys() == official.keys()
    assert all(np.array_equal(found[name], official[name]) for name in official)
    arguments = json.loads(out.with_suffix(".json").read_text())
    # The file does not say that its last label is the null label.
    null = dict(num_classes=6, class_dropout_prob=0.0)
    assert arguments["model"] == CONSTRUCTOR | null
    assert len(arguments["diffusion"].pop("betas")) == 1000
    assert arguments["diffusion"] == dict(
        model_mean_type="EPSILON",
        model_var_type="LEARNED_RANGE",
        rescale_timesteps=False,
    )


def test_the_null_label_of_a_dit_is_counted_as_the_official_code_does():
    run = dit_run(label_dropout=0.1, num_classes=5)
    assert run.model.num_classes == 6
    arguments = exporting.dit_arguments(run)["model"]
    assert arguments == CONSTRUCTOR | dict(learn_sigma=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(num_classes=None), "got DiT with num_classes = None, of 8 x 8 images"),
        (dict(image_shape=(8, 12, 3)), "num_classes = 6, of 8 x 12 images"),
    ],
)
def test_what_the_official_dit_cannot_be_is_refused(options, words, tmp_path):
    run = dit_run(**options)
    with pytest.raises(ValueError, match=rf"^the network must be .*{words}\.$"):
        exporting.export_run(run, "dit", tmp_path / "a.pt")
    for to, name in (("openai", "b.pt"), ("diffusers", "d")):
        with pytest.raises(ValueError, match=r"only the network 'unet' .* got DiT"):
            exporting.export_run(run, to, tmp_path / name)
    with pytest.raises(ValueError, match=r"must be a 'dit' .* got UNet"):
        exporting.export_run(tiny_run(), "dit", tmp_path / "a.pt")
    assert not [*tmp_path.iterdir()]


def test_layers_that_the_official_dit_does_not_have_are_named():
    with pytest.raises(ValueError, match=r"layout 'dit' must have .* got other.kernel"):
        dit_layout.leaves({"other": {"kernel": np.zeros((2, 2))}})


@pytest.mark.slow
def test_a_dit_without_its_variance_predicts_the_same_mean(file):
    run = jd.load_checkpoint(file, config=config_of())
    short = exporting.without_variance(run)
    assert short.model.out_channels == 4
    x, t, y = (golden("tiny_a")[f"run1/{name}"] for name in "xty")
    ours = output(short, x, t, y)
    np.testing.assert_allclose(ours, output(run, x, t, y)[..., :4], **F32)


@pytest.mark.parametrize(
    ("objective", "schedule", "words"),
    [
        (dict(mean_type="x_0", precondition=True), {}, "precondition must be False"),
        (
            dict(mean_type="v"),
            {},
            "mean_type for improved-diffusion must be .* got 'v'",
        ),
        (dict(mean_type="flow"), dict(name="flow"), "must have variances, got levels"),
    ],
)
def test_processes_that_the_official_dit_cannot_compute_are_refused(
    objective, schedule, words, tmp_path
):
    run = dit_run(objective=objective, schedule=SCHEDULE | schedule)
    with pytest.raises(ValueError, match=words):
        exporting.export_run(run, "dit", tmp_path / "a.pt")
    if objective.get("precondition"):
        with pytest.raises(ValueError, match=f"^{words}"):
            exporting.export_run(
                tiny_run(objective=objective), "diffusers", tmp_path / "d"
            )
    assert not [*tmp_path.iterdir()]
