"""The released checkpoints of OpenAI, Ho et al. and the DDIM repository, by name.

`RELEASED` maps the name of a file to its network, noise schedule and objective, which
the authors' READMEs give as flags. `REPRODUCES` maps it to the paper's results. This
module holds data only and imports nothing of the package.
"""

from typing import Any, NamedTuple


class Released(NamedTuple):
    """What a checkpoint is of: the knowledge that its tensors do not hold.

    Attributes:
        layout: how the tensors are named, a key of `layouts.LAYOUTS`.
        image_size: height and width of the images in pixels; they have 3 channels.
        model: a name in `MODELS` and the arguments of the network, as config.model.
        schedule: the noise schedule, as config.schedule.
        objective: the arguments of `diffusion.Objective`; None for a classifier.
        data: the data that it was trained on, as config.data.
    """

    layout: str
    image_size: int
    model: dict[str, Any]
    schedule: dict[str, Any]
    objective: dict[str, Any] | None
    data: dict[str, Any]


LINEAR = dict(name="linear", num_steps=1000)
COSINE = dict(name="cosine", num_steps=1000)
COSINE_4000 = dict(name="cosine", num_steps=4000, rescale_timesteps=True)
LEARNED = dict(mean_type="eps", var_type="learned_range")
# improved-diffusion's losses RESCALED_MSE and RESCALED_KL, used if training goes on.
HYBRID, VLB = LEARNED | dict(loss="hybrid"), LEARNED | dict(loss="vlb")
SMALL = dict(mean_type="eps", var_type="fixed_small", loss="l2")
LARGE = dict(mean_type="eps", var_type="fixed_large", loss="l2")

CIFAR10 = dict(name="tfds", path="cifar10", split="train", batch_size=128)
MULTIPLIERS = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


def _mse(num_steps: int) -> dict[str, Any]:
    """OpenAI's loss MSE: L_vlb is added without the factor T / 1000 of RESCALED_MSE."""
    return LEARNED | dict(loss="hybrid", vlb_scale=1 / num_steps)


def _folder(name: str, size: int) -> dict[str, Any]:
    """A folder of images: data that everybody keeps in a place of their own."""
    return dict(name="folder", path=f"data/{name}", image_size=size, batch_size=64)


def _ho(size: int, objective: dict[str, Any], data: dict[str, Any]) -> Released:
    """A network of Ho et al. or of the DDIM repository."""
    multipliers = {32: (1, 2, 2, 2), 64: (1, 2, 2, 2, 4)}.get(size, MULTIPLIERS[256])
    model = dict(
        name="unet",
        channels=128,
        multipliers=multipliers,
        num_res_blocks=2,
        attention_resolutions=(16,),
        scale_shift=False,
        init_style="ho",
        norm_epsilon=1e-6,
        embedding_order="sin_cos",
        embedding_endpoint=True,
        down_padding="bottom_right",
        dropout=0.0 if size == 256 else 0.1,
    )
    return Released("ddpm", size, model, LINEAR, objective, data)


def _improved(
    size: int, schedule: dict[str, Any], objective: dict[str, Any], **options: Any
) -> Released:
    """A network of improved-diffusion: `script_util.create_model`."""
    model = dict(
        name="unet",
        channels=128,
        multipliers=MULTIPLIERS[size],
        num_res_blocks=3,
        attention_resolutions=(16, 8),
        num_heads=4,
    )
    data = (
        CIFAR10 if size == 32 else _folder("imagenet" if size == 64 else "lsun", size)
    )
    return Released("openai", size, model | options, schedule, objective, data)


def _guided(
    size: int,
    *,
    schedule: dict[str, Any] = LINEAR,
    layout: str = "openai",
    data: str = "imagenet",
    **options: Any,
) -> Released:
    """A network of guided-diffusion, with the flags that all of them share."""
    model = dict(
        name="unet",
        channels=256,
        multipliers=MULTIPLIERS[size],
        num_res_blocks=2,
        attention_resolutions=(32, 16, 8),
        head_channels=64,
        resample="resblock",
        num_classes=1000,
    )
    objective, place = _mse(schedule["num_steps"]), _folder(data, size)
    return Released(layout, size, model | options, schedule, objective, place)


def _classifier(size: int, depth: int = 2) -> Released:
    """A classifier of guided-diffusion: `script_util.create_classifier`."""
    model = dict(
        name="noisy_classifier",
        num_labels=1000,
        channels=128,
        multipliers=MULTIPLIERS[size],
        num_res_blocks=depth,
        attention_resolutions=(32, 16, 8),
        head_channels=64,
        resample="resblock",
        pool="attention",
    )
    schedule = COSINE if size == 64 else LINEAR  # as the denoiser of this size
    return Released("openai", size, model, schedule, None, _folder("imagenet", size))


