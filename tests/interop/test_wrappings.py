"""Checkpoints as people have them: wrapped, in shards, beside objects, unnamed."""

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.peers import peer
from support.programs import convert, failure, run_main
from support.tiny_files import save_like_diffusers, save_like_torch, tiny_run

import jax_diffusion as jd
from jax_diffusion import config as configs
from jax_diffusion.interop import (
    exporting,
    importing,
    recognize,
    safetensors_files,
    tensors,
    torch_files,
)
from jax_diffusion.interop.importing import RECORD
from jax_diffusion.interop.released import Released
from jax_diffusion.models import bind

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def run():
    return tiny_run()


@pytest.fixture(scope="module")
def state(run):
    return exporting.state_dict(run, "openai")


def config_of(run, **data):
    """Of the run; its data are nowhere."""
    config = run.config.to_dict()
    return config | {"data": dict(name="folder", path="nowhere", batch_size=4) | data}


def same(found, run):
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, run.params))
    assert found.model == run.model and found.image_shape == run.image_shape


def prefixed(prefix, tree, add=0):
    return {f"{prefix}{name}": array + np.float32(add) for name, array in tree.items()}


def more(tree):
    return prefixed("", tree, 1)


COUNTER = np.array([3])
# How trainers wrap the tensors of a network, and how many tensors are left out.
WRAPPINGS = {
    "bare": (lambda t: t, 0),
    "model": (lambda t: {"model": t, "epoch": 3}, 0),
    "state_dict": (lambda t: {"state_dict": t, "lr": 1e-3}, 0),
    "module": (lambda t: {"model": prefixed("module.", t)}, 0),
    "compiled": (lambda t: prefixed("_orig_mod.", t), 0),
    "lightning": (lambda t: {"state_dict": prefixed("net.", t)}, 0),
    "module in module": (lambda t: prefixed("module.model.", t), 0),
    "the average": (lambda t: {"model": prefixed("", t, 1), "ema": t}, 0),
    "the average last": (lambda t: [prefixed("", t, 1), {"lr": 1.0}, 3, t], 0),
    "an empty average": (lambda t: {"ema": None, "model": t}, 0),
    "lucidrains": (
        lambda t: {
            "step": 3,
            "model": {"betas": COUNTER} | prefixed("model.", t, 1),
            "opt": {"state": {0: {"step": COUNTER}}, "param_groups": [{"lr": 0.1}]},
            "ema": {"initted": COUNTER, "step": COUNTER, "ema_model.betas": COUNTER}
            | prefixed("online_model.model.", t, 1)
            | prefixed("ema_model.model.", t),
            "scaler": None,
            "version": "2.3.1",
        },
        3,
    ),
    "a shadow": (lambda t: {"ema": {"decay": 0.9, "shadow": t}, "model": more(t)}, 0),
    "by decay": (lambda t: {"ema": {0.9999: t}, "model": more(t)}, 0),
    "shadow_params": (
        lambda t: {"model": more(t), "ema": {"shadow_params": [*t.values()]}},
        0,
    ),
    "params": (lambda t: {"params": more(t), "params_ema": t}, 0),
    "generator": (lambda t: {"generator": t}, 0),
    "model_state": (lambda t: {"model_state": t}, 0),
    "weights": (lambda t: {"weights": t}, 0),
    "in a checkpoint": (lambda t: {"checkpoint": {"model": t}}, 0),
    "buffers beside": (lambda t: {"betas": COUNTER, **t}, 1),
    "buffers": (lambda t: {"betas": COUNTER} | prefixed("denoise_fn.", t), 1),
}


@pytest.mark.parametrize("kind", WRAPPINGS)
def test_wrappings_of_trainers_are_opened(kind, run, state, tmp_path):
    wrap, left = WRAPPINGS[kind]
    left += len(state) if kind == "lucidrains" else 0  # the network that is trained
    path = save_like_torch(tmp_path / "a.pt", wrap(state))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = jd.load_checkpoint(path, config=config_of(run, image_size=8))
    same(found, run)
    assert [f"and {left} others" in str(w.message) for w in told] == [True] * bool(left)


