"""Functions from outside the package, by "module:function" in configs and flags.

One module has a data set, betas, a network, an optimizer, a sampler and a metric; a
config and flags name them; `train`, `sample` and `evaluate` run with them.
"""

import json

import numpy as np
import pytest
from support.programs import evaluate, sample, train

import jax_diffusion as jd
from jax_diffusion.runtime import checkpoint

MODULE = '''
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax


def stripes(split, path, image_size):
    images = np.zeros((48, 4, 4, 1), np.uint8)
    images[:, ::2] = 255
    return images, np.arange(48) % 2


def half_betas(num_steps, *, value):
    return np.full(num_steps, value)


class Tiny(nn.Module):
    """One convolution; takes no labels, and so declares nothing."""

    out_channels: int = 1
    width: int = 4

    @nn.compact
    def __call__(self, x, timesteps, *, train=False):
        h = nn.silu(nn.Conv(self.width, (3, 3))(x))
        return nn.Conv(self.out_channels, (3, 3))(h)


def quarter(learning_rate, *, factor):
    """Adds 0.25 to every parameter, whatever the gradient."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: jnp.full_like(u, 0.25 * factor), updates), state

    return optax.GradientTransformation(lambda params: (), update)


def gray_step(keys, denoise_fn, schedule, state, t, *, eta=0.0):
    """Ends in images of one gray, the brighter the larger eta."""
    x_0 = denoise_fn(state.x, t).x_0
    return state._replace(x=jnp.zeros_like(state.x) + eta, x_0=x_0)


def darkness(samples, reference):
    """How much darker samples are than the reference, in [-2, 2]."""
    return float(reference.mean() - samples.mean())
'''


def get_config(module):
    return f'''
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.data = dict(name="{module}:stripes", batch_size=16)
    config.schedule = dict(name="{module}:half_betas", num_steps=4, value=0.5)
    config.objective = dict(mean_type="eps", var_type="fixed_small", loss="l2")
    config.timesteps = dict(name="uniform")
    config.model = dict(name="{module}:Tiny", width=3)
    config.optimizer = dict(name="{module}:quarter", learning_rate=1e-3, factor=1.0)
    config.ema_decays = (0.5,)
    config.ema_warmup = False
    config.total_steps = 2
    config.log_every = 1
    config.save_every = 1
    config.sample_every = 2
    config.sampling = dict(sampler="{module}:gray_step", steps=2, eta=0.5, n=4)
    return config
'''


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that the program `train` made from the config of the outside module."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "everything_outside.py").write_text(MODULE)
    (folder / "config.py").write_text(get_config("everything_outside"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        config, workdir = str(folder / "config.py"), str(folder / "run")
        told = ["train", "--config", config, "--workdir", workdir]
        patch.setattr("sys.argv", told)
        train.main()
        yield folder / "run"


@pytest.mark.slow
def test_train_makes_steps_of_an_optimizer_from_outside(workdir):
    assert checkpoint.latest_step(workdir) == 2
    params = checkpoint.load_params(workdir, ema=None)
    average = checkpoint.load_params(workdir, ema="0.5")
    np.testing.assert_allclose(params["Conv_0"]["bias"], 0.5)  # biases start at zero
    np.testing.assert_allclose(average["Conv_0"]["bias"], 0.5 * 0.125 + 0.5 * 0.5)
    assert (workdir / "samples" / "000002.png").exists()


def test_sample_draws_by_a_step_from_outside(workdir, tmp_path, monkeypatch):
    out = tmp_path / "a.npz"
    told = ["--workdir", str(workdir), "--out", str(out), "--n", "3", "--eta", "0.5"]
    told += ["--sampler", "everything_outside:gray_step", "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["sample", *told])
    sample.main()
    with np.load(out) as found:
        assert found["arr_0"].shape == (3, 4, 4, 1)
        assert set(found["arr_0"].ravel().tolist()) == {int(1.5 * 127.5)}


def test_evaluate_scores_by_a_metric_from_outside(workdir, monkeypatch):
    metric = "everything_outside:darkness"
    told = ["--workdir", str(workdir), "--n", "8", "--metrics", metric, "--steps", "2"]
    told += ["--sampler", "everything_outside:gray_step"]
    monkeypatch.setattr("sys.argv", ["evaluate", *told])
    evaluate.main()
    record = json.loads((workdir / "evaluation" / "scores.json").read_text())
    (value,) = record["evaluations"][-1]["scores"].values()
    gray = int(127.5) / 127.5 - 1
    assert value == pytest.approx(0.0 - gray, abs=1e-5)  # stripes are gray on average
    (score,) = jd.evaluate(
        jd.load_run(workdir),
        metrics=[metric],
        n=8,
        sampler="everything_outside:gray_step",
        steps=2,
        eta=0.5,
    )
    gray = int(1.5 * 127.5) / 127.5 - 1
    assert score.value == pytest.approx(0.0 - gray, abs=1e-5)
