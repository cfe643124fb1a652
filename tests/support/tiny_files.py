"""A tiny run with random weights; and files as PyTorch and diffusers write them."""

import io
import json
import pickle

import numpy as np
import pytest
from ml_collections import ConfigDict
from support.peers import peer
from support.strange_files import pickled_zip, storage, tensor
from support.tiny_runs import random_params

from jax_diffusion import config as configs
from jax_diffusion.interop import foreign
from jax_diffusion.interop.tensors import STORAGES
from jax_diffusion.pipeline import Run

MODEL = dict(
    name="unet",
    channels=8,
    multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_groups=4,
)


def tiny_run(image_shape=(8, 8, 3), objective=None, **model):
    """A U-Net of 8 x 8 images, nowhere zero, so that all of it matters.

    Args:
        image_shape: (h, w, c).
        objective: group of the config.
        model: further arguments of the network.
    """
    config = foreign.config_of(
        MODEL | model,
        dict(name="cosine", num_steps=20),
        objective or dict(mean_type="eps"),
        dict(name="digits", batch_size=16),
    )
    built = configs.build(config, image_shape[-1])
    return Run(
        config=ConfigDict(json.loads(ConfigDict(config).to_json())),
        model=built.model,
        params=random_params(built.model, image_shape),
        objective=built.objective,
        image_shape=image_shape,
    )


class _Pickler(pickle._Pickler):
    """Pickles arrays as PyTorch pickles its tensors."""

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.arrays = []

    def save(self, item, *args, **options):
        if not isinstance(item, np.ndarray):
            return super().save(item, *args, **options)
        strides = [stride // item.itemsize for stride in item.strides]
        kinds = {dtype: name for name, dtype in STORAGES.items()}
        numbers = storage(kinds[item.dtype], item.size, str(len(self.arrays)))
        self.arrays.append(item)
        return self.write(tensor(item.shape, strides, numbers=numbers))


def save_like_torch(path, tree):
    """Writes what `torch.save` writes for a tree with tensors in place of arrays."""
    out = io.BytesIO()
    pickler = _Pickler(out)
    pickler.dump(tree)
    entries = [(f"data/{i}", a.tobytes()) for i, a in enumerate(pickler.arrays)]
    path.write_bytes(pickled_zip(out.getvalue(), entries))
    return path


def save_like_diffusers(folder, safe=True, **options):
    """Saves a folder as those of google/ddpm-* are; returns its network.

    Args:
        folder: where; it is made.
        safe: whether the weights are .safetensors.
        options: arguments of the UNet2DModel.
    """
    torch, diffusers = pytest.importorskip("torch"), peer("diffusers")
    torch.manual_seed(0)
    arguments = dict(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_num_groups=4,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    )
    unet = diffusers.UNet2DModel(**(arguments | options)).eval()
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=20, beta_schedule="squaredcos_cap_v2"
    )
    pipeline = diffusers.DDPMPipeline(unet=unet, scheduler=scheduler)
    pipeline.save_pretrained(folder, safe_serialization=safe)
    return unet
