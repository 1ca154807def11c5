"""What an index of packages shows of each distribution, as far as its source says."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# An unpacked sdist of rapid-llm has no integrations.
FOLDERS = [ROOT, *sorted(path.parent for path in ROOT.glob("integrations/*/pyproject.toml"))]
SAME = ("license", "license-files", "authors", "urls", "version")


def field(folder: Path, name: str) -> str:
    text = (folder / "pyproject.toml").read_text("utf-8")
    found = re.search(rf"^{name} = (.+)$", text, re.MULTILINE)
    assert found, f"{folder.name} has no {name}"
    return found[1]


def setup_script() -> Any:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_distribution_names_the_same_authors_licence_and_version(folder):
    assert [field(folder, name) for name in SAME] == [field(ROOT, name) for name in SAME]
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_links_of_a_readme_work_where_only_the_readme_is(folder):
    text = (folder / "README.md").read_text("utf-8")
    if folder == ROOT:
        text = setup_script().standing_alone(text)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("rapid-llm", "rapid_llm"),
        ("langchain-rapid", "langchain_rapid"),
        ("llama-index-llms-rapid", "llama_index.llms.rapid"),
    ],
)
def test_the_version_of_an_installed_distribution_is_its_own(name, module):
    try:
        version = metadata(name)["Version"]
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    assert importlib.import_module(module).__version__ == version
