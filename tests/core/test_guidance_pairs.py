"""Guidance by two denoisers: autoguidance, APG and CFG-Zero*, in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles, processes
from support.oracles import F32, F32_SUM, normal

from jax_diffusion import diffusion, guidance, samplers, schedules
from jax_diffusion.diffusion import Prediction
from jax_diffusion.guidance import GUIDANCE_METHODS

RATIOS = np.geomspace(0.05, 20.0, 8)  # noise / signal
LEVELS = {kind: processes.levels(kind, RATIOS) for kind in processes.KINDS}
TABLES = {kind: processes.schedule_of(*LEVELS[kind]) for kind in LEVELS}
FLOW = TABLES["flow"]
X, T = normal(0, 3, 4, 5), jnp.array([2, 6, 4], jnp.int32)
STRONG, WEAK = normal(1, 3, 4, 5), normal(2, 3, 4, 5)

slow, OTHERS = pytest.mark.slow, ["apg", "zero_star"]
every_method = pytest.mark.parametrize("name", GUIDANCE_METHODS)
every_process = pytest.mark.parametrize("kind", TABLES)


def saying(x_0, **fields):
    """A denoiser that always predicts this x_0."""
    return lambda x_t, t: Prediction(x_0, jnp.zeros((1, 1, 1)), **fields)


def method(name, schedule=FLOW, **options):
    """A method by name, without the first steps of CFG-Zero*."""
    if name == "zero_star":
        options = dict(schedule=schedule, zero_steps=0) | options
    return functools.partial(GUIDANCE_METHODS[name], **options)


def dot(a, b):
    return np.sum(np.float64(a) * np.float64(b), axis=(1, 2))


def flow_of(x_0, kind="flow", x_t=X, t=T):
    return diffusion.flow_from_x_0(TABLES[kind], x_t, t, x_0)


@every_method
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_scale_1_is_the_stronger_denoiser(name, rescale):
    guide = method(name, rescale=rescale)
    x_0 = guide(saying(STRONG), saying(WEAK), 1.0)(X, T).x_0
    np.testing.assert_allclose(x_0, STRONG, **F32_SUM)


@every_method
def test_a_scale_may_be_each_images_own_or_a_function_of_t(name):
    guide = functools.partial(method(name), saying(STRONG), saying(WEAK))
    each = guide(jnp.array([1.0, 3.0, 2.0]))(X, T).x_0
    np.testing.assert_allclose(each[1], guide(3.0)(X, T).x_0[1], **F32_SUM)
    np.testing.assert_allclose(each[0], STRONG[0], **F32_SUM)
    of_t = guide(lambda t: jnp.where(t == 6, 3.0, 2.0))(X, T).x_0
    np.testing.assert_allclose(of_t[1:], each[1:], **F32_SUM)


@every_method
def test_variance_and_gradient_are_those_of_the_stronger_denoiser(name):
    log_var, grad = normal(3, *X.shape), normal(4, *X.shape)
    strong = Prediction(STRONG, log_var, grad)
    weak = Prediction(WEAK, jnp.zeros(()), -grad)
    found = method(name)(lambda x, t: strong, lambda x, t: weak, 2.0)(X, T)
    np.testing.assert_array_equal(found.log_var, log_var)
    np.testing.assert_array_equal(found.grad, grad)


def test_autoguidance_by_the_network_without_its_label_is_classifier_free():
    def network(x_t, t, *, label):
        return Prediction(jnp.sin(x_t + label[:, None, None]), jnp.cos(x_t))

    label, null = jnp.array([1, 2, 3]), jnp.full(3, 9)
    one, other = (functools.partial(network, label=a) for a in (label, null))
    for scale, rescale in ((3.0, 0.0), (0.0, 1.0), (-1.0, 0.5)):
        free = guidance.classifier_free(network, label, 9, scale, rescale=rescale)
        pair = guidance.autoguidance(one, other, scale, rescale=rescale)
        for a, b in zip(free(X, T)[:2], pair(X, T)[:2], strict=True):
            np.testing.assert_allclose(a, b, **F32)


@every_process
@pytest.mark.parametrize("what", ["eps", "flow", "score"])
def test_autoguidance_of_x_0_is_that_of_eps_flow_and_score(kind, what):
    """On a line through two predictions, each is an affine function of the others."""
    of = functools.partial(getattr(diffusion, f"{what}_from_x_0"), TABLES[kind], X, T)
    x_0 = guidance.autoguidance(saying(STRONG), saying(WEAK), 3.0)(X, T).x_0
    expected = of(WEAK) + 3 * (of(STRONG) - of(WEAK))
    np.testing.assert_allclose(of(x_0), expected, rtol=1e-4, atol=1e-3)


def test_projected_guidance_with_the_whole_parallel_part_is_autoguidance():
    args = (saying(STRONG), saying(WEAK), 3.0)
    expected = guidance.autoguidance(*args)(X, T).x_0
    x_0 = guidance.adaptive_projected(*args, eta=1.0)(X, T).x_0
    np.testing.assert_allclose(x_0, expected, **F32)
    x_0 = guidance.adaptive_projected(*args, eta=1.0, norm=1e3)(X, T).x_0
    np.testing.assert_allclose(x_0, expected, **F32)


def test_projected_guidance_moves_x_0_at_right_angles_to_itself():
    args = (saying(STRONG), saying(WEAK), 3.0)
    moved = guidance.adaptive_projected(*args)(X, T).x_0 - STRONG
    np.testing.assert_allclose(dot(moved, STRONG), 0.0, atol=1e-4)
    part = guidance.adaptive_projected(*args, eta=0.25)(X, T).x_0 - STRONG
    np.testing.assert_allclose(  # a quarter of what points along x_0
        dot(part, STRONG), 0.25 * 2 * dot(STRONG - WEAK, STRONG), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(dot(part, moved), dot(moved, moved), rtol=1e-4)


def test_projected_guidance_shortens_differences_to_the_norm_and_no_others():
    lengths = np.array([0.5, 2.0, 4.0])
    off = (STRONG - WEAK) * lengths[:, None, None]
    off = jnp.float32(off / np.sqrt(dot(STRONG - WEAK, STRONG - WEAK))[:, None, None])
    guide = functools.partial(guidance.adaptive_projected, eta=1.0, norm=2.0)
    x_0 = guide(saying(STRONG), saying(STRONG - off), 4.0)(X, T).x_0
    shorter = off * np.float32(np.minimum(1, 2 / lengths))[:, None, None]
    np.testing.assert_allclose(x_0, STRONG + 3 * shorter, **F32_SUM)


def test_zero_star_of_parallel_flows_is_the_flow_itself_at_any_scale():
    flow = flow_of(STRONG)
    weak = diffusion.x_0_from_flow(FLOW, X, T, -0.4 * flow)
    for scale in (0.0, 2.0, 7.0):
        x_0 = method("zero_star")(saying(STRONG), saying(weak), scale)(X, T).x_0
        np.testing.assert_allclose(x_0, STRONG, rtol=1e-4, atol=1e-4)


@every_process
def test_zero_star_takes_the_multiple_of_the_weaker_flow_that_is_closest(kind):
    guide = method("zero_star", TABLES[kind])
    x_0 = guide(saying(STRONG), saying(WEAK), 0.0)(X, T).x_0
    multiple, weak = flow_of(x_0, kind), flow_of(WEAK, kind)
    lengths = dot(multiple, multiple) * dot(weak, weak)  # they are parallel
    np.testing.assert_allclose(dot(multiple, weak) ** 2, lengths, rtol=1e-4)
    rest = flow_of(STRONG, kind) - multiple
    np.testing.assert_allclose(dot(rest, weak) / dot(weak, weak), 0.0, atol=1e-4)


@every_method
def test_a_method_is_the_same_on_every_process_at_the_same_ratios(name):
    """Of the same x_0 and eps, whatever the signal: the published flow's x_0."""
    eps, found = normal(5, *X.shape), {}
    for kind, table in TABLES.items():
        x_t = diffusion.q_sample(table, X, T, eps)
        guide = GUIDANCE_METHODS[name]
        options = dict(schedule=table, zero_steps=2) if name == "zero_star" else {}
        args = (saying(STRONG), saying(WEAK), 3.0)
        found[kind] = guide(*args, **options)(x_t, T).x_0
    for x_0 in found.values():
        np.testing.assert_allclose(x_0, found["flow"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [8, 11])
def test_zero_star_stands_still_in_its_first_steps_on_a_padded_table_too(length):
    table = schedules.pad(FLOW, length)
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(3))
    guided = guidance.zero_star(
        saying(STRONG), saying(WEAK), 2.0, schedule=table, zero_steps=2
    )
    for row, still in ((7, True), (6, True), (5, False)):
        step = (keys, guided, table, samplers.start(X), jnp.full(3, row, jnp.int32))
        x = samplers.ddim_step(*step).x
        assert (np.abs(x - X).max() < 1e-5) == still


