"""Recognizes a checkpoint by its tensors, to say by which name it can be read."""

from collections.abc import Iterable

from jax_diffusion.interop.state_dicts import StateDict

# Released checkpoint -> number of its tensors, and of their numbers.
COUNTS: dict[str, tuple[int, int]] = {
    "cifar10_uncond_50M_500K": (446, 52_546_438),
    "cifar10_uncond_vlb_50M_500K": (446, 52_546_438),
    "imagenet64_uncond_100M_1500K": (450, 121_063_942),
    "imagenet64_uncond_vlb_100M_1500K": (450, 121_063_942),
    "imagenet64_cond_270M_250K": (451, 273_049_350),
    "upsample_cond_500K": (457, 279_792_390),
    "lsun_uncond_100M_1200K_bs128": (426, 113_676_678),
    "lsun_uncond_100M_2400K_bs64": (426, 113_676_678),
    "64x64_diffusion": (541, 295_904_454),
    "128x128_diffusion": (493, 421_529_606),
    "256x256_diffusion": (567, 553_838_086),
    "256x256_diffusion_uncond": (566, 552_814_086),
    "512x512_diffusion": (645, 558_997_638),
    "64_256_upsampler": (567, 311_795_910),
    "128_512_upsampler": (537, 308_835_270),
    "lsun_bedroom": (566, 552_814_086),
    "lsun_cat": (566, 552_814_086),
    "lsun_horse": (566, 552_814_086),
    "lsun_horse_nodropout": (566, 552_814_086),
    "64x64_classifier": (307, 65_438_568),
    "128x128_classifier": (221, 42_568_040),
    "256x256_classifier": (249, 54_096_360),
    "512x512_classifier": (281, 54_448_360),
    "model-790000": (328, 35_746_307),
    "model-2388000": (450, 113_673_219),
    "model-1761000": (450, 113_673_219),
    "model-4432000": (450, 113_673_219),
    "celeba64": (390, 78_700_803),
}


def suggestions(found: StateDict, known: Iterable[str]) -> str:
    """Ends a sentence about a checkpoint of unknown name: what can be done with it.

    Args:
        found: its tensors.
        known: names of released checkpoints.
    """
    counts = len(found.tensors), sum(t.size for t in found.tensors.values())
    fits = [name for name in known if COUNTS.get(name) == counts]
    config = "for a network of your own give a config"
    if found.layout is None:
        first = next(iter(found.tensors))
        config += f"; its tensors, such as {first!r:.80}, are named as in no layout"
    else:
        config += f", and the layout {found.layout!r} unless another is right "
        config += f"(--config FILE --layout {found.layout})"
    tensors = f"its {counts[0]} tensors with {counts[1]:,} numbers"
    if fits:
        return f"; {tensors} fit the name {' or '.join(map(repr, fits))}; {config}."
    return f"; {tensors} fit none of them; {config}."
