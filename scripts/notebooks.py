"""Execute the notebooks, each from an empty kernel, and write them as .ipynb and HTML: `make notebooks` runs it.

    TREFOIL_HOME=runs/notebooks python scripts/notebooks.py --out runs/notebooks/pages

The notebooks themselves are the py:percent files in notebooks/; Jupyter opens those with Jupytext.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext
import tyro
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from traitlets.config import Config

SOURCES = Path(__file__).parents[1] / "notebooks"


@dataclass(frozen=True, kw_only=True)
class Settings:
    out: Path = Path("runs/notebooks/pages")
    """Folder of the .ipynb and HTML files."""
    only: tuple[str, ...] = ()
    """Names of notebooks, such as compare_runs; none given executes all."""
    timeout_s: int = 1200
    """The longest that one cell may take."""


def execute(source: Path, out: Path, *, timeout_s: int = 1200) -> Path:
    """Execute a notebook in a kernel of its own; returns the .ipynb file, beside which the HTML lies.

    The kernel has this process's working directory and environment. What was executed is written even if a cell fails.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook: Any = jupytext.read(source)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{source.stem}.ipynb"
    client = NotebookClient(
        notebook,
        timeout=timeout_s,
        kernel_name="python3",
        # Sockets in files, which other users of the machine cannot reach.
        config=Config(KernelManager={"transport": "ipc"}),
        resources={"metadata": {"path": str(Path.cwd())}},
    )
    try:
        client.execute()
    finally:
        jupytext.write(notebook, path)
        page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": source.stem}})
        path.with_suffix(".html").write_text(page, encoding="utf-8")
    return path


def main(settings: Settings) -> int:
    # tqdm asks for widgets, which a page cannot have.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    sources = [p for p in sorted(SOURCES.glob("*.py")) if not settings.only or p.stem in settings.only]
    if not sources:
        print(f"no such notebook; there are {', '.join(p.stem for p in sorted(SOURCES.glob('*.py')))}", file=sys.stderr)
        return 2
    for source in sources:
        try:
            path = execute(source, settings.out, timeout_s=settings.timeout_s)
        except CellExecutionError as error:
            print(f"{source}: {error}", file=sys.stderr)
            return 1
        print(f"{path} and {path.with_suffix('.html').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
