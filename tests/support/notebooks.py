"""Notebooks read, run on small budgets in a kernel of their own, and looked through."""

import ast
import json
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "colab"
BADGE = re.compile(
    r"\[!\[Open in Colab\]\(https://colab\.research\.google\.com/assets/"
    r"colab-badge\.svg\)\]\(https://colab\.research\.google\.com/github/"
    r"(?P<repository>[\w.-]+/[\w.-]+)/blob/main/colab/(?P<name>\w+)\.ipynb\)"
)
INSTALL, BUDGETS = "# @title Install\n", "# Budgets"  # how these cells begin


def read(name):
    """The notebook colab/NAME.ipynb."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def begun_by(notebook, text):
    """The one code cell that begins with a text."""
    (cell,) = [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.source.startswith(text)
    ]
    return cell


def python(cell):
    """The syntax tree of a code cell, without IPython's own commands."""
    lines = cell.source.splitlines()
    return ast.parse("\n".join(re.sub(r"(^\s*)%.*", r"\1pass", x) for x in lines))


def budgets(notebook):
    """What the cell of budgets assigns: numbers by name, and nothing else."""
    found = {}
    for line in python(begun_by(notebook, BUDGETS)).body:
        assert isinstance(line, ast.Assign), ast.unparse(line)
        (target,) = line.targets
        assert isinstance(target, ast.Name) and target.id.isupper(), ast.unparse(line)
        found[target.id] = ast.literal_eval(line.value)
    return found


def names_read(notebook):
    """Names that code cells read."""
    trees = [python(cell) for cell in notebook.cells if cell.cell_type == "code"]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    return {node.id for node in names if isinstance(node.ctx, ast.Load)}


def run(notebook, small, expressions, folder):
    """Runs a notebook in a folder, with its budgets replaced.

    Args:
        notebook: changed in place.
        small: numbers by the name of the budget.
        expressions: evaluated at the end, with the notebook's names.
        folder: the working directory of its kernel.

    Returns:
        The values of `expressions` as floats, and what is said of its figures: a dict
        for each, see `figures_shown`.
    """
    from nbclient import NotebookClient

    assignments = [f"{name} = {value!r}" for name, value in small.items()]
    begun_by(notebook, BUDGETS).source = "\n".join(assignments)
    code = (
        "import json\nfrom support import notebooks\n"
        "values = {text: float(eval(text)) for text in EXPRESSIONS}\n"
        "print(json.dumps([values, notebooks.figures_shown()]))"
    ).replace("EXPRESSIONS", repr([*expressions]))
    notebook.cells.append(nbformat.v4.new_code_cell(code))
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, resources=resources).execute()
    text = "".join(x["text"] for x in notebook.cells[-1].outputs if "text" in x)
    return json.loads(text.splitlines()[-1])


def figures_shown():
    """Draws all open figures; what each lacks, as text, by its number.

    The backend "agg" keeps figures open when they are shown. Every plot must have a
    title, its own or the figure's, and where it has axes, a label on each.
    """
    import io

    from matplotlib import pyplot as plt

    found = {}
    for number in plt.get_fignums():
        figure = plt.figure(number)
        figure.savefig(io.BytesIO(), format="png")  # formulas are read when drawn
        title = figure.get_suptitle()
        plots = [x for x in figure.axes if x.get_label() != "<colorbar>"]
        lacking = [] if plots else ["a plot"]
        for axes in plots:
            if not (title or axes.get_title()):
                lacking.append("a title")
            if axes.axison:
                for which in "xy":
                    group = getattr(axes, f"get_shared_{which}_axes")()
                    labels = [
                        getattr(other, f"get_{which}label")()
                        for other in (axes, *group.get_siblings(axes))
                    ]
                    if not any(labels):
                        lacking.append(f"a label of {which} below or beside {title!r}")
        found[number] = lacking
    return found
