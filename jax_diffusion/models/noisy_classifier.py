"""The noisy classifier of guided diffusion: half a U-Net (Dhariwal & Nichol 2021).

    emb = MLP(sinusoids of t)
    down: per level num_res_blocks x (ResBlock, attention at some sizes), halve
    mid:  ResBlock, attention, ResBlock
    head: all pixels -> logits, in one of four ways (the field `pool`)

Classifier guidance follows the gradient with respect to x_t of log p(label | x_t), so
the network classifies noisy images and is given their timesteps. Norms, softmax, time
embedding and head are always float32; `dtype` is the dtype of convolutions and
attention. `attention_implementation` leaves the head as it is, since cuDNN takes no
float32.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_diffusion import checks
from jax_diffusion.checks import placement
from jax_diffusion.models.layers import Layers, check_inputs
from jax_diffusion.models.unet import Trunk

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")

HIDDEN = 2048  # width of the hidden layer of the spatial heads


class AttentionPool(Layers):
    """Attention pooling of CLIP: the mean pixel attends to all pixels, then logits.

    The mean is put before the pixels as one more token, and a learned embedding of its
    position is added to each token. Only the mean is a query.

    Args of the call: x [b, h, w, c]. Returns float32 [b, num_labels].

    Attributes:
        num_labels: number of logits.
        num_heads: number of attention heads.
        head_channels: channels of each head; if given, it determines num_heads.
    """

    num_labels: int = 1000
    num_heads: int = 1
    head_channels: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
        b, height, width, c = x.shape
        size = self.head_channels or c // self.num_heads
        pixels = x.reshape(b, height * width, c)
        tokens = jnp.concatenate([pixels.mean(1, keepdims=True), pixels], axis=1)
        init = nn.initializers.normal(c**-0.5)
        tokens += self.param("positions", init, tokens.shape[1:])[None]
        qkv = self.dense(tokens, 3 * c, name="qkv_proj", fused=3)
        # [b, token, head, channels of a head] each, as in `Attention`.
        q, k, v = jnp.moveaxis(qkv.reshape(b, -1, 3, c // size, size), 2, 0)
        h = jax.nn.dot_product_attention(q[:, :1], k, v)
        h = placement.reshape(h, (b, c))
        return self.dense(h, self.num_labels, name="c_proj")


class NoisyClassifier(Trunk):
    """Classifier of x_t and its timestep; the docstring of the module shows it.

    Args of the call: x float32 [b, h, w, c]; timesteps float32 [b]. Returns logits,
    float32 [b, num_labels].

    Attributes:
        num_labels: number of labels.
        pool: the head, named as in guided-diffusion. "adaptive": the mean over pixels
            of the last feature map, and a linear layer that starts at zero.
            "attention": `AttentionPool` of it; the image size is then fixed.
            "spatial": the means of the feature maps of all stages, concatenated, and
            two linear layers. "spatial_v2": the same with a norm between the layers.

    Further attributes are those of `Trunk` and `Layers`.

    Raises:
        ValueError: if a name is unknown, if the image cannot be halved often enough, or
            if channels cannot be divided into groups or heads.
    """

    num_labels: int = 1000
    pool: str = "adaptive"

    def __post_init__(self):
        """Raises ValueError for a field that is out of range or does not fit others."""
        checks.choice("pool", self.pool, POOLS)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        timesteps: Float[Array, "b"],
        *,
        train: bool = False,
    ) -> Float[Array, "b k"]:
        check_inputs(x, timesteps, len(self.multipliers) - 1)
        block, attend = self.blocks(self.embed(timesteps), train)
        stages, h = self.descend(x, block, attend)
        if self.pool.startswith("spatial"):
            means = [jnp.mean(f.astype(jnp.float32), (1, 2)) for f in (*stages, h)]
            h = self.dense(jnp.concatenate(means, axis=-1), HIDDEN, name="hidden")
            if self.pool == "spatial":
                h = nn.relu(h)
            else:
                h = self.norm(h, name="norm_hidden", silu=True)
            return self.dense(h, self.num_labels, name="logits")
        h = self.norm(h, name="norm_out", silu=True)
        if self.pool == "adaptive":
            h = jnp.mean(h, axis=(1, 2))
            return self.dense(h, self.num_labels, name="conv_logits", zero=True)
        options = self.shared() | self.heads() | dict(dtype=jnp.float32)
        return AttentionPool(num_labels=self.num_labels, name="pool", **options)(h)
