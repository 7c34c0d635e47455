"""The documentation site: every module has its place, and the pages build without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.data.logs import Dataset
from pipeline.data.simulate import SimulationConfig, simulate
from pipeline.recipes import find
from pipeline.schema import Kind
from pipeline.train.build import build_task
from pipeline.train.model_plan import model_plan
from scripts import api_pages
from scripts.docstring_examples import as_sections

ROOT = Path(__file__).parents[1]
NAV = (ROOT / "mkdocs.yml").read_text()


def test_every_module_has_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_pages, "API", tmp_path)
    api_pages.main()
    pages = sorted(tmp_path.rglob("*.md"))
    sections = {line.removeprefix("::: ") for page in pages for line in page.read_text().splitlines()}
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("components", "pipeline", "torchx_specs")
        for path in (ROOT / package).rglob("[!_]*.py")
    }
    assert {m for m in modules if not m.startswith("pipeline.cli")} - sections == set()
    assert {f"api/{page.relative_to(tmp_path)}" for page in pages} == set(re.findall(r"api/[\w/]+\.md", NAV))


def test_a_recipes_page_names_the_blocks_that_its_model_is_made_of(tmp_path: Path) -> None:
    simulate(tmp_path / "log", SimulationConfig.tiny())
    dataset = Dataset.open(tmp_path / "log")
    for name in ("demo", "demo_merged"):
        config = find(name)()
        moments = {f.name: (0.0, 1.0) for f in dataset.schema.select(kind=Kind.NUMERIC)}
        task = build_task(model_plan(config, dataset.schema, moments), table_device=torch.device("cpu"))
        modules = {type(m).__module__.removeprefix("components.") for m in task.modules()}
        built = modules & api_pages.blocks().keys() - {"engagement_model"}
        # What is no module of its own: the batch's tensors, and functions.
        assert set(api_pages.blocks_of(config)) - {"inputs"} == built, name
        page = api_pages.recipe_page(name)
        assert f'name="{name}"' in page or name != "demo"
        assert f"| `loader.requests_per_batch` | `{config.loader.requests_per_batch}` |" in page


def test_blocks_say_their_papers() -> None:
    papers = {name: paper for name, (_, paper) in api_pages.blocks().items()}
    assert papers["cross"] == 'Wang et al., "DCN V2: Improved Deep & Cross Network", WWW 2021'
    assert papers["residual_towers"].startswith("compare Rebuffi et al.")
    # Plain layers, and what the pages' own formulas define.
    assert {name for name, paper in papers.items() if paper == "-"} == {
        *("embeddings", "engagement_model", "features", "inputs", "late_fusion", "losses", "mlp", "names", "ragged"),
        *("towers", "trunk"),
    }


def test_every_page_is_in_the_navigation() -> None:
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").glob("*.md")}
    assert {page for page in pages if page not in NAV} == set()
    yaml.safe_load(NAV)


def test_doctests_become_sections_whatever_stands_above_them() -> None:
    bare = "What.\n\n>>> [1]\n[1]\n\nMore."
    assert as_sections(bare) == "What.\n\nExamples:\n    >>> [1]\n    [1]\n\nMore."
    assert as_sections("What.\n\nExample:\n    >>> 1") == "What.\n\nExamples:\n    >>> 1"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    api_pages.main()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "index.html").read_text()
    assert "api/blocks/star.html" in home
    assert "api/recipes/kuairand.html" in home
    assert "Multi-gate Mixture-of-Experts" in (tmp_path / "api" / "blocks" / "mmoe.html").read_text()
