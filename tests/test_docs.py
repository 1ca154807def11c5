"""The documents: their code runs, their links lead somewhere, their messages are the code's."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from document_blocks import DOCUMENTS, ROOT, WHEELS, Block, anchors, blocks, commands, links
from shell_blocks import Shell

from rapid_llm.config import PACKAGED_MODEL
from rapid_llm.models import load_model
from rapid_llm.options import options_of

PAGES = [page for page in DOCUMENTS if blocks(page)]
RUN = [page for page in PAGES if any(block.compiled_only is None for block in blocks(page))]
TROUBLES = ROOT / "docs" / "troubleshooting.md"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def packaged() -> Any:
    """The packaged model stays loaded from page to page."""
    return load_model(PACKAGED_MODEL)


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    with TemporaryDirectory() as folder:
        found = Shell(Path(folder))
        yield found
        found.close()


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory, converted: Path) -> Path:
    """What passes cost is measured once for all pages."""
    folder = tmp_path_factory.mktemp("costs")
    (folder / "gguf").symlink_to(converted)
    return folder


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_code_runs_from_the_top_of_its_page_to_the_bottom(
    page: Path,
    packaged: Any,
    shell: Shell,
    costs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAPID_LLM_CACHE", str(costs))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.compiled_only is not None:
            continue
        if block.language == "python":
            exec(compiled(page, block), namespace)
        else:
            done = shell.run(block.code)
            assert done.returncode == 0, f"{name_of(page)}:{block.line}\n{done.stderr}"


def compiled(page: Path, block: Block) -> Any:
    """The code of a Python block, with its place in the page for tracebacks."""
    code = "\n" * (block.line - 1) + block.code
    return compile(code, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_that_is_not_run_compiles(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compiled(page, block)
        else:
            done = subprocess.run(["bash", "-n", "-c", block.code], capture_output=True, text=True)
            assert done.returncode == 0, f"{name_of(page)}:{block.line}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_in_shell_blocks_are_options_of_their_command(page: Path) -> None:
    import typer

    from rapid_llm.cli import app

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for block in (block for block in blocks(page) if block.language == "bash"):
        for words in commands(block.code):
            if words[1].startswith("-"):
                continue
            place = f"{name_of(page)}:{block.line}: rapid-llm {words[1]}"
            assert words[1] in known, place
            names = {"--help", "-h"}
            for each in known[words[1]].params:
                names.update([*each.opts, *each.secondary_opts])
            given = {word.partition("=")[0] for word in words[2:] if word.startswith("-")} - {"-"}
            assert given <= names, place


def test_imports_of_names_from_our_packages_exist() -> None:
    """Also in blocks that are not run."""
    ours = ("rapid_llm", "langchain_rapid", "llama_index.llms.rapid")
    for page in PAGES:
        for block in (block for block in blocks(page) if block.language == "python"):
            for node in ast.walk(ast.parse(block.code)):
                if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(ours):
                    continue
                module = importlib.import_module(node.module or "")
                for each in node.names:
                    assert hasattr(module, each.name), f"{name_of(page)}:{block.line}: {each.name}"


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in links(page):
        if "://" in link or link.startswith("mailto:"):
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), link
        if anchor and file.suffix == ".md":
            generated = "reference" in file.parts  # by hooks, from the code
            assert anchor in anchors(file) or generated, link


@pytest.mark.skipif(not WHEELS, reason="some messages are those of the wheels")
def test_messages_in_the_troubleshooting_page_are_raised_by_the_code() -> None:
    said = "\0".join(_texts())
    headings = [
        line.split("`")[1] for line in TROUBLES.read_text().splitlines() if line.startswith("### `")
    ]
    assert len(headings) > 30
    for heading in headings:
        for part in filter(None, (part.strip() for part in heading.split("…"))):
            assert part in said, heading


def _texts() -> list[str]:
    """Every string in the code."""
    texts: list[str] = []
    for file in (*(ROOT / "rapid_llm").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")):
        if "tests" in file.parts:
            continue
        tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        constants = (node.value for node in tree if isinstance(node, ast.Constant))
        texts += [value for value in constants if isinstance(value, str)]
    return texts


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "make" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_options_has_each_once_with_its_default() -> None:
    made = hooks()
    rows = made.options_table().splitlines()
    for group in made.groups():
        for name, declared in options_of(group).items():
            (row,) = (row for row in rows if row.startswith((f"| `{name}` |", f"| `{name}`, ")))
            assert declared.option.help.split("|")[0] in row.replace("\\|", "|")


@pytest.mark.skipif(not WHEELS, reason="the classes are those of the wheels")
def test_fields_that_only_a_wheel_has_are_listed_with_their_meaning() -> None:
    for module in ("langchain_rapid.ChatRapid", "llama_index.llms.rapid.RapidLLM"):
        rows = hooks().fields_table(*module.rsplit(".", 1)).splitlines()[2:]
        names = [row.split("`")[1] for row in rows]
        assert {"documents", "base_url", "truncate"} <= set(names)
        assert not {"temperature", "max_tokens", "callbacks", "callback_manager"} & set(names)
        assert all(len(row.split("|")[2]) > 20 for row in rows)


def test_every_page_is_in_the_navigation_once() -> None:
    listed = [
        line.split(":")[-1].strip(" -")
        for line in (ROOT / "mkdocs.yml").read_text().partition("nav:")[2].splitlines()
        if line.endswith(".md")
    ]
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
