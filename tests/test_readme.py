"""What the README says can be done, can be done."""

import pathlib
import re

import pytest

README = pathlib.Path("README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["images"].shape == (4, 8, 8, 1)


def test_start_has_two_blocks_of_one_command_line_each():
    section = README.split("## Start")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.S)
    assert [block.count("\n") for block in blocks] == [1, 1]
    assert "jax_diffusion.train" in blocks[0] and "pytest" in blocks[1]


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#:]+)\)|`(configs/[\w/]+\.py)`", README)
    assert links and all(pathlib.Path(a or b).exists() for a, b in links)