@pytest.mark.parametrize("inner", ["", "diffusion_model."])
def test_the_average_of_latent_diffusion_is_read(inner, run, state, tmp_path):
    average = {f"{inner}{name}".replace(".", ""): a for name, a in state.items()}
    tree = prefixed("model.diffusion_model.", state, 1) | {"model_ema.decay": COUNTER}
    tree |= {f"model_ema.{name}": array for name, array in average.items()}
    path = save_like_torch(tmp_path / "a.pt", {"state_dict": tree})
    with pytest.warns(UserWarning, match=f"and {len(state) + 1} others"):
        same(jd.load_checkpoint(path, config=config_of(run, image_size=8)), run)


@pytest.mark.parametrize(
    "average",
    [
        {"shadow_params": [COUNTER]},
        {"unknown": {"a": np.ones((2, 2), np.float32)}},
        [np.ones((2, 2), np.float32)],
    ],
)
def test_an_average_that_is_not_understood_is_told(average, run, state, tmp_path):
    tree = {"model": state, "my_ema": average}
    path = save_like_torch(tmp_path / "a.pt", tree)
    with pytest.warns(UserWarning, match="'my_ema' is not understood as an average"):
        same(jd.load_checkpoint(path, config=config_of(run, image_size=8)), run)


def test_a_file_without_a_network_is_refused_with_its_keys(run, tmp_path):
    path = save_like_torch(tmp_path / "a.pt", {"thing": {"a": 1}, "other": 2})
    with pytest.raises(ValueError, match=r"of others: \['thing', 'other'\]"):
        jd.load_checkpoint(path, config=config_of(run))


def test_a_file_is_what_it_holds_not_what_it_is_called(run, state, tmp_path):
    config = config_of(run, image_size=8)
    torch_files.write_torch(tmp_path / "a.safetensors", state)
    same(jd.load_checkpoint(tmp_path / "a.safetensors", config=config), run)
    safetensors_files.write_safetensors(tmp_path / "a.bin", state, {})
    same(jd.load_checkpoint(tmp_path / "a.bin", config=config), run)


# lucidrains


def lucidrains_tensors(dim, multipliers, heads, head, channels=3):
    """Names and shapes as denoising-diffusion-pytorch 2.3.4 has them."""
    found = {}

    def conv(name, c_in, c_out, size, bias=True):
        found[f"{name}.weight"] = (c_out, c_in, size, size)
        if bias:
            found[f"{name}.bias"] = (c_out,)

    def linear(name, c_in, c_out):
        found[f"{name}.weight"], found[f"{name}.bias"] = (c_out, c_in), (c_out,)

    def block(name, c_in, c_out):
        linear(f"{name}.mlp.1", 4 * dim, 2 * c_out)
        for i, c in (("1", c_in), ("2", c_out)):
            conv(f"{name}.block{i}.proj", c, c_out, 3)
            found[f"{name}.block{i}.norm.g"] = (1, c_out, 1, 1)
        if c_in != c_out:
            conv(f"{name}.res_conv", c_in, c_out, 1)

    def attention(name, c, full):
        found[f"{name}.norm.g"] = (1, c, 1, 1)
        found[f"{name}.mem_kv"] = (2, heads, 4, head) if full else (2, heads, head, 4)
        conv(f"{name}.to_qkv", c, 3 * heads * head, 1, bias=False)
        conv(f"{name}.to_out" if full else f"{name}.to_out.0", heads * head, c, 1)
        if not full:
            found[f"{name}.to_out.1.g"] = (1, c, 1, 1)

    inner = [dim * m for m in multipliers]
    outer, last = [dim, *inner[:-1]], len(inner) - 1
    conv("init_conv", channels, dim, 7)
    linear("time_mlp.1", dim, 4 * dim)
    linear("time_mlp.3", 4 * dim, 4 * dim)
    for i, (a, b) in enumerate(zip(outer, inner, strict=True)):
        for part in "01":
            block(f"downs.{i}.{part}", a, a)
        attention(f"downs.{i}.2", a, full=i == last)
        conv(
            f"downs.{i}.3" if i == last else f"downs.{i}.3.1",
            *((a, b, 3) if i == last else (4 * a, b, 1)),
        )
    block("mid_block1", inner[-1], inner[-1])
    attention("mid_attn", inner[-1], full=True)
    block("mid_block2", inner[-1], inner[-1])
    for i, (a, b) in enumerate(reversed(list(zip(outer, inner, strict=True)))):
        for part in "01":
            block(f"ups.{i}.{part}", a + b, b)
        attention(f"ups.{i}.2", b, full=i == 0)
        conv(f"ups.{i}.3" if i == last else f"ups.{i}.3.1", b, a, 3)
    block("final_res_block", 2 * dim, dim)
    conv("final_conv", dim, channels, 1)
    return found


