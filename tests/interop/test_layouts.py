"""Names and shapes of parameters elsewhere: every released network, and every layout.

What official code calls its tensors is derived here a second time, by walking through
its constructors: improved_diffusion/unet.py of openai/improved-diffusion at 1bc7bbb,
guided_diffusion/unet.py of openai/guided-diffusion at 22e0df8 and models/diffusion.py
of ermongroup/ddim at e8df66c. diffusers itself is asked where it is installed.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.peers import peer

from jax_diffusion import config as settings
from jax_diffusion import training
from jax_diffusion.interop import diffusers_config, recognize
from jax_diffusion.interop import layouts as weights
from jax_diffusion.interop.released import RELEASED
from jax_diffusion.models.noisy_classifier import NoisyClassifier
from jax_diffusion.models.unet import UNet

# The official constructors: tensors by name, as shapes


class Names(dict):
    """Shapes by name, filled in by layers."""

    def layer(self, name, *shape, bias=True):
        self[f"{name}.weight"] = shape
        if bias:
            self[f"{name}.bias"] = shape[:1]

    def norm(self, name, channels):
        self.layer(name, channels)
        self[f"{name}.bias"] = (channels,)

    def conv(self, name, c_in, c_out, size=3):
        self.layer(name, c_out, c_in, size, size)

    def openai_block(self, name, c_in, c_out, emb, scale_shift):
        self.norm(f"{name}.in_layers.0", c_in)
        self.conv(f"{name}.in_layers.2", c_in, c_out)
        self.layer(f"{name}.emb_layers.1", (1 + scale_shift) * c_out, emb)
        self.norm(f"{name}.out_layers.0", c_out)
        self.conv(f"{name}.out_layers.3", c_out, c_out)
        if c_in != c_out:
            self.conv(f"{name}.skip_connection", c_in, c_out, 1)

    def openai_attention(self, name, channels):
        self.norm(f"{name}.norm", channels)
        self.layer(f"{name}.qkv", 3 * channels, channels, 1)
        self.layer(f"{name}.proj_out", channels, channels, 1)

    def ddpm_block(self, name, c_in, c_out, emb):
        self.norm(f"{name}.norm1", c_in)
        self.conv(f"{name}.conv1", c_in, c_out)
        self.layer(f"{name}.temb_proj", c_out, emb)
        self.norm(f"{name}.norm2", c_out)
        self.conv(f"{name}.conv2", c_out, c_out)
        if c_in != c_out:
            self.conv(f"{name}.nin_shortcut", c_in, c_out, 1)

    def ddpm_attention(self, name, channels):
        self.norm(f"{name}.norm", channels)
        for layer in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{layer}", channels, channels, 1)


def openai_trunk(names, c_in, base, multipliers, depth, ds_attend, scale_shift, updown):
    """Fills in the way down and the middle; channels of every stage, and the last."""
    emb = 4 * base
    names.layer("time_embed.0", emb, base)
    names.layer("time_embed.2", emb, emb)
    c = int(multipliers[0] * base)
    names.conv("input_blocks.0.0", c_in, c)
    stages, ds, number = [c], 1, 1
    for level, multiplier in enumerate(multipliers):
        for _ in range(depth):
            c_out = int(multiplier * base)
            names.openai_block(f"input_blocks.{number}.0", c, c_out, emb, scale_shift)
            c = c_out
            if ds in ds_attend:
                names.openai_attention(f"input_blocks.{number}.1", c)
            stages.append(c)
            number += 1
        if level != len(multipliers) - 1:
            if updown:
                names.openai_block(f"input_blocks.{number}.0", c, c, emb, scale_shift)
            else:
                names.conv(f"input_blocks.{number}.0.op", c, c)
            stages.append(c)
            number, ds = number + 1, 2 * ds
    names.openai_block("middle_block.0", c, c, emb, scale_shift)
    names.openai_attention("middle_block.1", c)
    names.openai_block("middle_block.2", c, c, emb, scale_shift)
    return stages, c


def openai_unet(
    c_in, c_out, base, multipliers, depth, ds_attend, scale_shift, updown, classes
):
    """improved- and guided-diffusion's UNetModel."""
    names = Names()
    arguments = (c_in, base, multipliers, depth, ds_attend, scale_shift, updown)
    stages, c = openai_trunk(names, *arguments)
    if classes is not None:
        names.layer("label_emb", classes, 4 * base, bias=False)
    number, ds = 0, 2 ** (len(multipliers) - 1)
    for level in reversed(range(len(multipliers))):
        for i in range(depth + 1):
            stem, width = f"output_blocks.{number}", int(base * multipliers[level])
            block = (c + stages.pop(), width, 4 * base, scale_shift)
            names.openai_block(f"{stem}.0", *block)
            c, layer = width, 1
            if ds in ds_attend:
                names.openai_attention(f"{stem}.1", c)
                layer = 2
            if level and i == depth:
                if updown:
                    block = (c, c, 4 * base, scale_shift)
                    names.openai_block(f"{stem}.{layer}", *block)
                else:
                    names.conv(f"{stem}.{layer}.conv", c, c)
                ds //= 2
            number += 1
    names.norm("out.0", c)
    names.conv("out.2", c, c_out)
    return names


