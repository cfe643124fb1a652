"""The API site builds without a warning, and shows all that docstrings say.

Markdown changes or swallows some plain text without a word: a table without indentation
becomes a sentence, two stars hide, a line like "[b]: ..." vanishes. Here the words of
every docstring are compared with those of its page.
"""

import collections
import html.parser
import importlib
import inspect
import pathlib
import pkgutil
import re
import shlex
import subprocess
import sys

import pytest

import jax_diffusion

pytestmark = pytest.mark.slow
COMMAND = re.search(
    r"`(python -m pdoc [^`]*) -o site`", pathlib.Path("README.md").read_text()
)[1]
# One page each, on which `__all__` puts what their modules define.
CORE = {"schedules", "diffusion", "timesteps", "samplers", "guidance", "editing"}
SECTIONS = {"Arguments:", "Returns:", "Raises:", "Attributes:"}


class Docstrings(html.parser.HTMLParser):
    """Finds docstrings of a page by the id of what they describe; "" is the page.

    Attributes:
        words: the words of each.
        headings: their headings.
        tags: names of the HTML elements in them.
        columns: lines of running text with gaps, as of a table that became a sentence.
    """

    def __init__(self, text):
        super().__init__()
        self.words = collections.defaultdict(list)
        self.headings = collections.defaultdict(list)
        self.tags = collections.defaultdict(set)
        self.columns = collections.defaultdict(list)
        self.open = []  # (tag, id of what it describes, whether in a docstring)
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        _, name, inside = self.open[-1] if self.open else ("", "", False)
        given = dict(attrs)
        described = tag == "section" or given.get("class") == "classattr"
        name = given.get("id", "") if described else name
        inside = inside or given.get("class") == "docstring"
        if inside:
            self.words[name] += []
            self.tags[name].add(tag)
            self.headings[name] += [""] * bool(re.fullmatch(r"h\d", tag))
        if tag not in ("meta", "link", "input", "br", "img", "hr", "path"):
            self.open.append((tag, name, inside))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tag, name, inside = self.open[-1] if self.open else ("", "", False)
        if not inside:
            return
        self.words[name] += re.findall(r"\w+", data)
        if re.fullmatch(r"h\d", tag):
            self.headings[name][-1] += data
        if not {"pre", "code"} & {tag for tag, *_ in self.open}:
            self.columns[name] += re.findall(r"\S {2,}\S.*", data)


def words_of(docstring):
    """The words of a docstring as Markdown shows them: lists count by themselves."""
    docstring = re.sub(r"^Args:$", "Arguments:", docstring, flags=re.MULTILINE)
    return re.findall(r"\w+", re.sub(r"^\d+\. ", "", docstring, flags=re.MULTILINE))


def modules():
    """All modules of the package by name, programs started by -m left out."""
    found = pkgutil.walk_packages(jax_diffusion.__path__, "jax_diffusion.")
    names = {info.name for info in found} - {"jax_diffusion.__main__"}
    return {"jax_diffusion"} | names


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Pages of the site by the name of their module."""
    pytest.importorskip("pdoc", reason="the extra docs is not installed")
    out = tmp_path_factory.mktemp("site")
    _, *arguments = shlex.split(COMMAND)
    command = [sys.executable, "-W", "error", *arguments, "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (out / "index.html").exists() and (out / "search.js").exists()
    pages = {p.relative_to(out).with_suffix(""): p for p in out.rglob("*.html")}
    pages = {".".join(name.parts): page.read_text() for name, page in pages.items()}
    pages.pop("index")
    return {name: Docstrings(text) for name, text in pages.items()}


def test_every_module_has_a_page_but_those_that_one_of_the_core_contains(site):
    inside = {m for m in modules() if m.split(".")[1:-1] and m.split(".")[1] in CORE}
    assert set(site) == modules() - inside


def ours(site):
    """(where, docstring, page, id) of everything of this package that has one."""
    doc = pytest.importorskip("pdoc.doc")
    package = pathlib.Path(jax_diffusion.__file__).parent
    text = "".join(path.read_text() for path in package.rglob("*.py"))
    for name in jax_diffusion.__all__:
        getattr(jax_diffusion, name)  # some are loaded on first use
    for name, page in site.items():
        module = doc.Module.from_name(name)
        for id in page.words:
            docstring = (module.get(id) if id else module).docstring
            if docstring.partition("\n")[0] in text:  # and not of a base class of Flax
                yield f"{name}.{id}", docstring, page, id


def test_every_public_name_has_its_place_on_the_page_of_its_package(site):
    for name, page in site.items():
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            thing = getattr(module, public)
            own = getattr(thing, "__module__", "").startswith("jax_diffusion")
            if own and (inspect.isfunction(thing) or inspect.isclass(thing)):
                assert public in page.words, f"{name}.{public}"


def test_every_docstring_is_on_the_site_word_for_word(site):
    found = list(ours(site))
    assert len(found) > 1000
    for where, docstring, page, id in found:
        assert page.words[id] == words_of(docstring), where


def test_no_docstring_is_mangled_by_markdown(site):
    for where, docstring, page, id in ours(site):
        assert "em" not in page.tags[id], f"{where} has a star that is none"
        assert page.columns[id] == [], f"{where} has a table without indentation"
        wanted = SECTIONS | {*re.findall(r"^## (.*)$", docstring, re.MULTILINE)}
        assert {*page.headings[id]} <= wanted, where


def test_every_section_of_a_docstring_is_one_on_its_page(site):
    section = re.compile(r"^(Args|Returns|Raises|Attributes):\n", re.MULTILINE)
    for where, docstring, page, id in ours(site):
        found = [heading for heading in page.headings[id] if heading in SECTIONS]
        assert len(found) == len(section.findall(docstring)), where


@pytest.mark.parametrize(
    ("docstring", "found"),
    [
        ("Scales x * y by z.", []),
        ("Scales *x and y* by z.", ["em"]),
        (
            "Rows:\n\n    a    the first\n    bcd  the second\n\nNo more.",
            ["heading", "columns"],
        ),
        ("Two rows.\n\na    the first\nbcd  the second", ["columns"]),
        ("It returns\n\n[b]: a number for each image.", ["words"]),
    ],
)
def test_what_markdown_mangles_is_found(docstring, found):
    convert = pytest.importorskip("pdoc.docstrings").convert
    to_html = importlib.import_module("pdoc.render_helpers").to_html
    text = to_html(convert(docstring, "google", None))
    page = Docstrings(f'<section id="f"><div class="docstring">{text}</div></section>')
    wrong = {
        "em": "em" in page.tags["f"],
        "heading": not {*page.headings["f"]} <= SECTIONS,
        "columns": bool(page.columns["f"]),
        "words": page.words["f"] != words_of(docstring),
    }
    assert [name for name, is_wrong in wrong.items() if is_wrong] == found