LUCIDRAINS = dict(name="lucidrains", channels=8, multipliers=(1, 2))
LUCIDRAINS |= dict(num_heads=2, head_dim=4)


def test_a_checkpoint_of_lucidrains_is_read(run, tmp_path):
    rng = np.random.default_rng(0)
    shapes = lucidrains_tensors(8, (1, 2), 2, 4)
    state = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    tree = WRAPPINGS["lucidrains"][0](state)
    path = save_like_torch(tmp_path / "model-3.pt", tree)
    config = config_of(run, image_size=8) | {"model": LUCIDRAINS}
    with pytest.warns(UserWarning, match="others are left out"):
        params = jd.load_checkpoint(path, config=config).params
    ours = np.sort(np.concatenate([a.ravel() for a in jax.tree.leaves(params)]))
    theirs = np.sort(np.concatenate([a.ravel() for a in state.values()]))
    np.testing.assert_array_equal(ours, theirs)
    pairs = [  # ours, and theirs with the axes of ours
        (params["time_0"]["kernel"], state["time_mlp.1.weight"].T),
        (params["up_1_double"]["kernel"][0, 2], state["ups.0.3.1.weight"][..., 0, 2].T),
        (
            params["down_0_attention"]["memory"][1, 3],
            state["downs.0.2.mem_kv"][1, ..., 3],
        ),
        (params["mid_attention"]["memory"][1, 3], state["mid_attn.mem_kv"][1, :, 3]),
        (
            params["mid_0"]["norm_out"]["scale"],
            state["mid_block1.block2.norm.g"].ravel(),
        ),
    ]
    for mine, yours in pairs:
        np.testing.assert_array_equal(mine, yours)
    with pytest.raises(ValueError, match=r"^config\.model\.name must be 'lucidrains'"):
        with pytest.warns(UserWarning):
            jd.load_checkpoint(path, config=config_of(run, image_size=8))


# Folders


@pytest.fixture
def hub(run, tmp_path):
    exporting.export_run(run, "diffusers", tmp_path / "hub")
    return tmp_path / "hub"


def weights_in(folder):
    """The file of a network's weights, and the arrays in it."""
    path = folder / f"{WEIGHTS}.safetensors"
    found = safetensors_files.read_safetensors(path).tensors
    return path, {name: np.asarray(tensor) for name, tensor in found.items()}


def other_weights(folder):
    """Weights that are not the average."""
    path, arrays = weights_in(folder)
    safetensors_files.write_safetensors(path, more(arrays), {})


def training_checkpoint(hub):
    place = hub / "checkpoint-500"
    for name in ("unet", "unet_ema"):
        shutil.copytree(hub / "unet", place / name)
    other_weights(place / "unet")
    other_weights(hub / "unet")
    return place


