"""The documentation site: every module has its place, and the pages build without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scripts import api_pages

ROOT = Path(__file__).parents[1]
NAV = (ROOT / "mkdocs.yml").read_text()


def test_every_module_has_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_pages, "API", tmp_path)
    api_pages.main()
    sections = {line.removeprefix("::: ") for page in tmp_path.iterdir() for line in page.read_text().splitlines()}
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("components", "pipeline", "torchx_specs")
        for path in (ROOT / package).rglob("[!_]*.py")
    }
    assert {m for m in modules if not m.startswith("pipeline.cli")} - sections == set()
    assert {f"api/{page.name}" for page in tmp_path.iterdir()} <= set(re.findall(r"api/\w+\.md", NAV))


def test_every_page_is_in_the_navigation() -> None:
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").glob("*.md")}
    assert {page for page in pages if page not in NAV} == set()
    yaml.safe_load(NAV)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    api_pages.main()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "Multi-gate Mixture-of-Experts" in (tmp_path / "api" / "components.html").read_text()