def openai_encoder(
    size, c_in, labels, base, multipliers, depth, ds_attend, scale_shift, updown, pool
):
    """guided-diffusion's EncoderUNetModel."""
    names = Names()
    arguments = (c_in, base, multipliers, depth, ds_attend, scale_shift, updown)
    stages, c = openai_trunk(names, *arguments)
    if pool.startswith("spatial"):
        names.layer("out.0", 2048, sum(stages) + c)
        if pool == "spatial_v2":
            names.norm("out.1", 2048)
        names.layer("out.3" if pool == "spatial_v2" else "out.2", labels, 2048)
        return names
    names.norm("out.0", c)
    if pool == "adaptive":
        names.conv("out.3", c, labels, 1)
        return names
    pixels = (size // 2 ** (len(multipliers) - 1)) ** 2
    names["out.2.positional_embedding"] = (c, pixels + 1)
    names.layer("out.2.qkv_proj", 3 * c, c, 1)
    names.layer("out.2.c_proj", labels, c, 1)
    return names


def ddpm_unet(size, c_in, c_out, base, multipliers, depth, resolutions):
    """The DDIM repository's Model."""
    names, emb = Names(), 4 * base
    names.layer("temb.dense.0", emb, base)
    names.layer("temb.dense.1", emb, emb)
    names.conv("conv_in", c_in, base)
    into = (1, *multipliers)
    for level, multiplier in enumerate(multipliers):
        c, width, stem = base * into[level], base * multiplier, f"down.{level}"
        for i in range(depth):
            names.ddpm_block(f"{stem}.block.{i}", c, width, emb)
            c = width
            if size in resolutions:
                names.ddpm_attention(f"{stem}.attn.{i}", c)
        if level != len(multipliers) - 1:
            names.conv(f"{stem}.downsample.conv", c, c)
            size //= 2
    names.ddpm_block("mid.block_1", c, c, emb)
    names.ddpm_attention("mid.attn_1", c)
    names.ddpm_block("mid.block_2", c, c, emb)
    for level in reversed(range(len(multipliers))):
        width, stem = base * multipliers[level], f"up.{level}"
        for i in range(depth + 1):
            skip = base * into[level] if i == depth else width
            names.ddpm_block(f"{stem}.block.{i}", c + skip, width, emb)
            c = width
            if size in resolutions:
                names.ddpm_attention(f"{stem}.attn.{i}", c)
        if level:
            names.conv(f"{stem}.upsample.conv", c, c)
            size *= 2
    names.norm("norm_out", c)
    names.conv("conv_out", c, c_out)
    return names


# What each released checkpoint was made with: the flags of its README, in the words of
# the constructors above.

M32, M64, M128 = (1, 2, 2, 2), (1, 2, 3, 4), (1, 1, 2, 3, 4)
M256, M512 = (1, 1, 2, 2, 4, 4), (0.5, 1, 1, 2, 2, 4, 4)


def improved(base, multipliers, depth, ds, classes=None, c_in=3, scale_shift=True):
    return openai_unet(
        c_in, 6, base, multipliers, depth, ds, scale_shift, False, classes
    )


def guided(size, base, multipliers, classes=1000, depth=2, to=8, c_in=3):
    ds = [size // resolution for resolution in (32, 16, 8) if resolution >= to]
    return openai_unet(c_in, 6, base, multipliers, depth, ds, True, True, classes)


def classifier(size, multipliers, depth=2):
    ds = [size // 32, size // 16, size // 8]
    return openai_encoder(
        size, 3, 1000, 128, multipliers, depth, ds, True, True, "attention"
    )


def improved_lsun():
    return improved(128, M256, 2, [16], scale_shift=False)


def ho_256():
    return ddpm_unet(256, 3, 3, 128, M256, 2, [16])


def guided_lsun():
    return guided(256, 256, M256, None)


OFFICIAL = {
    "cifar10_uncond_50M_500K": lambda: improved(128, M32, 3, [2, 4]),
    "cifar10_uncond_vlb_50M_500K": lambda: improved(128, M32, 3, [2, 4]),
    "imagenet64_uncond_100M_1500K": lambda: improved(128, M64, 3, [4, 8]),
    "imagenet64_uncond_vlb_100M_1500K": lambda: improved(128, M64, 3, [4, 8]),
    "imagenet64_cond_270M_250K": lambda: improved(192, M64, 3, [4, 8], 1000),
    "upsample_cond_500K": lambda: improved(192, M256, 2, [16, 32], 1000, 6),
    "lsun_uncond_100M_1200K_bs128": improved_lsun,
    "lsun_uncond_100M_2400K_bs64": improved_lsun,
    "64x64_diffusion": lambda: guided(64, 192, M64, depth=3),
    "128x128_diffusion": lambda: guided(128, 256, M128),
    "256x256_diffusion": lambda: guided(256, 256, M256),
    "256x256_diffusion_uncond": guided_lsun,
    "512x512_diffusion": lambda: guided(512, 256, M512),
    "64_256_upsampler": lambda: guided(256, 192, M256, c_in=6),
    "128_512_upsampler": lambda: guided(512, 192, M256, to=16, c_in=6),
    "lsun_bedroom": guided_lsun,
    "lsun_cat": guided_lsun,
    "lsun_horse": guided_lsun,
    "lsun_horse_nodropout": guided_lsun,
    "64x64_classifier": lambda: classifier(64, M64, 4),
    "128x128_classifier": lambda: classifier(128, M128),
    "256x256_classifier": lambda: classifier(256, M256),
    "512x512_classifier": lambda: classifier(512, M512),
    "model-790000": lambda: ddpm_unet(32, 3, 3, 128, M32, 2, [16]),
    "model-2388000": ho_256,
    "model-1761000": ho_256,
    "model-4432000": ho_256,
    "celeba64": lambda: ddpm_unet(64, 3, 3, 128, (1, 2, 2, 2, 4), 2, [16]),
}

# Counted from the papers' and repositories' configurations, by hand; of the classifiers
# there is no such number.
COUNTS = {
    "cifar10_uncond_50M_500K": 52_546_438,
    "cifar10_uncond_vlb_50M_500K": 52_546_438,
    "imagenet64_uncond_100M_1500K": 121_063_942,
    "imagenet64_uncond_vlb_100M_1500K": 121_063_942,
    "imagenet64_cond_270M_250K": 273_049_350,
    "upsample_cond_500K": 279_792_390,
    "lsun_uncond_100M_1200K_bs128": 113_676_678,
    "lsun_uncond_100M_2400K_bs64": 113_676_678,
    "64x64_diffusion": 295_904_454,
    "128x128_diffusion": 421_529_606,
    "256x256_diffusion": 553_838_086,
    "256x256_diffusion_uncond": 552_814_086,
    "512x512_diffusion": 558_997_638,
    "64_256_upsampler": 311_795_910,
    "128_512_upsampler": 308_835_270,
    "lsun_bedroom": 552_814_086,
    "lsun_cat": 552_814_086,
    "lsun_horse": 552_814_086,
    "lsun_horse_nodropout": 552_814_086,
    "model-790000": 35_746_307,
    "model-2388000": 113_673_219,
    "model-1761000": 113_673_219,
    "model-4432000": 113_673_219,
    "celeba64": 78_700_803,
}


@functools.cache
def shapes_of(model, image_shape):
    inputs = training.example_inputs(model, image_shape)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]


def shapes_by_name(model, image_shape, layout, heads_of=lambda channels: 1):
    found = weights.leaves(shapes_of(model, image_shape), layout, heads_of)
    return {name: leaf.their_shape for leaf in found for name in leaf.names}


def built(name):
    """The network that `RELEASED` describes."""
    found = RELEASED[name]
    schedule = settings.make_schedule(found.schedule)
    objective = settings.make_objective(found.objective, schedule)
    model = dict(found.model, dropout=0.0)  # many are one network but for that
    return settings.make_model(model, objective, 3)


def test_all_that_is_released_is_tested():
    assert RELEASED.keys() == OFFICIAL.keys()
    classifiers = {name for name in RELEASED if "classifier" in name}
    assert RELEASED.keys() - classifiers == COUNTS.keys()


QUICK = ("cifar10_uncond_50M_500K", "64x64_classifier", "model-790000")  # to trace


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in RELEASED
    ],
)
def test_released_networks_have_the_official_names_shapes_and_counts(name):
    found, official = RELEASED[name], OFFICIAL[name]()
    image_shape = (found.image_size, found.image_size, 3)
    assert shapes_by_name(built(name), image_shape, found.layout) == official
    count = sum(int(np.prod(shape)) for shape in official.values())
    assert count == COUNTS.get(name, count)
    assert recognize.COUNTS[name] == (len(official), count)


