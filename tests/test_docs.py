"""The pages say what is there: files, names in files, and links."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SYMBOL = re.compile(r"`([\w/]+\.py):([\w.]+)`")
FILE = re.compile(r"`((?:dms_jax|experiments|scripts|paper_figures|examples|tests|configs)/[\w/.-]*\w/?)[`:]")
COMMAND = re.compile(r"python -m ([\w.]+)")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[\w-]+)?\)")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def defined(file: Path, name: str) -> bool:
    """Whether `Class.method` or `function` is defined in a file at module level."""
    body = ast.parse(file.read_text()).body
    for part in name.split("."):
        found = [
            node
            for node in body
            if isinstance(node, ast.ClassDef | ast.FunctionDef)
            and node.name == part
            or isinstance(node, ast.Assign)
            and part in {target.id for target in node.targets if isinstance(target, ast.Name)}
        ]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


@every_page
def test_names_in_files_exist(page):
    for file, name in SYMBOL.findall(page.read_text()):
        assert (ROOT / file).is_file() and defined(ROOT / file, name), f"{page.name}: {file}:{name}"


@every_page
def test_files_links_and_commands_exist(page):
    text = page.read_text()
    for file in FILE.findall(text):
        assert (ROOT / file).exists() or (ROOT / f"{file}.yaml").exists(), f"{page.name}: {file}"
    for link in LINK.findall(text):
        assert (page.parent / link).exists(), f"{page.name}: {link}"
    for module in COMMAND.findall(text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name}: {module}"


def test_the_checks_can_fail():
    assert defined(ROOT / "dms_jax" / "dms.py", "visible") and not defined(ROOT / "dms_jax" / "dms.py", "visibly")
    assert defined(ROOT / "dms_jax" / "config.py", "ModelConfig.__post_init__")
    assert not defined(ROOT / "dms_jax" / "config.py", "ModelConfig.nothing")
    found = [match for page in PAGES for match in SYMBOL.findall(page.read_text())]
    assert len(found) > 30


def test_the_readme_is_a_front_door():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 125
