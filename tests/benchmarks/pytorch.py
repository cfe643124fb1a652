"""PyTorch's side of `tests.benchmarks.unet`: diffusers' UNet2DModel of that size, and
the annotated DDPM's own network."""

from types import SimpleNamespace

import torch
import worker
from annotated_pytorch import Unet
from diffusers import DDIMScheduler, UNet2DModel

MODES = ("eager", "channels_last", "compile")  # how PyTorch may run a network
STEPS = 10

CIFAR10 = dict(
    sample_size=32,
    in_channels=3,
    out_channels=3,
    freq_shift=1,
    flip_sin_to_cos=False,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(128, 256, 256, 256),
    layers_per_block=2,
    downsample_padding=0,
    attention_head_dim=None,
    norm_eps=1e-6,
)
DIGITS = dict(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(32, 64),
    layers_per_block=1,
    attention_head_dim=None,
    norm_num_groups=8,
    attn_norm_num_groups=8,
    resnet_time_scale_shift="scale_shift",
)
ANNOTATED = dict(sample_size=28, in_channels=1)
COUNTS = {32: 35_746_307, 28: 2_996_315, 8: 755_009}


class Tutorial(Unet):
    """Takes what a network of diffusers takes, and returns such an object."""

    def forward(self, x, t):
        t = torch.as_tensor(t).expand(len(x))
        return SimpleNamespace(sample=super().forward(x, t))


def network(config, mode):
    """The network, and as this mode runs it."""
    torch.manual_seed(0)
    model = Tutorial() if config is ANNOTATED else UNet2DModel(**config)
    count = sum(p.numel() for p in model.parameters())
    assert count == COUNTS[config["sample_size"]], count
    if mode != "eager":
        model = model.to(memory_format=torch.channels_last)
    return model, torch.compile(model) if mode == "compile" else model


def noise(config, mode, batch_size):
    size, channels = config["sample_size"], config["in_channels"]
    x = torch.randn(batch_size, channels, size, size)
    return x if mode == "eager" else x.to(memory_format=torch.channels_last)


def train_step(config, batch_size, mode, bf16=False):
    """Forward, backward, Adam and one average."""
    worker.mark()
    model, call = network(config, mode)
    params = list(model.parameters())
    average = [p.detach().clone() for p in params]
    adam = torch.optim.Adam(params, lr=2e-4)
    x_0 = noise(config, mode, batch_size).clamp(-1, 1)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

    def run():
        t = torch.randint(0, 1000, (batch_size,))
        eps = torch.randn_like(x_0)
        level = alpha_bar[t].reshape(-1, 1, 1, 1)
        x_t = level.sqrt() * x_0 + (1 - level).sqrt() * eps
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = call(x_t, t).sample
        loss = torch.nn.functional.mse_loss(output.float(), eps)
        loss.backward()
        adam.step()
        adam.zero_grad()
        torch._foreach_lerp_(average, params, 1e-4)
        return loss.item()

    return run


def sample(config, batch_size, mode):
    """DDIM by diffusers' scheduler."""
    _, call = network(config, mode)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    x_T = noise(config, mode, batch_size)

    @torch.no_grad()
    def run():
        x = x_T
        for t in scheduler.timesteps:
            x = scheduler.step(call(x, t).sample, t, x).prev_sample
        return x

    return run


def in_all_modes(name, function, *args, **options):
    return {
        f"{name}/{mode}": lambda mode=mode: function(*args, mode=mode, **options)
        for mode in MODES
    }


CASES = {
    **in_all_modes("train_step", train_step, CIFAR10, 8),
    **in_all_modes("bf16_step", train_step, CIFAR10, 8, bf16=True),
    **in_all_modes("digits_step", train_step, DIGITS, 64),
    **in_all_modes("sample", sample, CIFAR10, 8),
    **in_all_modes("digits_sample", sample, DIGITS, 64),
    **in_all_modes("annotated_step", train_step, ANNOTATED, 128),
    **in_all_modes("annotated_sample", sample, ANNOTATED, 64),
}

if __name__ == "__main__":
    worker.serve(CASES)