def heads(name, channels):
    model = built(name)
    size = model.head_channels
    return channels // size if size else model.num_heads


@pytest.mark.parametrize(
    ("name", "by_channels"),
    [
        ("cifar10_uncond_50M_500K", {256: 4}),
        ("lsun_bedroom", {512: 8, 1024: 16}),
        ("lsun_uncond_100M_1200K_bs128", {512: 1}),
        ("64x64_diffusion", {384: 6, 768: 12}),
        ("128x128_diffusion", {512: 4, 1024: 4}),
        ("64_256_upsampler", {384: 4, 768: 4}),
        ("128_512_upsampler", {384: 6, 768: 12}),
        ("64x64_classifier", {512: 8}),
        ("model-790000", {256: 1}),
    ],
)
def test_attention_has_the_official_number_of_heads(name, by_channels):
    assert {c: heads(name, c) for c in by_channels} == by_channels


# What the READMEs say of the process: T, schedule, rescaling, what is learned.
PROCESSES = {
    "cifar10_uncond_50M_500K": (4000, "cosine", True, "learned_range"),
    "imagenet64_uncond_vlb_100M_1500K": (4000, "cosine", True, "learned_range"),
    "imagenet64_cond_270M_250K": (4000, "cosine", False, "learned_range"),
    "upsample_cond_500K": (4000, "linear", False, "learned_range"),
    "lsun_uncond_100M_2400K_bs64": (1000, "linear", False, "learned_range"),
    "64x64_diffusion": (1000, "cosine", False, "learned_range"),
    "512x512_diffusion": (1000, "linear", False, "learned_range"),
    "64_256_upsampler": (1000, "linear", False, "learned_range"),
    "lsun_horse": (1000, "linear", False, "learned_range"),
    "model-790000": (1000, "linear", False, "fixed_large"),
    "model-2388000": (1000, "linear", False, "fixed_small"),
    "celeba64": (1000, "linear", False, "fixed_large"),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_the_process_is_the_official_one(name):
    found = RELEASED[name]
    process = (
        found.schedule.get("rescale_timesteps", False),
        found.objective["var_type"],
    )
    assert (found.schedule["num_steps"], found.schedule["name"], *process) == (
        PROCESSES[name]
    )
    assert found.objective["mean_type"] == "eps"
    # One term of the bound weighs T / 1000 or 1, where `vlb` is T times a term.
    objective = settings.make_objective(
        found.objective, settings.make_schedule(found.schedule)
    )
    if objective.loss == "hybrid":
        rescaled = found.schedule.get("rescale_timesteps", False)
        # The default of a hybrid loss is the rescaled one.
        expected = None if rescaled else 1 / found.schedule["num_steps"]
        assert objective.vlb_scale == expected


# Networks that are not released, in every layout

SMALL = dict(channels=8, multipliers=(1, 2, 3), num_res_blocks=2, num_groups=4)
ATTENDING = dict(attention_resolutions=(4, 8))


@pytest.mark.slow
@pytest.mark.parametrize("resample", ["conv", "resblock"])
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("resolutions", [(), (4,), (4, 8, 16)], ids=str)
def test_openai_names_follow_every_switch(resample, scale_shift, resolutions):
    model = UNet(
        **SMALL,
        attention_resolutions=resolutions,
        scale_shift=scale_shift,
        resample=resample,
        num_classes=5,
        low_res=True,
    )
    official = openai_unet(
        6,
        3,
        8,
        (1, 2, 3),
        2,
        [16 // r for r in resolutions],
        scale_shift,
        resample == "resblock",
        5,
    )
    assert shapes_by_name(model, (16, 16, 3), "openai") == official


def test_averaging_takes_a_number_and_has_no_tensors():
    model = UNet(**SMALL, **ATTENDING, resample="pool")
    with_conv = openai_unet(3, 3, 8, (1, 2, 3), 2, [2, 4], True, False, None)
    official = {
        name: shape
        for name, shape in with_conv.items()
        if not re.search(r"\.op\.|\d\.conv\.", name)
    }
    assert shapes_by_name(model, (16, 16, 3), "openai") == official


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_classifiers_have_the_official_names(pool):
    model = NoisyClassifier(**SMALL, **ATTENDING, pool=pool, num_labels=7)
    official = openai_encoder(16, 3, 7, 8, (1, 2, 3), 2, [2, 4], True, False, pool)
    assert shapes_by_name(model, (16, 16, 3), "openai") == official


def test_ddpm_names_are_official_for_every_depth():
    model = UNet(**SMALL, **ATTENDING, scale_shift=False)
    official = ddpm_unet(16, 3, 3, 8, (1, 2, 3), 2, [4, 8])
    assert shapes_by_name(model, (16, 16, 3), "ddpm") == official


def random_tensors(shapes):
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


@pytest.mark.parametrize("layout", weights.LAYOUTS)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_any_network_comes_back_bit_for_bit(layout, heads):
    params = shapes_of(UNet(**SMALL, **ATTENDING, scale_shift=False), (16, 16, 3))
    wanted = weights.leaves(params, layout, lambda channels: heads)
    tensors = random_tensors({n: w.their_shape for w in wanted for n in w.names})
    ours = weights.from_torch(tensors, wanted)
    back = weights.to_torch(ours, wanted)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


# The order of queries, keys and values


@pytest.mark.parametrize("heads", [2, 4])
def test_rows_of_qkv_are_sorted_by_head_in_the_old_order_only(heads):
    params = shapes_of(UNet(**SMALL, attention_resolutions=()), (16, 16, 3))
    channels, size = 24, 24 // heads
    kernels = {}
    for layout in ("openai", "openai_new"):
        wanted = weights.leaves(params, layout, lambda c: heads)
        tensors = random_tensors({n: w.their_shape for w in wanted for n in w.names})
        rows = np.arange(3 * channels, dtype=np.float32)
        weight = np.broadcast_to(rows[:, None, None], (3 * channels, channels, 1))
        tensors["middle_block.1.qkv.weight"] = weight
        tensors["middle_block.1.qkv.bias"] = rows
        qkv = weights.from_torch(tensors, wanted)["mid_attention"]["qkv"]
        np.testing.assert_array_equal(qkv["kernel"][0], qkv["bias"])
        kernels[layout] = np.asarray(qkv["bias"])
    np.testing.assert_array_equal(kernels["openai_new"], rows)
    for part in range(3):  # q, k, v
        for head in range(heads):
            ours = kernels["openai"].reshape(3, heads, size)[part, head]
            theirs = rows.reshape(heads, 3, size)[head, part]
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("layout", ["openai", "openai_new"])
def test_the_attention_pool_is_in_our_order_always(layout):
    model = NoisyClassifier(**SMALL, **ATTENDING, pool="attention", num_heads=4)
    wanted = weights.leaves(shapes_of(model, (16, 16, 3)), layout, lambda c: 4)
    tensors = random_tensors({n: w.their_shape for w in wanted for n in w.names})
    pool = weights.from_torch(tensors, wanted)["pool"]
    weight, positions = (
        tensors[f"out.2.{name}"] for name in ("qkv_proj.weight", "positional_embedding")
    )
    np.testing.assert_array_equal(pool["qkv_proj"]["kernel"], weight[..., 0].T)
    np.testing.assert_array_equal(pool["positions"], positions.T)


def test_split_qkv_is_put_side_by_side():
    params = shapes_of(UNet(**SMALL, scale_shift=False), (16, 16, 3))
    wanted = weights.leaves(params, "diffusers", lambda c: 4)
    tensors = random_tensors({n: w.their_shape for w in wanted for n in w.names})
    qkv = weights.from_torch(tensors, wanted)["mid_attention"]["qkv"]["kernel"]
    stem = "mid_block.attentions.0.to_"
    parts = [tensors[f"{stem}{name}.weight"].T for name in "qkv"]
    np.testing.assert_array_equal(qkv, np.concatenate(parts, axis=1))


# Mistakes


def test_a_mismatch_lists_every_tensor_in_one_sentence():
    params = shapes_of(UNet(**SMALL), (16, 16, 3))
    wanted = weights.leaves(params, "openai")
    tensors = random_tensors({n: w.their_shape for w in wanted for n in w.names})
    del tensors["out.2.bias"], tensors["time_embed.0.weight"]
    tensors["new.weight"] = np.zeros((2, 3))
    tensors["out.0.bias"] = np.zeros((9,))
    tensors["input_blocks.0.0.weight"] = np.zeros((8, 4, 3, 3))
    with pytest.raises(ValueError, match="exactly the tensors") as info:
        weights.from_torch(tensors, wanted)
    message = str(info.value)
    for words in (
        "got 5 differences: ",
        "out.2.bias (3,) is missing",
        "time_embed.0.weight (32, 8) is missing",
        "new.weight (2, 3) is unexpected",
        "out.0.bias should be (8,) and is (9,)",
        "input_blocks.0.0.weight should be (8, 3, 3, 3) and is (8, 4, 3, 3)",
    ):
        assert words in message
    assert "\n" not in message and message.endswith(".")


@pytest.mark.parametrize(
    ("layout", "options", "layer"),
    [
        ("ddpm", dict(num_classes=3), "label.embedding"),
        ("ddpm", dict(resample="resblock"), "down_0_halve."),
        ("diffusers", dict(resample="resblock"), "down_0_halve."),
    ],
)
def test_layers_without_a_place_are_named(layout, options, layer):
    params = shapes_of(UNet(**SMALL, **options), (16, 16, 3))
    with pytest.raises(ValueError, match=rf"'{layout}' must have .*got {layer}"):
        weights.leaves(params, layout)
    with pytest.raises(ValueError, match=r"layout must be one of .*, got 'tf'"):
        weights.leaves(params, "tf")


# diffusers

# Of google/ddpm-cifar10-32 and its like on the hub: size, widths, the level that
# attends, and how many parameters there are.
HUB = {
    "google/ddpm-cifar10-32": (32, (128, 256, 256, 256), 1, 35_746_307),
    # celebahq, church, bedroom and cat are one network
    "google/ddpm-celebahq-256": (256, (128, 128, 256, 256, 512, 512), 4, 113_673_219),
}


def hub_config(name):
    size, widths, attending, _ = HUB[name]
    down = ["DownBlock2D"] * len(widths)
    down[attending] = "AttnDownBlock2D"
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": list(widths),
        "center_input_sample": False,
        "down_block_types": down,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": size,
        "time_embedding_type": "positional",
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", HUB)
def test_networks_of_the_hub_are_ho_et_als(name):
    config = hub_config(name)
    model = UNet(**diffusers_config.unet_from_config(config), out_channels=3)
    shapes = shapes_by_name(model, (config["sample_size"],) * 2 + (3,), "diffusers")
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == HUB[name][-1]
    released = built("model-790000" if config["sample_size"] == 32 else "model-2388000")
    for field in ("multipliers", "norm_epsilon", "embedding_endpoint", "down_padding"):
        assert getattr(model, field) == getattr(released, field)
    assert (model.embedding_order, model.scale_shift) == ("sin_cos", False)
    assert tuple(model.attention_resolutions) == (16,)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of its own imports
@pytest.mark.parametrize("name", HUB)
def test_networks_of_the_hub_have_the_names_that_diffusers_gives(name):
    torch = pytest.importorskip("torch")
    diffusers = peer("diffusers")
    config = hub_config(name)
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel.from_config(config)
    model = UNet(**diffusers_config.unet_from_config(config), out_channels=3)
    shapes = shapes_by_name(model, (config["sample_size"],) * 2 + (3,), "diffusers")
    assert shapes == {n: tuple(t.shape) for n, t in theirs.state_dict().items()}


def test_old_names_of_diffusers_are_taken_for_the_new_ones():
    old = ("query", "key", "value", "proj_attn", "group_norm")
    new = ("to_q", "to_k", "to_v", "to_out.0", "group_norm")
    stem = "down_blocks.1.attentions.0"
    tensors = {f"{stem}.{name}.weight": i for i, name in enumerate(old)}
    renamed = {f"{stem}.{name}.weight": i for i, name in enumerate(new)}
    assert weights.new_diffusers_names(tensors) == renamed
    assert weights.new_diffusers_names(renamed) == renamed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(down_block_types=["SkipDownBlock2D"] * 4), "SkipDownBlock2D"),
        (dict(time_embedding_type="fourier"), "time_embedding_type = 'fourier'"),
        (dict(act_fn="gelu"), "act_fn = 'gelu'"),
        (dict(freq_shift=2), "freq_shift = 2"),
        (dict(downsample_padding=2), "downsample_padding = 2"),
        (dict(resnet_time_scale_shift="spatial"), "= 'spatial'"),
        (dict(resnet_time_scale_shift="scale_shift"), "attn_norm_num_groups = None"),
        (dict(attn_norm_num_groups=16), "attn_norm_num_groups = 16"),
        (
            dict(up_block_types=["UpBlock2D"] * 4),
            "different sizes on the way down and up",
        ),
        (dict(sample_size=None), "sample_size must be an integer in [1, 16384]"),
        (dict(sample_size=[32, 64, 3]), "sample_size must be a number or two"),
    ],
)
def test_what_no_published_checkpoint_needs_is_named(change, words):
    config = hub_config("google/ddpm-cifar10-32") | change
    with pytest.raises(ValueError, match=re.escape(words)):
        diffusers_config.unet_from_config(config)