def shard(hub):
    path, arrays = weights_in(hub / "unet")
    path.unlink()
    places = {}
    for i, name in enumerate(arrays):
        places[name] = f"{WEIGHTS}-0000{i % 3 + 1}-of-00003.safetensors"
    for file in set(places.values()):
        inside = {n: arrays[n] for n, place in places.items() if place == file}
        safetensors_files.write_safetensors(path.with_name(file), inside, {})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    return hub


def half(hub):
    path, arrays = weights_in(hub / "unet")
    arrays = {name: array.astype(np.float16) for name, array in arrays.items()}
    path.unlink()
    half = path.with_name(f"{WEIGHTS}.fp16.safetensors")
    safetensors_files.write_safetensors(half, arrays, {})
    return hub


def alone(hub):
    shutil.copy(hub / "scheduler" / "scheduler_config.json", hub / "unet")
    shutil.copytree(hub / "unet", hub.parent / "lonely")
    return hub.parent / "lonely"


FOLDERS = {
    "a pipeline": lambda hub: hub,
    "a network inside": lambda hub: hub / "unet",
    "a network with its scheduler": alone,
    "checkpoint-500": training_checkpoint,
    "unet_ema": lambda hub: training_checkpoint(hub) / "unet_ema",
    "shards": shard,
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_diffusers_are_opened(kind, hub, run):
    found = jd.load_checkpoint(FOLDERS[kind](hub))
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, run.params))
    betas = configs.make_betas(found.config.schedule)
    np.testing.assert_array_equal(betas, configs.make_betas(run.config.schedule))


def test_a_folder_of_half_precision_is_opened(hub, run):
    found = jd.load_checkpoint(half(hub))
    expected = jax.tree.map(lambda a: a.astype(np.float16).astype("f4"), run.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, expected))


def test_a_network_without_a_scheduler_takes_the_process_of_a_config(hub, run):
    lonely = shutil.copytree(hub / "unet", hub.parent / "lonely")
    with pytest.raises(ValueError, match=r"^config must be given .*scheduler_config"):
        jd.load_checkpoint(lonely)
    found = jd.load_checkpoint(lonely, config=config_of(run))
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, run.params))
    assert found.objective == run.objective
    assert found.config.schedule == run.config.schedule


def test_networks_of_images_that_are_not_square_go_out_and_come_back(tmp_path):
    run = tiny_run((8, 16, 3))
    exporting.export_run(run, "diffusers", tmp_path / "hub")
    fields = json.loads((tmp_path / "hub" / "unet" / "config.json").read_text())
    assert fields["sample_size"] == [8, 16]
    found = jd.load_checkpoint(tmp_path / "hub")
    assert found.image_shape == (8, 16, 3)
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, run.params))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of their own imports
def test_folders_as_diffusers_itself_saves_them_are_opened(tmp_path):
    torch = pytest.importorskip("torch")
    unet = save_like_diffusers(tmp_path / "out", sample_size=[8, 16])
    from diffusers.training_utils import EMAModel

    ema = EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config)
    for kind in ({}, {"variant": "fp16"}, {"max_shard_size": "20KB"}):
        place = tmp_path / str(len(kind) and next(iter(kind.values()))) / "unet"
        unet.save_pretrained(place, **kind)
        with pytest.raises(ValueError, match="scheduler_config"):
            jd.load_checkpoint(place)
        shutil.copytree(tmp_path / "out" / "scheduler", place.parent / "scheduler")
        assert jd.load_checkpoint(place).image_shape == (8, 16, 3)
    checkpoint = tmp_path / "out" / "checkpoint-500"
    ema.save_pretrained(checkpoint / "unet_ema")
    with torch.no_grad():  # what is trained goes on; its average is read
        expected = unet(torch.ones(1, 3, 8, 16), torch.tensor([3])).sample
        for parameter in unet.parameters():
            parameter += 1
    unet.save_pretrained(checkpoint / "unet")
    found = jd.load_checkpoint(checkpoint)
    t = jnp.array([3.0])
    ours = bind(found.model, found.params, None)(jnp.ones((1, 8, 16, 3)), t)
    expected = expected.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


