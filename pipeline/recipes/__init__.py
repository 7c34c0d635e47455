"""Named runs: each a function without arguments that returns a whole `RunConfig`.

`find("kuairand")` gives a shipped recipe, `find("path/to/file.py:function")` one of your own, and
`find("runs/RUN/config.json")` the one that a run was trained with. A recipe in Python is code and runs as such: use
only files that you trust. One in JSON is data.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

from pipeline.config import RunConfig, config_from_json
from pipeline.errors import ConfigError, unknown

# name -> module, function, what it is
SHIPPED: dict[str, tuple[str, str, str]] = {
    "demo": ("pipeline.recipes.demo", "demo", "unified model on simulated logs, in minutes"),
    "demo_staged": ("pipeline.recipes.demo", "rollout", "unified model of the staged rollout's demo"),
    "demo_merged": ("pipeline.recipes.demo", "merged", "merged baseline on simulated logs: one tower, no gates"),
    "demo_hf": ("pipeline.recipes.demo", "separate_hf", "separate model of Home Feed on simulated logs"),
    "demo_sr": ("pipeline.recipes.demo", "separate_sr", "separate model of Search on simulated logs"),
    "demo_rp": ("pipeline.recipes.demo", "separate_rp", "separate model of Related Pins on simulated logs"),
    "simulated": ("pipeline.recipes.simulated", "simulated", "unified model on larger simulated logs"),
    "simulated_merged": ("pipeline.recipes.simulated", "merged", "merged baseline on larger simulated logs"),
    "simulated_hf": ("pipeline.recipes.simulated", "separate_hf", "separate model of Home Feed, larger simulated logs"),
    "simulated_sr": ("pipeline.recipes.simulated", "separate_sr", "separate model of Search, larger simulated logs"),
    "simulated_rp": ("pipeline.recipes.simulated", "separate_rp", "separate model of Related Pins, larger logs"),
    "kuairand": ("pipeline.recipes.kuairand", "kuairand", "unified model on KuaiRand-Pure"),
    "kuairand_merged": ("pipeline.recipes.kuairand", "merged", "merged baseline on KuaiRand-Pure"),
    "kuairand_hf": ("pipeline.recipes.kuairand", "separate_hf", "separate model of tab 1 of KuaiRand-Pure"),
    "kuairand_sr": ("pipeline.recipes.kuairand", "separate_sr", "separate model of tab 0 of KuaiRand-Pure"),
    "kuairand_rp": ("pipeline.recipes.kuairand", "separate_rp", "separate model of tab 4 of KuaiRand-Pure"),
    "ten_terabytes": ("pipeline.recipes.scale", "ten_terabytes", "120 tables of 10 TB in all; for `trefoil plan`"),
}


def find(name: str) -> Callable[[], RunConfig]:
    """The recipe called `name`, or the function of a file, written FILE.py:FUNCTION, or a run's configuration.

    Raises:
        ConfigError: there is no such recipe, file or function.
    """
    if name in SHIPPED:
        module, function, _ = SHIPPED[name]
        return _function(importlib.import_module(module), function, name)
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ConfigError(f"recipe {name!r}: there is no such file")
        config = config_from_json(Path(name).read_bytes(), source=name)
        return lambda: config
    if ".py:" not in name:
        raise ConfigError(
            unknown("recipe", name, SHIPPED)
            + ". Your own is given as path/to/file.py:function, that of a run as path/to/config.json"
        )
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"recipe {name!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"trefoil_recipe_{Path(path).stem}", path)
    assert spec is not None, "a .py file always has a spec"
    assert spec.loader is not None, "a .py file always has a loader"
    module_of_file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module_of_file)
    return _function(module_of_file, function, name)


def _function(module: object, function: str, name: str) -> Callable[[], RunConfig]:
    found = getattr(module, function, None)
    if not callable(found):
        defined = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ConfigError(f"recipe {name!r}: " + unknown("function", function, defined))
    return found
