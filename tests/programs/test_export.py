"""What another machine gets: one file, and the images that it draws there."""

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from support.tiny_runs import random_params

from jax_diffusion import diffusion, export, samplers, schedules
from jax_diffusion.diffusion import Objective
from jax_diffusion.models import bind
from jax_diffusion.models.unet import UNet
from jax_diffusion.runtime import files

# Two compilations of one float32 network, as the steps of a sampler amplify them.
CLOSE = dict(rtol=0, atol=1e-3)
IMAGE = (8, 8, 1)
SEED = 2**31 + 5
STEPS = {"ddim": samplers.ddim_step, "ddpm": samplers.ddpm_step}
SCHEDULE = schedules.make_schedule(
    schedules.cosine_betas(50), keep=[0, 12, 24, 36, 49], rescale_timesteps=True
)


def make(sampler="ddim", *, multipliers=(1, 2), num_classes=None):
    """A draw and parameters, nowhere zero, so that all of them matter."""
    objective = Objective("v", "learned_range")
    model = UNet(
        out_channels=2,
        channels=8,
        multipliers=multipliers,
        num_res_blocks=1,
        attention_resolutions=(8 // len(multipliers),),
        num_groups=4,
        num_classes=num_classes,
    )
    params = random_params(model, IMAGE)

    def draw(params, seed, ids, label):
        keys = samplers.image_keys(jax.random.key(seed), ids)
        model_fn = bind(model, params, label)
        denoise_fn = diffusion.denoiser(model_fn, SCHEDULE, objective)
        denoise_fn = diffusion.clip_x_0(denoise_fn)
        x_T = samplers.normal(keys, IMAGE)
        return samplers.sample(keys, denoise_fn, STEPS[sampler], SCHEDULE, x_T)

    return draw, params


def in_process(draw, params, ids, label=None):
    ids = np.asarray(ids, np.int32)
    label = np.zeros_like(ids) if label is None else np.asarray(label, np.int32)
    return np.asarray(jax.jit(draw)(params, np.uint32(SEED), ids, label))


def linear(params, seed, ids, label):
    """A sampler without a network, quick to export."""
    keys = samplers.image_keys(jax.random.key(seed), ids)
    images = samplers.normal(keys, IMAGE)
    return images * params["a"]["scale"] + label[:, None, None, None]


LINEAR = {"a": {"scale": np.float32(0.5)}}


@pytest.fixture(scope="module")
def small():
    """The bytes of `linear`."""
    return export.export_sampler(linear, LINEAR)


@pytest.fixture(scope="module", params=["inside", "beside"])
def network(request, tmp_path_factory):
    """A file that holds a U-Net, or has it beside it; and what it was made of."""
    draw, params = make()
    path = tmp_path_factory.mktemp("export") / "model.jaxexport"
    about = {"sampler": "ddim", "steps": 5, "eta": 0.0}
    export.write(path, draw, params, beside=request.param == "beside", about=about)
    return path, draw, params


def sentence(info):
    """One sentence, of one line."""
    text = str(info.value)
    assert text.endswith(".") and "\n" not in text and ".." not in text
    return text


# --- the same images


def test_an_exported_ddim_draws_the_same_images_whatever_the_batch(network):
    path, draw, params = network
    sampler = export.read(path)
    whole = in_process(draw, params, range(3))
    assert 0.1 < np.abs(whole).mean() < 0.9  # not all of it clipped
    np.testing.assert_allclose(sampler(SEED, [2, 0]), whole[[2, 0]], **CLOSE)
    assert np.abs(sampler(SEED + 1, [2, 0]) - whole[[2, 0]]).max() > 0.1


def test_one_file_serves_batches_of_any_size(small):
    sampler = export.load_sampler(small)
    whole = sampler(SEED, range(5))
    for ids in ([3], [4, 0], range(3), range(5, -1, -1)):
        images = sampler(SEED, ids)
        assert images.shape == (len(ids), *IMAGE)
        for i, image in zip(ids, images, strict=True):
            if i < 5:
                np.testing.assert_array_equal(image, whole[i])


@pytest.mark.slow
def test_an_exported_ddpm_of_classes_draws_the_same_images():
    draw, params = make("ddpm", multipliers=(1,), num_classes=3)
    sampler = export.load_sampler(export.export_sampler(draw, params))
    label = np.array([0, 2, 1])
    images = np.asarray(sampler(SEED, np.arange(3), label))
    expected = in_process(draw, params, range(3), label)
    np.testing.assert_allclose(images, expected, **CLOSE)
    others = sampler(SEED, np.arange(3), np.array([1, 2, 1]))
    np.testing.assert_allclose(others[1:], images[1:], **CLOSE)
    assert np.abs(others[0] - images[0]).max() > 0.01


def test_a_seed_is_that_of_the_process_and_may_be_any_integer(small):
    sampler = export.load_sampler(small)
    keys = samplers.image_keys(jax.random.key(7), jax.numpy.arange(2))
    expected = 0.5 * samplers.normal(keys, IMAGE)
    np.testing.assert_allclose(sampler(7, [0, 1]), expected, rtol=1e-6)
    np.testing.assert_array_equal(sampler(-1, [0]), sampler(2**32 - 1, [0]))


def test_a_whole_tree_of_weights_comes_back_from_beside_the_sampler():
    tree = {"b": [np.float32(1)], "a": {"z": np.full(2, 3, np.float32)}}

    def draw(params, seed, ids, label):
        ten = 10 * params["b"][0] + params["a"]["z"].sum()
        return ten * ids.reshape(-1, 1, 1, 1).astype(np.float32)

    data = export.export_sampler(draw, tree, beside=True)
    weights = {"a/z": tree["a"]["z"], "b/0": tree["b"][0]}
    images = export.load_sampler(data, weights=weights)(0, [1, 2])
    np.testing.assert_array_equal(np.ravel(images), [16, 32])


# --- without this package


@pytest.mark.slow
def test_the_script_of_the_docstring_draws_them_without_flax_or_this_package(
    network, tmp_path
):
    path, draw, params = network
    script = export.__doc__.partition("    import hashlib")
    script = textwrap.dedent(script[1] + script[2])
    assert len(script.splitlines()) <= 20
    script += 'assert not {"flax", "jax_diffusion"} & {m.split(".")[0] for m in '
    script += "sys.modules}\n"
    (tmp_path / "draw.py").write_text(script)
    args = ("draw.py", path, str(SEED), "3", "images.npy")
    subprocess.run([sys.executable, *args], cwd=tmp_path, check=True)
    images = np.load(tmp_path / "images.npy")
    np.testing.assert_allclose(images, in_process(draw, params, range(3)), **CLOSE)


def test_the_side_car_says_what_goes_in_and_what_comes_out(network):
    path, _, params = network
    record = json.loads(path.with_name("model.jaxexport.json").read_text())
    assert record["file"] == path.name
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["platforms"] == ["cpu", "cuda", "tpu"]
    assert record["versions"]["jax"] == jax.__version__
    assert set(record["versions"]) == {"jax", "jaxlib", "jax_diffusion"}
    assert record["calling_convention_version"] >= 10
    assert record["about"] == {"sampler": "ddim", "steps": 5, "eta": 0.0}
    assert list(record["inputs"]) == ["weights", "seed", "ids", "label"]
    assert record["inputs"]["seed"] == {"shape": [], "dtype": "uint32"}
    assert record["inputs"]["ids"] == {"shape": ["b"], "dtype": "int32"}
    assert record["inputs"]["label"]["num_labels"] is None
    shape = ["b", *IMAGE]
    output = {"shape": shape, "dtype": "float32", "range": [-1, 1]}
    assert record["output"] == output
    weights = path.with_name("model.jaxexport.npz")
    if not weights.exists():
        assert record["weights"] is None and record["inputs"]["weights"] == {}
        assert len(list(path.parent.iterdir())) == 2  # and nothing temporary
        return
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["weights"] == {"file": weights.name, "sha256": digest}
    described = record["inputs"]["weights"].values()
    sizes = [np.prod(weight["shape"]) for weight in described]
    assert sum(sizes) == sum(a.size for a in jax.tree.leaves(params))
    assert path.stat().st_size < weights.stat().st_size


# --- what cannot be


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        lambda data: data[:-1],
        lambda data: data[:1000],
        lambda data: data[:-32],  # a plain file of jax.export
        lambda data: b"",
        lambda data: b"<html>not found</html>" * 9,
    ],
    ids=["flipped", "cut", "short", "undigested", "empty", "text"],
)
def test_damaged_samplers_are_one_sentence(small, damage):
    with pytest.raises(ValueError, match="whole") as info:
        export.load_sampler(damage(small))
    sentence(info)