def test_missing_fields_of_a_config_are_named():
    config = hub_config("google/ddpm-cifar10-32")
    del config["sample_size"], config["up_block_types"]
    with pytest.raises(ValueError, match=r"fields \['sample_size', 'up_block_types'\]"):
        diffusers_config.unet_from_config(config)


@pytest.mark.parametrize(
    "change",
    [
        dict(beta_schedule="exp"),
        dict(prediction_type="flow"),
        dict(variance_type="learned"),
    ],
)
def test_unknown_processes_are_named(change):
    (value,) = change.values()
    with pytest.raises(ValueError, match=f"got .*{value!r}"):
        diffusers_config.process_from_scheduler(change)


@pytest.mark.parametrize(
    "change",
    [
        *(
            dict(_class_name=name)
            for name in """
            ScoreSdeVeScheduler KarrasVeScheduler LCMScheduler os:system
            """.split()
        ),
        *(dict(_class_name=name) for name in ("", 0, True, None, ["DDPMScheduler"])),
        dict(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True),
        dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=500),
        dict(_class_name="FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True),
        dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=0.0),
        dict(_class_name="EDMEulerScheduler", prediction_type="v_prediction"),
        dict(_class_name="EDMDPMSolverMultistepScheduler", sigma_schedule="exponent"),
        dict(_class_name="EDMEulerScheduler", sigma_data="0.5"),
        dict(_class_name="EulerDiscreteScheduler", timestep_type="continuous"),
        dict(
            _class_name="DPMSolverMultistepScheduler", prediction_type="flow_prediction"
        ),
    ],
)
def test_schedulers_of_other_processes_are_refused(change):
    _, value = list(change.items())[-1]
    with pytest.raises(ValueError, match=f"got .*{re.escape(repr(value))}"):
        diffusers_config.process_from_scheduler(change)