# Names and shapes


@pytest.fixture
def fails(monkeypatch, capsys):
    """`convert` prints one sentence and exits with 2; returns the sentence."""
    return functools.partial(failure, monkeypatch, capsys, convert)


def test_an_unknown_name_says_which_names_fit_and_what_else_helps(
    run, state, tmp_path, monkeypatch, fails
):
    monkeypatch.setitem(
        importing.RELEASED, "tiny", Released("openai", 8, {}, {}, {}, {})
    )
    count = sum(array.size for array in state.values())
    monkeypatch.setitem(recognize.COUNTS, "tiny", (len(state), count))
    torch_files.write_torch(tmp_path / "mine.pt", state)
    where = ("--checkpoint", tmp_path / "mine.pt", "--workdir", tmp_path / "run")
    error = fails(*where)
    assert error.startswith("error: --name must be that of a released checkpoint")
    assert "fit the name 'tiny'" in error and "--config FILE --layout openai" in error
    error = fails(*where, "--name", "tinny")
    assert "got 'tinny'" in error and "fit the name 'tiny'" in error
    torch_files.write_torch(tmp_path / "mine.pt", {"a.weight": np.ones(3, np.float32)})
    error = fails(*where)
    assert "fit none" in error and "such as 'a.weight', are named as in no" in error
    assert not (tmp_path / "run").exists()


def test_a_network_of_ones_own_needs_no_data_for_its_shape(run, state, tmp_path):
    torch_files.write_torch(tmp_path / "mine.pt", state)
    path = tmp_path / "mine.pt"
    same(jd.load_checkpoint(path, config=config_of(run, image_size=8)), run)
    same(jd.load_checkpoint(path, config=config_of(run), image_size=8), run)
    wide = jd.load_checkpoint(path, config=config_of(run), image_size=(8, 16))
    assert wide.image_shape == (8, 16, 3)
    with pytest.raises(ValueError, match=r"^image_size must be given where"):
        jd.load_checkpoint(path, config=config_of(run))


@pytest.mark.parametrize("layout", ["ddpm", "diffusers"])
def test_the_layout_is_recognized(layout, tmp_path):
    run = tiny_run(scale_shift=False)
    torch_files.write_torch(tmp_path / "a.pt", exporting.state_dict(run, layout))
    config = config_of(run, image_size=8)
    same(jd.load_checkpoint(tmp_path / "a.pt", config=config), run)


@pytest.mark.parametrize("text", ["0", "8x", "x8", "8x8x8", "-8", "8.5", "ab"])
def test_wrong_sizes_are_refused(text, tmp_path, fails):
    where = ("--checkpoint", tmp_path, "--workdir", tmp_path / "run")
    error = fails(*where, f"--image-size={text}")
    assert error.startswith("error: --image-size must be")


# Objects, kinds of numbers


def test_objects_beside_the_tensors_are_left_out_on_request(run, state, tmp_path):
    tree = {
        "ema": state,
        "args": argparse.Namespace(lr=1e-4, results="out"),
        "loss": np.float32(0.5),
        "best": {"score": np.float64(2), "seen": {1, 2}},
        "opt": {"state": {0: {"step": COUNTER}}, (1, 2): "a key"},
    }
    path = save_like_torch(tmp_path / "a.pt", tree)
    config = config_of(run, image_size=8)
    with pytest.raises(ValueError, match=r"^ignore_objects must be set") as info:
        jd.load_checkpoint(path, config=config)
    for words in ("argparse.Namespace", "a tuple as a key", "nothing of them is run"):
        assert words in str(info.value)
    same(jd.load_checkpoint(path, config=config, ignore_objects=True), run)


