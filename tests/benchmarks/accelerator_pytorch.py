"""PyTorch's side of `tests.benchmarks.accelerator`: the train step of diffusers' U-Net.

    python tests/benchmarks/accelerator_pytorch.py MODE BATCH_SIZE SECONDS

prints images per second on the first CUDA device. Products of float32 are in TF32.
"""

import contextlib
import sys
import time

import pytorch
import torch
from diffusers import UNet2DModel

MODES = {  # channels last, torch.compile, autocast to bfloat16
    "eager": (False, False, False),
    "channels-last": (True, False, False),
    "compile": (True, True, False),
    "autocast": (True, False, True),
    "compile, autocast": (True, True, True),
}
CIFAR10 = dict(pytorch.CIFAR10, dropout=0.1)  # the network of configs/cifar10.py
COUNT = pytorch.COUNTS[32]  # of its parameters


def train_step(config, mode, batch_size, device):
    """Returns a function: forward, backward, clipping, AdamW and one average."""
    last, compiled, bf16 = MODES[mode]
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    model = UNet2DModel(**config).to(device, memory_format=layout)
    call = torch.compile(model) if compiled else model
    params = list(model.parameters())
    average = [p.detach().clone() for p in params]
    adam = torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0, fused=device == "cuda")
    shape = (batch_size, config["in_channels"], *[config["sample_size"]] * 2)
    x_0 = torch.rand(shape, device=device).to(memory_format=layout) * 2 - 1
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=device), 0)
    autocast = torch.autocast(device, torch.bfloat16)

    def run():
        t = torch.randint(0, 1000, (batch_size,), device=device)
        eps = torch.randn_like(x_0)
        level = alpha_bar[t].reshape(-1, 1, 1, 1)
        x_t = level.sqrt() * x_0 + (1 - level).sqrt() * eps
        with autocast if bf16 else contextlib.nullcontext():
            output = call(x_t, t).sample
        loss = torch.nn.functional.mse_loss(output.float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        adam.step()
        adam.zero_grad()
        torch._foreach_lerp_(average, params, 1e-4)
        return loss

    return run


def images_per_second(config, mode, batch_size, seconds, device="cuda"):
    """The mean of as many steps as fill the time, after three to warm up."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    run = train_step(config, mode, batch_size, device)
    for _ in range(3):
        begun = time.perf_counter()
        run().item()
        once = time.perf_counter() - begun
    count = max(2, round(seconds / once))
    begun = time.perf_counter()
    for _ in range(count):
        loss = run()
    loss.item()  # waits
    return batch_size * count / (time.perf_counter() - begun)


if __name__ == "__main__":
    mode, batch_size, seconds = sys.argv[1:]
    count = sum(p.numel() for p in UNet2DModel(**CIFAR10).parameters())
    assert count == COUNT, count
    print(images_per_second(CIFAR10, mode, int(batch_size), float(seconds)))
