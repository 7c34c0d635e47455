"""Resolve what pyproject.toml asks for and write the pinned sets: `make lock`.

pip resolves (nothing is installed), this script writes down what it chose. Two files come of one resolution:

    cpu.lock    fbgemm's CPU build, with the shim that keeps torchrec from pulling the CUDA build beside it
    cuda.txt    fbgemm's CUDA build; everything else as in cpu.lock

Libraries that one build of torch brings along (CUDA's, triton) are left to torch, which pins them exactly: so the
same lock serves where pip takes the CPU build of torch and where it takes the CUDA build.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
EXTRAS = "dev,gbdt,kubernetes,sweep,notebooks,site,fuzz"
SHIM = "requirements/fbgemm-gpu-cpu-shim"
HEADER = """\
# Written by `make lock` from pyproject.toml; do not edit.
# Install from the root of the repository, so that the path below is found.
"""
# What a CUDA build of torch requires beside it, with versions of its own choosing.
OF_TORCH = re.compile(r"(nvidia|cuda|triton)\b.*")
OURS = {"trefoil", "fbgemm-gpu", "fbgemm-gpu-cpu"}


def resolve(pip_args: list[str]) -> dict[str, str]:
    """Names and versions that pip would install into an empty environment."""
    report = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--report", "-"),
            *(*pip_args, f"./{SHIM}", f".[{EXTRAS}]"),
        ],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    chosen = [item["metadata"] for item in json.loads(report)["install"]]
    return {re.sub(r"[-_.]+", "-", m["name"]).lower(): m["version"] for m in chosen}


def pins(versions: dict[str, str]) -> list[str]:
    """One pin a line; the local part of a version (torch's +cpu) is left out, it names a build, not a release."""
    return [
        f"{name}=={version.partition('+')[0]}"
        for name, version in sorted(versions.items())
        if name not in OURS and not OF_TORCH.fullmatch(name)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pip_args", nargs="*", help="passed to pip install, after --")
    versions = resolve(parser.parse_args().pip_args)
    fbgemm = versions["fbgemm-gpu-cpu"].partition("+")[0]
    lines = pins(versions)
    (HERE / "cpu.lock").write_text("\n".join([HEADER.rstrip(), f"./{SHIM}", f"fbgemm-gpu-cpu=={fbgemm}", *lines, ""]))
    cuda = HEADER.splitlines()[0] + "\n# For machines with CUDA: fbgemm's CUDA build, hence no shim."
    (HERE / "cuda.txt").write_text("\n".join([cuda, f"fbgemm-gpu=={fbgemm}", *lines, ""]))
    print(f"wrote {len(lines) + 2} pins to requirements/cpu.lock and requirements/cuda.txt")


if __name__ == "__main__":
    main()
