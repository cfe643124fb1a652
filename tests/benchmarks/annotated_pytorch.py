"""The network of the annotated DDPM in PyTorch, as its text builds it.

The structure is that of the docstring of `jax_diffusion.models.annotated`, which the
text (Rogge & Rasul 2022, first edition) writes as modules like these. Blocks are the
ConvNeXt-like ones. tests/models/test_annotated.py shows that both networks are equal.
"""

import itertools
import math

import torch
from torch import nn


class Embedding(nn.Module):
    """Sinusoids of t, sines first."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, t):
        half = self.dim // 2
        exponents = torch.arange(half, device=t.device) / (half - 1)
        angles = t[:, None] * torch.exp(-math.log(10_000) * exponents)[None, :]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Block(nn.Module):
    """Depthwise 7x7, plus emb, then 3x3 to more channels and 3x3 back."""

    def __init__(self, channels_in, channels, emb=None, expansion=2):
        super().__init__()
        inner = expansion * channels
        self.emb = emb and nn.Sequential(nn.GELU(), nn.Linear(emb, channels_in))
        self.depthwise = nn.Conv2d(
            channels_in, channels_in, 7, padding=3, groups=channels_in
        )
        self.net = nn.Sequential(
            nn.GroupNorm(1, channels_in),
            nn.Conv2d(channels_in, inner, 3, padding=1),
            nn.GELU(),
            nn.GroupNorm(1, inner),
            nn.Conv2d(inner, channels, 3, padding=1),
        )
        same = channels_in == channels
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x, emb=None):
        h = self.depthwise(x)
        if self.emb is not None and emb is not None:
            h = h + self.emb(emb)[:, :, None, None]
        return self.net(h) + self.skip(x)


class Attention(nn.Module):
    """Full or linear attention over all pixels of the normalized x, added to x."""

    def __init__(self, channels, *, linear, num_heads=4, head_dim=32):
        super().__init__()
        inner = num_heads * head_dim
        self.linear, self.num_heads, self.scale = linear, num_heads, head_dim**-0.5
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.out = nn.Conv2d(inner, channels, 1)
        self.norm_out = nn.GroupNorm(1, channels) if linear else nn.Identity()

    def forward(self, x):
        b, _, height, width = x.shape
        parts = self.qkv(self.norm(x)).chunk(3, dim=1)
        # [b, head, channels of a head, pixels] each
        q, k, v = (a.reshape(b, self.num_heads, -1, height * width) for a in parts)
        if self.linear:
            q, k = q.softmax(dim=-2) * self.scale, k.softmax(dim=-1)
            context = torch.einsum("bhdn,bhen->bhde", k, v)
            h = torch.einsum("bhde,bhdn->bhen", context, q)
        else:
            scores = torch.einsum("bhdi,bhdj->bhij", q * self.scale, k)
            scores = scores - scores.amax(dim=-1, keepdim=True).detach()
            h = torch.einsum("bhij,bhdj->bhdi", scores.softmax(dim=-1), v)
        return x + self.norm_out(self.out(h.reshape(b, -1, height, width)))


class Stage(nn.Module):
    """Two blocks, linear attention, and perhaps a change of the size."""

    def __init__(self, channels_in, channels, emb, resample):
        super().__init__()
        self.first = Block(channels_in, channels, emb)
        self.second = Block(channels, channels, emb)
        self.attention = Attention(channels, linear=True)
        self.resample = resample

    def forward(self, x, emb):
        return self.attention(self.second(self.first(x, emb), emb))


class Unet(nn.Module):
    """2,996,315 parameters with the text's own settings, which are the defaults."""

    def __init__(self, dim=28, multipliers=(1, 2, 4), channels=1):
        super().__init__()
        widths = [dim // 3 * 2, *(dim * m for m in multipliers)]
        levels, emb = len(multipliers), 4 * dim
        self.stem = nn.Conv2d(channels, widths[0], 7, padding=3)
        self.embed = nn.Sequential(
            Embedding(dim), nn.Linear(dim, emb), nn.GELU(), nn.Linear(emb, emb)
        )
        self.down = nn.ModuleList()
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            halve = nn.Conv2d(after, after, 4, 2, 1) if i < levels - 1 else None
            self.down.append(Stage(before, after, emb, halve))
        last = widths[-1]
        self.mid_0 = Block(last, last, emb)
        self.mid_attention = Attention(last, linear=False)
        self.mid_1 = Block(last, last, emb)
        self.up = nn.ModuleList()
        for before, after in reversed(list(itertools.pairwise(widths[1:]))):
            double = nn.ConvTranspose2d(before, before, 4, 2, 1)
            self.up.append(Stage(2 * after, before, emb, double))
        self.out = nn.Sequential(Block(dim, dim), nn.Conv2d(dim, channels, 1))

    def forward(self, x, t):
        h, emb, skips = self.stem(x), self.embed(t), []
        for stage in self.down:
            h = stage(h, emb)
            skips.append(h)
            h = h if stage.resample is None else stage.resample(h)
        h = self.mid_1(self.mid_attention(self.mid_0(h, emb)), emb)
        for stage in self.up:  # the skip of the first level is never read
            h = stage.resample(stage(torch.cat((h, skips.pop()), dim=1), emb))
        return self.out(h)
