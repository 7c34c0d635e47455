"""Write docs/api/: a page for each part of the house, each block with its paper, and each recipe: `make site` runs it.

Reference pages hold names alone; mkdocstrings fills in signatures and docstrings. A block's page is its module's; a
recipe's page shows its blocks and every field that it sets.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path

from pipeline.config import RunConfig, flat_config
from pipeline.recipes import SHIPPED, find

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api"
PAPERS, PAPER_IN_PASSING = r"Papers?: (.*?)\. (?=[A-Z])", r"\(((?:compare )?\w+ et al\..*?)\)"
# Page -> its title and the packages or modules in it, from the ground up.
PAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "config": (
        "Schema and configuration",
        (
            "pipeline.errors",
            "pipeline.texts",
            "pipeline.progress",
            "pipeline.schema",
            "pipeline.config",
            "pipeline.tracking",
        ),
    ),
    "data": ("Data", ("pipeline.data",)),
    "evaluate": ("Evaluation", ("pipeline.evaluate",)),
    "recipes": ("Recipes' functions", ("pipeline.recipes",)),
    "sweep": ("Sweeps", ("pipeline.sweep",)),
    "train": ("Training", ("pipeline.train", "pipeline.job", "pipeline.daily")),
    "serve": ("Serving", ("pipeline.serve", "pipeline.publish")),
    "rollout": ("Rollout", ("pipeline.rollout",)),
    "torchx": ("TorchX", ("torchx_specs", "pipeline.torchx_tracker")),
}


def modules(name: str) -> list[str]:
    """A module, or every public module of a package that says what it is."""
    place = ROOT / name.replace(".", "/")
    if not place.is_dir():
        return [name]
    found = []
    for path in sorted(place.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if path.stat().st_size and not any(part.startswith("_") for part in parts):
            found.append(".".join(parts))
    return found


def blocks() -> dict[str, tuple[str, str]]:
    """Module of components/ -> the first sentence of its docstring, and its papers (- where it says none)."""
    found = {}
    for path in sorted((ROOT / "components").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text()))
        if text:
            what = text.split("\n\n")[0].replace("\n", " ").removesuffix(".")
            words = " ".join(text.split())
            papers = re.search(PAPERS, words) or re.search(PAPER_IN_PASSING, words)
            found[path.stem] = (what, papers[1] if papers else "-")
    return found


def blocks_of(config: RunConfig) -> list[str]:
    """The blocks that a recipe's model is made of, in the order in which data meets them."""
    model = config.model
    used = ["inputs", "embeddings", "features", "numeric"]
    readers = {"transformer": ["history", "attention"], "state": ["user_state"], "none": []}
    used += readers.get(model.history.kind, ["attention"])
    if model.history.kind != "none" and model.projection.kind == "dcn":
        used.append("cross")
    used += ["gating"] if model.surface_gate else []
    used += ["trunk", "cross", "mlp"] if model.cross_layers else ["trunk", "mlp"]
    used += {"mmoe": ["mmoe"], "shared_bottom": ["mmoe"], "ple": ["ple"], "none": []}[model.mixture.kind]
    used.append({"residual": "residual_towers", "star": "star"}.get(model.towers, "towers"))
    used += ["late_fusion"] if model.late_fusion and model.towers in ("per_surface", "residual") else []
    used += ["calibration"] if model.calibration != "none" else []
    return list(dict.fromkeys([*used, "losses"]))


def recipe_page(name: str) -> str:
    """A recipe's page: what it is, its code, its blocks, and every field."""
    module, function, what = SHIPPED[name]
    make = find(name)
    config = make()
    known = blocks()
    rows = "\n".join(f"| `{field}` | `{value}` |" for field, value in flat_config(config).items())
    table = "\n".join(
        f"| [{block}](../blocks/{block}.md) | {known[block][0]} | {known[block][1]} |" for block in blocks_of(config)
    )
    return f"""# {name}

{what[0].upper()}{what[1:]}. Defined by `{function}` in `{module.replace(".", "/")}.py`:

```python
{textwrap.dedent(inspect.getsource(make)).rstrip()}
```

Train it with `trefoil train --recipe {name} --data LOG`; any field below is a flag.

## Blocks

| block | what | paper |
|---|---|---|
{table}

## Fields

| field | value |
|---|---|
{rows}
"""


def write(path: Path, text: str) -> None:
    """A page and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def main() -> None:
    for page, (title, names) in PAGES.items():
        sections = "\n".join(f"\n::: {module}" for name in names for module in modules(name))
        write(API / f"{page}.md", f"# {title}\n{sections}\n")
    found = blocks()
    for name in found:
        write(API / "blocks" / f"{name}.md", f"# {name}\n\n::: components.{name}\n")
    rows = "\n".join(f"| [{n}](blocks/{n}.md) | {what} | {paper} |" for n, (what, paper) in found.items())
    write(API / "blocks.md", f"# Blocks\n\n| block | what | paper |\n|---|---|---|\n{rows}\n")
    rows = "\n".join(f"| [{n}](recipes/{n}.md) | {what} |" for n, (_, _, what) in SHIPPED.items())
    write(API / "shipped.md", f"# Recipes\n\n| recipe | what |\n|---|---|\n{rows}\n")
    for name in SHIPPED:
        write(API / "recipes" / f"{name}.md", recipe_page(name))


if __name__ == "__main__":
    main()
