"""Resolve what pyproject.toml asks for and write the pinned sets, each file with its SHA-256: `make lock`.

pip resolves (nothing is installed), this script writes down what it chose. Three files come of it:

    cpu.lock             fbgemm's CPU build; without the shim beside it, a folder, which can have no hash
    cuda.txt             fbgemm's CUDA build; everything else as in cpu.lock
    cuda-libraries.txt   what a CUDA build of torch brings along: CUDA's libraries, triton

A package has one hash for each file that may be chosen: wheels for every Python that we support, and both builds of
torch. pip chooses one build of torch, so hashes of a version that is already in a file stay there: lock where pip
takes the CPU build and where it takes the CUDA build, and both are known. Wheels are those of Linux on x86-64, the only
platform that fbgemm is built for.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
EXTRAS = "dev,gbdt,kubernetes,sweep,notebooks,site,fuzz"
SHIM = "requirements/fbgemm-gpu-cpu-shim"
PYTHONS = ("3.11", "3.12")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)]
PLATFORMS += [f"{name}_x86_64" for name in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
HEADER = "# Written by `make lock` from pyproject.toml; do not edit. Installed without dependencies: all are here."
# What a CUDA build of torch requires beside it.
OF_TORCH = re.compile(r"(nvidia|cuda|triton)\b.*")
# What torch calls its CPU build, in the local part of a version.
CPU_BUILD = "cpu"
OURS = {"trefoil", "fbgemm-gpu", "fbgemm-gpu-cpu"}

Lock = dict[str, tuple[str, set[str]]]
"""Name of a package to its version and the SHA-256 of each of its files."""


def resolve(*args: str) -> Lock:
    """What pip would install into an empty environment; our own folders have no hash."""
    pip = (sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--report", "-")
    report = subprocess.run([*pip, *args], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(map(_entry, json.loads(report)["install"]))


def _entry(item: dict[str, Any]) -> tuple[str, tuple[str, set[str]]]:
    name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
    hashes = item["download_info"].get("archive_info", {}).get("hashes", {})
    return name, (item["metadata"]["version"], {hashes["sha256"]} if "sha256" in hashes else set())


def released(lock: Lock, *, build: str = "") -> Lock:
    """Versions without their local part, which names a build (torch's +cpu), not a release.

    Args:
        lock: as resolved.
        build: files of this build are left out.
    """
    found = {name: (*version.partition("+")[::2], hashes) for name, (version, hashes) in lock.items()}
    return {n: (v, set() if build and local == build else hashes) for n, (v, local, hashes) in found.items()}


def wheels(python: str, lock: Lock, pip_args: list[str]) -> Lock:
    """The same packages as another Python would install them."""
    options = [f"--python-version={python}", "--only-binary=:all:", *(f"--platform={p}" for p in PLATFORMS)]
    with tempfile.TemporaryDirectory() as target:
        pins = [f"{name}=={version}" for name, (version, _) in lock.items()]
        return resolve("--no-deps", f"--target={target}", *options, *pip_args, *pins)


def merged(*locks: Lock) -> Lock:
    """Packages and versions of the first, with the hashes that any of them knows of that version."""
    return {
        name: (version, hashes.union(*(lock[name][1] for lock in locks if lock.get(name, ("",))[0] == version)))
        for name, (version, hashes) in locks[0].items()
    }


def read(path: Path) -> Lock:
    """A file as written before; nothing if there is none."""
    text = path.read_text() if path.exists() else ""
    pins = re.findall(r"^([\w.-]+)==(\S+)((?:\s*\\?\s*--hash=sha256:[0-9a-f]{64})*)", text, re.MULTILINE)
    return {name: (version, set(re.findall(r"sha256:(\w+)", hashes))) for name, version, hashes in pins}


def write(path: Path, lock: Lock, *header: str) -> None:
    """One package after another in order of name, each hash on a line of its own.

    Raises:
        SystemExit: a package has no hash.
    """
    if bare := [name for name, (_, hashes) in lock.items() if not hashes]:
        raise SystemExit(f"the index gives no SHA-256 of {', '.join(bare)}")
    lines = [
        " \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{h}" for h in sorted(hashes))])
        for name, (version, hashes) in sorted(lock.items())
    ]
    path.write_text("\n".join([HEADER, *header, *lines, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pip_args", nargs="*", help="passed to pip install, after --")
    pip_args = parser.parse_args().pip_args
    cpu, cuda, libraries = HERE / "cpu.lock", HERE / "cuda.txt", HERE / "cuda-libraries.txt"
    resolved = resolve(*pip_args, f"./{SHIM}", f".[{EXTRAS}]")
    found, of_cuda = released(resolved), released(resolved, build=CPU_BUILD)
    of_torch = {name: entry for name, entry in found.items() if OF_TORCH.fullmatch(name)}
    common = {name: entry for name, entry in found.items() if name not in OURS | of_torch.keys()}
    fbgemm = {"fbgemm-gpu-cpu": found["fbgemm-gpu-cpu"]}, {"fbgemm-gpu": (found["fbgemm-gpu-cpu"][0], set[str]())}
    # Every Python is asked, this one too: pip takes 3.11 for 3.11.0, and what wants a later one fails here.
    more = [wheels(python, common | each, pip_args) for each in fbgemm for python in PYTHONS]
    write(cpu, merged(common | fbgemm[0], *map(released, more), read(cpu)))
    more = [released(each, build=CPU_BUILD) for each in more]
    write(cuda, merged({n: of_cuda[n] for n in common} | fbgemm[1], *more, read(cuda)), "# For machines with CUDA.")
    if of_torch:
        more = [released(wheels(python, of_torch, pip_args)) for python in PYTHONS]
        note = f"# What the CUDA build of torch {found['torch'][0]} brings along."
        write(libraries, merged(of_torch, *more, read(libraries)), note)
    elif not libraries.exists() or f"torch {found['torch'][0]} " not in libraries.read_text():
        raise SystemExit(f"{libraries.name} is of another torch: lock once more where pip takes its CUDA build")
    print(f"wrote {len(common) + 1} packages to {cpu.name} and {cuda.name}, {len(of_torch)} to {libraries.name}")


if __name__ == "__main__":
    main()