def test_ignored_objects_never_run(run, state, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "trap"), "w")

    path = save_like_torch(tmp_path / "a.pt", {"model": state, "evil": [Evil()]})
    config = config_of(run, image_size=8)
    same(jd.load_checkpoint(path, config=config, ignore_objects=True), run)
    assert not (tmp_path / "trap").exists()


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_objects_in_files_of_torch_itself_are_left_out(zipped, run, state, tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {name: torch.tensor(array) for name, array in state.items()}
    tree = {"ema": arrays, "args": argparse.Namespace(a=1), "n": np.float32(3)}
    torch.save(tree, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    config = config_of(run, image_size=8)
    with pytest.raises(ValueError, match=r"argparse\.Namespace"):
        jd.load_checkpoint(tmp_path / "a.pt", config=config)
    same(jd.load_checkpoint(tmp_path / "a.pt", config=config, ignore_objects=True), run)


@pytest.mark.parametrize("kind", ["torch", "safetensors", "own", "hub"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_unless_allowed(
    kind, value, run, tmp_path
):
    wrong = tiny_run()
    wrong.params["conv_out"]["bias"][0] = value
    out, options = tmp_path / "a", dict(config=config_of(run, image_size=8))
    if kind == "own":
        out, options = tmp_path / "a.safetensors", {}
        exporting.export_run(wrong, "safetensors", out)
    elif kind == "hub":
        options = {}
        exporting.export_run(wrong, "diffusers", out)
    else:
        state = exporting.state_dict(wrong, "openai")
        if kind == "torch":
            torch_files.write_torch(out, state)
        else:
            safetensors_files.write_safetensors(out, state, {})
    with pytest.raises(ValueError, match=r"^allow_nonfinite must be set .* got 1 in"):
        jd.load_checkpoint(out, **options)
    found = jd.load_checkpoint(out, **options, allow_nonfinite=True)
    np.testing.assert_array_equal(
        found.params["conv_out"]["bias"], wrong.params["conv_out"]["bias"]
    )


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool])
def test_weights_that_are_no_floats_are_refused(dtype, run, state, tmp_path):
    changed = {**state, "out.2.bias": state["out.2.bias"].astype(dtype)}
    torch_files.write_torch(tmp_path / "a.pt", changed)
    with pytest.raises(
        ValueError, match=r"^weights must be of floats, .*'out\.2\.bias'"
    ):
        jd.load_checkpoint(tmp_path / "a.pt", config=config_of(run, image_size=8))


def test_a_tensor_that_is_expanded_cannot_fill_the_memory(run, tmp_path):
    region = tensors.Region(tmp_path / "a", 0, 4)
    wide = tensors.Tensor(region, np.dtype("f4"), (2**20, 2**20), (0, 0))
    with pytest.raises(ValueError, match="must hold all numbers of its tensors"):
        tensors.check_sizes({"a": wide}, tmp_path / "a", 4)


def test_a_file_of_ours_cannot_name_code_to_run(run, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "a.safetensors"
    exporting.export_run(run, "safetensors", path)
    arrays, metadata = safetensors_files.read_safetensors(path)
    record = json.loads(metadata[RECORD])
    for group in ("model", "schedule", "data", "timesteps", "optimizer"):
        changed = json.loads(json.dumps(record))
        changed["config"][group]["name"] = "trap:run"
        metadata = {RECORD: json.dumps(changed)}
        safetensors_files.write_safetensors(tmp_path / group, arrays, metadata)
        with pytest.raises(ValueError, match=r"^config must be given .*would run code"):
            jd.load_checkpoint(tmp_path / group)
        same(jd.load_checkpoint(tmp_path / group, config=config_of(run)), run)
    assert "trap" not in sys.modules


KINDS = {
    "empty": (b"", "an empty file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
    "html": (b"\n<!DOCTYPE html><html>", "an HTML page"),
    "text": (b"not found\n", "a text file that begins with 'not found"),
    "json": (b'{"error": 1}', "a text file that begins with '{\"error"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(9), "a PNG image"),
    "gzip": (b"\x1f\x8b\x08" + bytes(9), "a gzip archive"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(9), "an HDF5 file"),
    "zeros": (bytes(100), "a file that begins with zeros"),
}


@pytest.mark.parametrize("ending", ["pt", "safetensors", "bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_told_for_what_it_is(kind, ending, tmp_path):
    content, words = KINDS[kind]
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"got {re.escape(words)}.*\\.$"):
        jd.load_checkpoint(path)


def test_a_truncated_file_is_told_to_be_cut_off(state, tmp_path):
    torch_files.write_torch(tmp_path / "a.pt", state)
    data = (tmp_path / "a.pt").read_bytes()
    for part in (0.1, 0.5, 0.99):
        (tmp_path / "a.pt").write_bytes(data[: int(part * len(data))])
        with pytest.raises(ValueError, match="got a zip archive that is cut off after"):
            jd.load_checkpoint(tmp_path / "a.pt")


# Memory


MEASURE = """
import resource, sys
from jax_diffusion import config, data
from jax_diffusion.interop import importing

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large, folder = sys.argv[1:]
importing.import_checkpoint(small, f"{folder}/small")  # loads all libraries
start = peak()
importing.import_checkpoint(large, f"{folder}/large")
print(peak() - start)
"""


@pytest.mark.slow
def test_converting_takes_at_most_half_more_than_the_weights(tmp_path):
    sizes = dict(channels=256, multipliers=(1, 3), num_groups=32)
    large = tiny_run((8, 8, 3), **sizes)
    for name, run in (("small", tiny_run()), ("large", large)):
        exporting.export_run(run, "safetensors", tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("small", "large")]
    command = [sys.executable, "-c", MEASURE, *files, tmp_path / "runs"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    weights = sum(array.nbytes for array in jax.tree.leaves(large.params))
    assert weights > 100e6
    assert int(found.stdout.split()[-1]) < 1.5 * weights
    same(jd.load_run(tmp_path / "runs" / "large"), large)


# Out: without the variance


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [1, 2])
def test_a_network_without_its_variance_predicts_the_same_mean(block_size):
    objective = dict(mean_type="eps", var_type="learned_range", loss="hybrid")
    run = tiny_run((8, 8, 3), objective, block_size=block_size)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    mean = exporting.without_variance(run)
    assert mean.objective.var_type == "fixed_small" and mean.model.out_channels == 3
    t = jnp.array([3.0, 17.0])
    both, ours = (bind(r.model, r.params, None)(x, t) for r in (run, mean))
    np.testing.assert_allclose(ours, both[..., :3], rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"^drop_variance is for a 'unet' or 'dit' that predicts"
    ):
        exporting.without_variance(mean)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of their own imports
def test_ddim_of_diffusers_draws_without_the_variance_and_convert_says_so(
    tmp_path, monkeypatch, capsys
):
    torch, diffusers = pytest.importorskip("torch"), peer("diffusers")
    objective = dict(mean_type="eps", var_type="learned_range", loss="hybrid")
    run = tiny_run((8, 8, 3), objective)
    exporting.export_run(run, "safetensors", tmp_path / "run.safetensors")
    where = ("--workdir", tmp_path / "run")

    def program(*args):
        run_main(monkeypatch, convert, *where, *args)
        return capsys.readouterr().out

    program("--checkpoint", tmp_path / "run.safetensors")
    told = program("--to", "diffusers", "--out", tmp_path / "both")
    assert "DDIMPipeline, cannot and need --drop-variance" in told
    told = program("--to", "diffusers", "--out", tmp_path / "mean", "--drop-variance")
    assert "drop-variance" not in told
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "mean")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        num_inference_steps=2,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert images.shape == (1, 8, 8, 3) and np.isfinite(images).all()