@pytest.mark.parametrize(
    ("change", "ends"),
    [
        ({}, (1e-4, 0.02)),
        (dict(_class_name="DDIMScheduler"), (1e-4, 0.02)),
        (dict(_class_name="PNDMScheduler", use_karras_sigmas=None), (1e-4, 0.02)),
        (dict(_class_name="HeunDiscreteScheduler"), (0.00085, 0.012)),
        (
            dict(
                _class_name="DPMSolverMultistepScheduler",
                variance_type=None,
                use_karras_sigmas=True,
                use_flow_sigmas=False,
            ),
            (1e-4, 0.02),
        ),
    ],
)
def test_all_schedulers_of_the_process_of_ddpm_are_read(change, ends):
    schedule, objective = diffusers_config.process_from_scheduler(change)
    wanted = dict(name="linear", rescale=False, num_steps=1000)
    assert schedule == wanted | dict(zip(("start", "end"), ends, strict=True))
    assert objective["var_type"] == "fixed_small"


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_numbers_of_other_types_become_float32(dtype):
    wanted = weights.leaves(shapes_of(UNet(**SMALL), (16, 16, 3)), "openai")
    tensors = random_tensors({n: w.their_shape for w in wanted for n in w.names})
    theirs = {name: t.astype(dtype) for name, t in tensors.items()}
    ours = weights.from_torch(theirs, wanted)
    assert {a.dtype for a in jax.tree.leaves(ours)} == {np.dtype(np.float32)}
    bias = theirs["out.2.bias"].astype(np.float32)
    np.testing.assert_array_equal(ours["conv_out"]["bias"], bias)
