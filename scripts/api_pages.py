"""Write docs/api/*.md, one page a part of the house, a section for each module: `make site` runs it.

The pages hold names alone; mkdocstrings fills in signatures and docstrings.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api"
# Page -> its title and the packages or modules in it, from the ground up.
PAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "components": ("Blocks", ("components",)),
    "config": (
        "Schema and configuration",
        ("pipeline.errors", "pipeline.texts", "pipeline.schema", "pipeline.config", "pipeline.tracking"),
    ),
    "data": ("Data", ("pipeline.data",)),
    "evaluate": ("Evaluation", ("pipeline.evaluate",)),
    "recipes": ("Recipes", ("pipeline.recipes",)),
    "sweep": ("Sweeps", ("pipeline.sweep",)),
    "train": ("Training", ("pipeline.train", "pipeline.job", "pipeline.daily")),
    "serve": ("Serving", ("pipeline.serve", "pipeline.publish")),
    "rollout": ("Rollout", ("pipeline.rollout",)),
    "torchx": ("TorchX components", ("torchx_specs",)),
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


def main() -> None:
    API.mkdir(exist_ok=True)
    for page, (title, names) in PAGES.items():
        sections = "\n".join(f"\n::: {module}" for name in names for module in modules(name))
        (API / f"{page}.md").write_text(f"# {title}\n{sections}\n")


if __name__ == "__main__":
    main()
