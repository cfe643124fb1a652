"""Names of registries, and functions from outside by "module:attribute"."""

import math

import pytest

from jax_diffusion import registry

ROWS = {"ddim": 1, "ddpm": 2}


def test_lookup_returns_the_row_of_a_name():
    assert registry.lookup("sampler", "ddpm", ROWS) == 2


def test_lookup_imports_module_colon_attribute():
    assert registry.lookup("sampler", "math:hypot", ROWS) is math.hypot


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("dimm", "sampler must be one of .*, got 'dimm'; did you mean 'ddim'"),
        ("zzzzz", r"sampler must be one of \['ddim', 'ddpm'\] or .*, got 'zzzzz'\."),
        (3, "sampler must be one of .*, got 3"),
        (None, "sampler must be one of .*, got None"),
        (
            "no_such_module_x:f",
            "sampler must be one of .* or an importable .*no_such_module_x",
        ),
        ("math:no_such", "sampler must be one of .* or an importable .*no_such"),
        ("math:pi", "sampler must be one of .*, which is 3.14"),
        (":f", "sampler must be one of .* or an importable"),
        ("math:", "sampler must be one of .* or an importable"),
    ],
)
def test_lookup_refuses_unknown_names_in_a_sentence(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        registry.lookup("sampler", name, ROWS)


@pytest.mark.parametrize(
    ("text", "error"),
    [("def f(:", "SyntaxError"), ("none", "NameError"), ("raise SystemExit", "System")],
)
def test_a_module_that_fails_is_told_in_a_sentence(text, error, tmp_path, monkeypatch):
    name = f"failing_{error.lower()}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"sampler must be one of .*{error}"):
        registry.lookup("sampler", f"{name}:f", ROWS)


def test_choose_takes_rows_only():
    assert registry.choose("to", "ddim", ROWS) == 1
    for name in ("math:hypot", "dimm", None, [1]):
        with pytest.raises(
            ValueError, match=r"to must be one of \['ddim', 'ddpm'\], got"
        ):
            registry.choose("to", name, ROWS)
