"""Networks from outside the package that a config may name as its model."""

import flax.linen as nn
import jax.numpy as jnp


class Tiny(nn.Module):
    """Compiles in no time; its label table is the only array that knows classes."""

    out_channels: int = 1
    channels: int = 4
    num_classes: int | None = None
    low_res: bool = False

    @nn.compact
    def __call__(self, x, timesteps, label=None, *, low_res=None, train=False):
        if low_res is not None:
            for axis in (1, 2):
                low_res = low_res.repeat(x.shape[axis] // low_res.shape[axis], axis)
            x = jnp.concatenate([x, low_res], axis=-1)
        h = nn.Dense(self.channels, name="inside")(x)
        h += nn.Dense(self.channels, name="time")(timesteps[:, None] / 10)[
            :, None, None
        ]
        if self.num_classes is not None:
            h += nn.Embed(self.num_classes, self.channels, name="label")(label)[
                :, None, None
            ]
        return nn.Dense(self.out_channels, name="outside")(nn.silu(h))


class TinyToo(Tiny):
    """The same arrays under another name."""


class TinyTold(nn.Module):
    """Sees a vector, and the sum of the tokens that count, in every pixel."""

    out_channels: int = 1
    cond_dim: int = 1
    token_dim: int = 1

    @nn.compact
    def __call__(self, x, timesteps, *, cond, tokens, tokens_mask, train=False):
        told = nn.Dense(4)((tokens * tokens_mask[..., None]).sum(axis=1))
        told += nn.Dense(4)(cond) + nn.Dense(4)(timesteps[:, None] / 10)
        h = nn.silu(nn.Dense(4)(x) + told[:, None, None])
        return nn.Dense(self.out_channels)(h)


class TinyClassifier(nn.Module):
    """Tells labels apart from all pixels at once."""

    num_labels: int

    @nn.compact
    def __call__(self, x, timesteps, *, train=False):
        h = nn.Dense(8)(x.reshape(len(x), -1)) + nn.Dense(8)(timesteps[:, None] / 10)
        return nn.Dense(self.num_labels)(nn.silu(h))
