"""What the components share: checked arguments and the roles that they become.

Only torchx is imported; what runs in the job is named by strings.
"""

import re
import shlex
from dataclasses import dataclass

from torchx import specs
from torchx.specs import macros
from torchx.specs.finder import ComponentValidationException

CLI = "pipeline.cli"
PORT = 29500
# Slurm gives what a job prints a terminal (TorchX asks it not to buffer) and writes it to a file all the same, where
# bars and colours have no place.
ENVIRONMENT = {"TTY_COMPATIBLE": "0"}
# Chosen by the scheduler and the same again when it restarts the job, which then goes on where it was.
DEFAULT_RUN_DIR = f"runs/{macros.app_id}"


class ArgumentError(ComponentValidationException, ValueError):
    """An argument cannot be used; of a kind that `torchx run` prints without a traceback."""


@dataclass(frozen=True)
class Size:
    """How many ranks a job has.

    Args:
        least: nodes that the job goes on with when others are lost.
        nodes: nodes that it is given.
        each: ranks of a node.
    """

    least: int
    nodes: int
    each: int


def processes(j: str | None, nproc: int, resource: specs.Resource) -> Size:
    """Nodes and processes on each, from the two ways to ask for them.

    Args:
        j: NODESxPROCESSES or LEAST:NODESxPROCESSES, or None.
        nproc: processes on one node, or 0.
        resource: of a node; with neither of the two given, a process is started for each of its GPUs.

    Raises:
        ArgumentError: both are given, one cannot be read, or a node has fewer GPUs than processes.
    """
    example = "for example -j 2x8 (2 nodes, 8 processes on each), -j 1:2x8 (at least one node) or --nproc 2 (one node)"
    if j is not None and nproc:
        raise ArgumentError(f"-j {j} and --nproc {nproc} are both given; give one, {example}")
    if j is not None:
        match = re.fullmatch(r"(?:([1-9]\d*):)?([1-9]\d*)x([1-9]\d*)", j)
        if match is None:
            raise ArgumentError(f"-j is {j!r}; write NODESxPROCESSES, {example}")
        nodes, each = int(match[2]), int(match[3])
        least = int(match[1] or nodes)
    else:
        least, nodes, each = 1, 1, nproc or max(resource.gpu, 1)
    if each < 1:
        raise ArgumentError(f"--nproc is {each}; it must be positive, {example}")
    if least > nodes:
        raise ArgumentError(f"-j {j} asks for at least {least} of {nodes} nodes; write the smaller number first")
    if 0 < resource.gpu < each:
        raise ArgumentError(f"{each} processes on a node of {resource.gpu} GPUs; each needs its own, {example}")
    return Size(least, nodes, each)


def resource_of(h: str) -> specs.Resource:
    """A named resource.

    Raises:
        ArgumentError: no resource has that name; the message names near ones.
    """
    try:
        return specs.resource(h=h)
    except KeyError as error:
        ours = "cpu8, a100x8, h100x8, h200x8"
        raise ArgumentError(f"{error.args[0]} For example -h h100x8; Trefoil registers {ours}") from error


def at_least(least: int, **values: int) -> None:
    """Check counts.

    Raises:
        ArgumentError: a value is smaller.
    """
    for name, value in values.items():
        if value < least:
            raise ArgumentError(
                f"--{name} is {value}; it must be at least {least}, for example --{name} {max(least, 3)}"
            )


def app_name(verb: str, what: str) -> str:
    """A name that every scheduler takes: lower case letters, digits and dashes.

    >>> app_name("train", "my/recipes.py:wide_tower")
    'train-wide-tower'
    """
    last = re.split(r"[/:]", what.rstrip("/"))[-1]
    cleaned = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")
    return f"{verb}-{cleaned}"[:40].rstrip("-")


def single(
    verb: str,
    what: str,
    arguments: list[str],
    *,
    image: str,
    h: str,
    python: str,
    env: dict[str, str] | None,
    mounts: list[str] | None,
    max_retries: int,
) -> specs.AppDef:
    """One process that runs `trefoil VERB`; `what` it works on gives the job its name."""
    at_least(0, max_retries=max_retries)
    role = specs.Role(
        name=verb,
        image=image,
        entrypoint=python,
        args=["-m", CLI, verb, *arguments],
        env={**ENVIRONMENT, **(env or {})},
        resource=resource_of(h),
        max_retries=max_retries,
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(name=app_name(verb, what), roles=[role])


def ranks(
    verb: str,
    what: str,
    arguments: list[str],
    *,
    size: Size,
    image: str,
    resource: specs.Resource,
    python: str,
    env: dict[str, str] | None,
    mounts: list[str] | None,
    max_restarts: int,
    max_retries: int,
) -> specs.AppDef:
    """Ranks of `trefoil VERB` under torch.distributed.run, meeting over c10d."""
    at_least(0, max_restarts=max_restarts, max_retries=max_retries)
    # Two dollars: the scheduler's substitution leaves one to the shell, which alone knows the first node's name.
    endpoint = "localhost:0" if size.nodes == 1 else f'"$${{{macros.rank0_env}:-localhost}}:{PORT}"'
    launcher = [
        # Ranks share a node's cores: one thread each unless whoever starts the job says otherwise.
        'export OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}"',
        # torchrun's default is one store for all attempts; ranks that start again then find the addresses that gloo
        # left there in the attempt before, and hang or fail once more.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1;",
        *("exec", shlex.quote(python), "-m", "torch.distributed.run"),
        *("--nnodes", str(size.nodes) if size.least == size.nodes else f"{size.least}:{size.nodes}"),
        *("--nproc-per-node", str(size.each), "--max-restarts", str(max_restarts)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", macros.app_id),
    ]
    job = shlex.join(["-m", CLI, verb, *arguments])
    role = specs.Role(
        name=verb,
        image=image,
        entrypoint="bash",
        args=["-c", " ".join([*launcher, job])],
        env={**ENVIRONMENT, **(env or {})},
        num_replicas=size.nodes,
        min_replicas=size.least if size.least < size.nodes else None,
        resource=resource,
        port_map={"c10d": PORT},
        max_retries=max_retries,
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(name=app_name(verb, what), roles=[role])
