"""The export job for TorchX; see `torchx run export --help`."""

from torchx import specs

from torchx_specs.launch import single


def export(
    *flags: str,
    checkpoint: str,
    surface: str,
    out: str,
    h: str = "cpu8",
    image: str = "trefoil:latest",
    python: str = "python",
    max_retries: int = 0,
    env: dict[str, str] | None = None,
    mounts: list[str] | None = None,
) -> specs.AppDef:
    """Make one surface's serving artifact from a checkpoint.

    For example: torchx run --scheduler local_cwd export --checkpoint runs/a/checkpoints/9 --surface hf --out hf

    Args:
        flags: further flags, after --, as `trefoil export` takes them
        checkpoint: folder of the checkpoint, as the job sees it
        surface: surface to export, such as hf
        out: folder to write the artifact to
        h: named resource of the node: cpu8, a100x8, h100x8, h200x8 or any other that is registered
        image: container image, where the scheduler runs containers
        python: interpreter to run, as the job sees it
        max_retries: times that the scheduler starts the job again (local_cwd never does)
        env: variables of the job, such as MLFLOW_TRACKING_URI=http://mlflow:5000
        mounts: volumes in containers, such as type=volume,src=logs,dst=/logs,readonly
    """
    return single(
        "export",
        surface,
        ["--checkpoint", checkpoint, "--surface", surface, "--out", out, *flags],
        image=image,
        h=h,
        python=python,
        env=env,
        mounts=mounts,
        max_retries=max_retries,
    )