@pytest.mark.parametrize("path", ["a.jaxexport", pathlib.Path("a.jaxexport"), None])
def test_a_path_is_not_taken_for_the_bytes_of_a_file(path):
    with pytest.raises(ValueError, match="data must be the bytes of a file, got") as e:
        inspect.unwrap(export.load_sampler)(path)  # without the types of tests
    sentence(e)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "deep" / "er" / "a.jaxexport"
    export.write(path, linear, LINEAR, beside=True, num_labels=4)
    return path


def test_a_sampler_beside_anothers_side_car_is_refused(written):
    data = export.export_sampler(lambda *args: 2 * linear(*args), LINEAR, beside=True)
    written.write_bytes(data)
    with pytest.raises(ValueError, match="must be that of its side-car") as info:
        export.read(written)
    sentence(info)


def test_weights_that_are_anothers_or_missing_are_refused(written):
    weights = written.with_name("a.jaxexport.npz")
    np.savez(weights, **{"a/scale": np.float32(1)})
    with pytest.raises(ValueError, match="weights are not those") as info:
        export.read(written)
    sentence(info)
    weights.unlink()
    with pytest.raises(ValueError, match=r"npz must be there: No such file") as info:
        export.read(written)
    sentence(info)
    for given in (None, {"a/scale": np.ones(2, np.float32)}):
        with pytest.raises(ValueError, match="weights must be the 1 array") as info:
            export.load_sampler(written.read_bytes(), weights=given)
        sentence(info)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"weights": '])
