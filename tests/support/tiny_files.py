"""A tiny run with random weights; and files as PyTorch writes them."""

import io
import json
import pickle

import jax
import numpy as np

from jax_diffusion import config as configs
from jax_diffusion.interop import foreign
from jax_diffusion.interop.tensors import STORAGES
from jax_diffusion.pipeline import Run
from support.strange_files import pickled_zip, storage, tensor

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
    network, shapes = foreign.model_and_shapes(config, image_shape)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), shapes
    )
    record = {"config": config, "format": configs.FORMAT}
    plain = json.loads(configs.of_record(record).to_json())
    return Run(
        config=configs.of_record({**record, "config": plain}),
        model=network,
        params=params,
        objective=configs.build(config, image_shape[-1]).objective,
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