@every_process
@pytest.mark.parametrize(
    "name", ["classifier_free", *(pytest.param(n, marks=slow) for n in OTHERS)]
)
def test_two_gaussians_of_one_variance_lead_to_the_third_on_their_line(name, kind):
    """N(0.1, 0.3^2) away from N(0, 0.3^2) is N(0.1 scale, 0.3^2), of a flow.

    Images of one value: their difference has no part at a right angle, so that APG
    with eta is autoguidance with 1 + eta (scale - 1), and CFG-Zero* does not guide.
    """
    signal, noise = processes.levels(kind, np.geomspace(2e-3, 200.0, 120))
    table, rows = processes.schedule_of(signal, noise), processes.gaussian_rows
    strong, weak = (
        oracles.affine_denoiser(jnp.asarray(rows(signal, noise, mean, 0.3)))
        for mean in (0.1, 0.0)
    )
    options = dict(eta=0.5) if name == "apg" else {}
    guided = method(name, table, **options)(strong, weak, 3.0)
    z = jnp.linspace(-2, 2, 9)[:, None]
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(9))
    x_T = np.hypot(signal[-1] * 0.3, noise[-1]) * z
    sample = functools.partial(samplers.sample, keys, guided, samplers.heun_step, table)
    mean = {"classifier_free": 0.3, "apg": 0.2, "zero_star": 0.1}[name]
    x = jax.jit(sample)(jnp.float32(x_T + signal[-1] * mean))
    np.testing.assert_allclose(x, mean + 0.3 * z, atol=3e-3)