def test_a_side_car_that_is_none_is_refused(written, text):
    written.with_name("a.jaxexport.json").write_text(text)
    with pytest.raises(ValueError, match=r"side-car|must be a JSON file") as info:
        export.read(written)
    sentence(info)


def test_labels_and_ids_that_do_not_fit_are_refused(written):
    sampler = export.read(written)
    assert sampler(0, [1, 2], [0, 3]).shape == (2, *IMAGE)
    for ids, label, message in [
        ([1, 2], None, "label must be a vector of integers"),
        ([1, 2], [0, 4], r"labels must be in \[0, 4\)"),
        ([1, 2], [0], "label must have the shape of ids"),
        ([1.5], [0], "ids must be a vector of integers"),
        ([], [], "ids must be a vector of integers"),
        (3, 3, "ids must be a vector of integers"),
    ]:
        with pytest.raises(ValueError, match=message) as info:
            sampler(0, ids, label)
        sentence(info)


def test_what_a_newer_jax_has_exported_is_one_sentence(small):
    exported = jax.export.deserialize(bytearray(small))
    for change in (
        dict(mlir_module_serialized=b"ML\xefR of tomorrow"),
        dict(calling_convention_version=99),
        dict(platforms=("tpu",)),
    ):
        body = bytes(dataclasses.replace(exported, **change).serialize())
        data = body + hashlib.sha256(body).digest()
        record = {"sha256": hashlib.sha256(data).hexdigest()}
        record |= {"versions": {"jax": "9.9.9"}, "weights": None}
        record["inputs"] = {"label": {"num_labels": None}}
        with pytest.raises(ValueError, match=r"cannot run .* jax 9\.9\.9") as info:
            export.load_sampler(data, record=record)
        assert jax.__version__ in sentence(info)


def test_without_flatbuffers_the_extra_is_named(small, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (
        lambda: export.load_sampler(small),
        lambda: export.export_sampler(linear, LINEAR),
    ):
        with pytest.raises(ValueError, match=r"jax_diffusion\[export\]") as info:
            call()
        sentence(info)


def test_what_cannot_be_exported_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="one float32 array") as info:
        export.export_sampler(lambda params, seed, ids, label: ids, LINEAR)
    sentence(info)
    half = {"a": {"scale": jax.numpy.bfloat16(1)}}
    with pytest.raises(ValueError, match="got bfloat16: a/scale") as info:
        export.export_sampler(linear, half)
    sentence(info)
    monkeypatch.setattr(export, "MAX_INSIDE", 3)
    with pytest.raises(ValueError, match="must lie beside") as info:
        export.export_sampler(linear, LINEAR)
    sentence(info)
    assert export.export_sampler(linear, LINEAR, beside=True)


def test_a_write_that_fails_leaves_the_old_files(written, monkeypatch):
    before = {p.name: p.read_bytes() for p in written.parent.iterdir()}
    monkeypatch.setattr(export.files, "json_text", lambda *args, **options: "\ud800")
    with pytest.raises(UnicodeEncodeError):
        export.write(written, linear, LINEAR)
    monkeypatch.undo()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        export.write(written, linear, LINEAR)
    assert {p.name: p.read_bytes() for p in written.parent.iterdir()} == before