LSUN = dict(
    num_res_blocks=2, num_heads=1, attention_resolutions=(16,), scale_shift=False
)

RELEASED: dict[str, Released] = {
    # improved-diffusion
    "cifar10_uncond_50M_500K": _improved(32, COSINE_4000, HYBRID, dropout=0.3),
    "cifar10_uncond_vlb_50M_500K": _improved(32, COSINE_4000, VLB, dropout=0.3),
    "imagenet64_uncond_100M_1500K": _improved(64, COSINE_4000, HYBRID),
    "imagenet64_uncond_vlb_100M_1500K": _improved(64, COSINE_4000, VLB),
    "imagenet64_cond_270M_250K": _improved(
        64,
        dict(name="cosine", num_steps=4000),
        _mse(4000),
        channels=192,
        num_classes=1000,
    ),
    "upsample_cond_500K": _improved(
        256,
        dict(name="linear", num_steps=4000),
        _mse(4000),
        channels=192,
        num_res_blocks=2,
        num_classes=1000,
        low_res=True,
    ),
    "lsun_uncond_100M_1200K_bs128": _improved(256, LINEAR, _mse(1000), **LSUN),
    "lsun_uncond_100M_2400K_bs64": _improved(256, LINEAR, _mse(1000), **LSUN),
    # guided-diffusion
    "64x64_diffusion": _guided(
        64,
        schedule=COSINE,
        layout="openai_new",
        channels=192,
        num_res_blocks=3,
        dropout=0.1,
    ),
    "128x128_diffusion": _guided(128, head_channels=None, num_heads=4),
    "256x256_diffusion": _guided(256),
    "256x256_diffusion_uncond": _guided(256, num_classes=None),
    "512x512_diffusion": _guided(512),
    "64_256_upsampler": _guided(
        256, channels=192, head_channels=None, num_heads=4, low_res=True
    ),
    "128_512_upsampler": _guided(
        512,
        channels=192,
        multipliers=MULTIPLIERS[256],
        attention_resolutions=(32, 16),
        low_res=True,
    ),
    "lsun_bedroom": _guided(256, data="lsun_bedroom", num_classes=None, dropout=0.1),
    "lsun_cat": _guided(256, data="lsun_cat", num_classes=None, dropout=0.1),
    "lsun_horse": _guided(256, data="lsun_horse", num_classes=None, dropout=0.1),
    "lsun_horse_nodropout": _guided(256, data="lsun_horse", num_classes=None),
    "64x64_classifier": _classifier(64, depth=4),
    "128x128_classifier": _classifier(128),
    "256x256_classifier": _classifier(256),
    "512x512_classifier": _classifier(512),
    # Ho et al., as converted for the DDIM repository, parameters or their EMA:
    # cifar10, lsun_bedroom, lsun_cat and lsun_church. Then the DDIM repository's own.
    "model-790000": _ho(32, LARGE, CIFAR10),
    "model-2388000": _ho(256, SMALL, _folder("lsun_bedroom", 256)),
    "model-1761000": _ho(256, SMALL, _folder("lsun_cat", 256)),
    "model-4432000": _ho(256, SMALL, _folder("lsun_church", 256)),
    "celeba64": _ho(64, LARGE, _folder("celeba", 64)),
}

# Released checkpoint -> results of its paper, a key of `evaluation.published.PAPERS`.
REPRODUCES = {
    "model-790000": "ddpm_cifar10",
    "model-2388000": "ddpm_lsun_bedroom",
    "model-4432000": "ddpm_lsun_church",
    "celeba64": "ddim_celeba64",
    "cifar10_uncond_50M_500K": "iddpm_cifar10_hybrid",
    "cifar10_uncond_vlb_50M_500K": "iddpm_cifar10_vlb",
    "imagenet64_uncond_100M_1500K": "iddpm_imagenet64_hybrid",
    "imagenet64_uncond_vlb_100M_1500K": "iddpm_imagenet64_vlb",
    "imagenet64_cond_270M_250K": "iddpm_imagenet64_labels",
    "lsun_bedroom": "guided_lsun_bedroom",
    "lsun_cat": "guided_lsun_cat",
    "lsun_horse": "guided_lsun_horse",
    **{f"{n}x{n}_diffusion": f"guided_imagenet{n}" for n in (64, 128, 256, 512)},
}