@every_method
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 1, 1)])
def test_gradients_are_finite_also_of_equal_predictions(name, shape):
    x = normal(6, *shape)

    def loss(x):
        def denoise_fn(x_t, t):
            return Prediction(0.5 * x_t, jnp.zeros((1, 1, 1)))

        options = dict(norm=1.0) if name == "apg" else {}
        guided = method(name, **options)(denoise_fn, denoise_fn, 3.0)
        return jnp.sum(guided(x, T).x_0 ** 2)

    value, grad = jax.value_and_grad(loss)(x)
    np.testing.assert_allclose(grad, 0.5 * x, **F32_SUM)
    np.testing.assert_allclose(value, np.sum(np.square(x)) / 4, **F32_SUM)


def test_numbers_may_change_without_another_compilation():
    @jax.jit
    def guide(scale, eta, norm, rescale):
        args = (saying(STRONG), saying(WEAK), scale)
        options = dict(eta=eta, norm=norm, rescale=rescale)
        return guidance.adaptive_projected(*args, **options)(X, T).x_0

    a, b = guide(3.0, 0.0, 1.0, 0.0), guide(5.0, 0.5, 2.0, 0.7)
    assert guide._cache_size() == 1 and np.abs(a - b).max() > 0.1


@every_method
@pytest.mark.parametrize("weak", [saying(WEAK[:, :2]), lambda x_t, t: WEAK])
def test_a_guide_of_another_shape_is_named(name, weak):
    said = r"^weak_fn('s x_0 must be a float array \[3, 4, 5\]| must return a Pred)"
    with pytest.raises(ValueError, match=said):
        method(name)(saying(STRONG), weak, 2.0)(X, T)
