"""PyTorch's side of `tests.benchmarks.tutorial`: the annotated DDPM as its text has it.

    python tests/benchmarks/tutorial_pytorch.py DATA LOSS MAX_STEPS MODE

trains its network to a loss. Without arguments it answers as `worker` says.
"""

import gzip
import statistics
import sys
import time
from pathlib import Path

import torch
import worker
from pytorch import ANNOTATED, in_all_modes, network, noise, train_step
from torch.nn import functional

BETAS = torch.linspace(1e-4, 0.02, 200)
ALPHA_BAR = torch.cumprod(1 - BETAS, 0)
POSTERIOR = BETAS[1:] * (1 - ALPHA_BAR[:-1]) / (1 - ALPHA_BAR[1:])
VARIANCE = torch.cat((torch.zeros(1), POSTERIOR))
WINDOW, TIMED_STEPS = 20, 10  # as in tutorial.py


def ancestral(batch_size, mode):
    """The last steps of the text's `p_sample_loop`."""
    _, call = network(ANNOTATED, mode)
    x_T = noise(ANNOTATED, mode, batch_size)

    @torch.no_grad()
    def run():
        x = x_T
        for t in reversed(range(TIMED_STEPS)):
            eps = call(x, torch.full((batch_size,), t)).sample
            x = x - BETAS[t] / (1 - ALPHA_BAR[t]).sqrt() * eps
            x = x / (1 - BETAS[t]).sqrt()
            if t > 0:
                x = x + VARIANCE[t].sqrt() * torch.randn_like(x)
        return x

    return run


def read_images(folder):
    """The images of the training split: uint8 [n, 1, h, w]."""
    file = next(Path(folder).glob("train-images?idx3-ubyte*"))
    data = file.read_bytes()
    data = gzip.decompress(data) if file.suffix == ".gz" else data
    sizes = torch.frombuffer(bytearray(data[4:16]), dtype=torch.uint8).view(3, 4)
    n, height, width = (int.from_bytes(bytes(size.tolist())) for size in sizes)
    pixels = torch.frombuffer(bytearray(data[16:]), dtype=torch.uint8)
    return pixels.reshape(n, 1, height, width)


def train(folder, loss_limit, max_steps, mode, batch_size=128):
    """Trains the network to a loss, and prints what that took."""
    images = read_images(folder)
    model, call = network(ANNOTATED, mode)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses, seconds, order = [], [], []
    while len(losses) < max_steps:
        begun = time.perf_counter()
        if not order:  # the last and smaller batch of an epoch is left out
            order = list(torch.randperm(len(images)).split(batch_size))[:-1]
        x_0 = images[order.pop()].float() / 127.5 - 1
        flip = torch.rand(batch_size, 1, 1, 1) < 0.5
        x_0 = torch.where(flip, x_0.flip(-1), x_0)
        t, eps = torch.randint(0, 200, (batch_size,)), torch.randn_like(x_0)
        level = ALPHA_BAR[t].reshape(-1, 1, 1, 1)
        x_t = level.sqrt() * x_0 + (1 - level).sqrt() * eps
        if mode != "eager":
            x_t = x_t.to(memory_format=torch.channels_last)
        adam.zero_grad()
        loss = functional.smooth_l1_loss(call(x_t, t).sample, eps)
        loss.backward()
        adam.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
        mean = statistics.fmean(losses[-WINDOW:])
        if len(losses) >= WINDOW and mean < loss_limit:
            break
    print(
        f"PyTorch, {mode}: loss {mean:.4f}"
        f"{'' if mean < loss_limit else ' (not reached)'} after {len(losses)} steps, "
        f"{sum(seconds):.1f} s, median {statistics.median(seconds):.4f} s a step"
    )


CASES = {
    **in_all_modes("annotated_step", train_step, ANNOTATED, 128),
    **in_all_modes("ancestral", ancestral, 64),
}

if __name__ == "__main__":
    if sys.argv[1:]:
        folder, loss, max_steps, mode = sys.argv[1:]
        train(folder, float(loss), int(max_steps), mode)
    else:
        worker.serve(CASES)
