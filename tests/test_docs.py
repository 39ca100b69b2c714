"""The documentation works: the Python code of its pages and its notebooks run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "experiments"))),
    "JAX_PLATFORMS": "cpu",
}

GENERATED = """
import sys
sys.path.insert(0, "docs")
import generated_pages
import site_hooks
pages = generated_pages.generated_pages()
weights = "".join(pages[f"methods/{family}.md"] for family in ("binary", "ternary", "integer"))
for names, text in (
    (generated_pages.WEIGHT_QUANTIZERS, weights),
    (generated_pages.ACTIVATION_QUANTIZERS, pages["methods/activations.md"]),
    (generated_pages.STES, pages["methods/gradients.md"]),
):
    for name in names:
        assert text.count(f"## {name}\\n") == 1, name
for name in generated_pages.RECIPES:
    assert f"\\n| `{name}` |" in pages["recipes.md"], name
for name in generated_pages.FORMATS:
    assert f"<caption><code>{name}</code>" in pages["formats.md"], name
assert {"binaryconnect": 1, "paretoq_2": 1, "bit_relu": 2}.items() <= {
    name: pages["recipes.md"].count(f"\\n| `{name}` |") for name in generated_pages.RECIPES
}.items()
known = {"pack.md", "kernels/README.md", "recipes.md"}
assert set(site_hooks.SOURCES.values()) <= set(pages)
link = "[r](../bitnet_jax/quantization/recipes.py)"
assert site_hooks.site_links(link, "tour.md", known) == "[r](recipes.md)"
link = "[k](../kernels/README.md#what-holds)"
assert site_hooks.site_links(link, "limits.md", known) == "[k](kernels/README.md#what-holds)"
assert site_hooks.site_links("[s](../tests/test_imports.py)", "limits.md", known) == "s (`tests/test_imports.py`)"
assert site_hooks.site_links("[x](absent.md)", "limits.md", known) == "[x](absent.md)"
"""


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


EACH = """
import sys
for page in sys.argv[1:]:
    exec(compile(open(page).read(), page, "exec"), {"__name__": "__main__"})
"""


@pytest.mark.extended
def test_the_python_of_the_pages_runs(tmp_path: Path) -> None:
    """From top to bottom, each block after the previous ones of its page; all pages in one process, to import once."""
    texts = {page.stem: "\n".join(blocks) for page in PAGES if (blocks := python_blocks(page))}
    assert texts
    for name, text in texts.items():
        assert "assert" in text, f"{name}: without an assertion this test could not fail"
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-W", "error", "-c", EACH, *texts]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a separate kernel that imports the sources under test; a cell that raises fails the test."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert sum(cell.cell_type == "code" for cell in notebook.cells) > 3
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.extended
def test_every_recipe_and_quantizer_is_on_a_generated_page() -> None:
    """In a separate process: the mkdocs hook is not a module of a package."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", GENERATED],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
