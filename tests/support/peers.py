"""Packages that compute the same with PyTorch, where they are installed."""

import importlib
import importlib.util
import warnings

import pytest

LIBRARIES = []  # what they define vanishes with them


def peer(name):
    """Imports a module of a package that needs PyTorch; skips the test without it.

    Args:
        name: such as "pytorch_fid.inception", "torch_fidelity" or "diffusers".
    """
    torch = pytest.importorskip("torch")
    package = name.partition(".")[0]
    for needed in [package] + ["torchvision"] * (package != "diffusers"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries
        _define_operators(torch)
        return importlib.import_module(name)


def _define_operators(torch):
    """Lets torchvision be imported where its compiled operators do not fit PyTorch.

    Beside the CPU build of PyTorch its import fails over two operators whose
    derivatives and shapes it registers in Python. Inception needs none: an operator of
    that name, without any code, is enough.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:  # diffusers does without
        return
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            signature = "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor"
            LIBRARIES[-1].define(name + signature)
