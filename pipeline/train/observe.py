"""What a run says of its steps: losses, rates, time by part, ids, experts, gradients, memory; and if one is NaN.

Sums over steps cost an addition a step; what costs more is looked at once a report, at the step that ends it.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from components.mmoe import MMoE
from pipeline.config import RunConfig
from pipeline.data.batch import Batch
from pipeline.errors import TrefoilError
from pipeline.train.clock import StepClock
from pipeline.train.gates import GateWatch
from pipeline.train.sharding import Ranks
from pipeline.train.tables import table_of
from pipeline.train.task import StepOutputs


class NonFiniteLossError(TrefoilError):
    """The loss became NaN or infinite; the message names the step and the file that holds the batch's identity."""


def unique_share(ids: KeyedJaggedTensor) -> dict[str, float]:
    """By key, the number of different ids over the number of ids; keys without an id are left out."""
    shares: dict[str, float] = {}
    if not ids.values().numel():
        # A rank may have no request in a step; TorchRec cannot split what has no row.
        return shares
    for key, jagged in ids.to_dict().items():
        values = jagged.values()
        if values.numel():
            shares[key] = values.unique().numel() / values.numel()
    return shares


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients there are, as one number on their device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) if gradients else torch.zeros(())


def memory_bytes(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far: resident on the host and, on CUDA, of tensors on the device."""
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}
    if device.type == "cuda":
        found["device"] = float(torch.cuda.max_memory_allocated(device))
        found["device_reserved"] = float(torch.cuda.max_memory_reserved(device))
    return found


@dataclass(frozen=True, kw_only=True)
class SeenStep:
    """What is kept of a step until the next report.

    Args:
        epoch, step: of the run; steps count from 1.
        losses: [2 * T], on the device.
        finite_C: bool [C], whether all logits of a candidate are numbers, on the device.
        request_id: int64 [R].
        request_of_candidate: int64 [C].
        requests_per_surface: rows of each surface among R.
    """

    epoch: int
    step: int
    losses: Tensor
    finite_C: Tensor
    request_id: Tensor
    request_of_candidate: Tensor
    requests_per_surface: tuple[int, ...]

    @classmethod
    def of(cls, epoch: int, step: int, outputs: StepOutputs) -> SeenStep:
        batch = outputs.batch
        return cls(
            epoch=epoch,
            step=step,
            losses=outputs.losses,
            finite_C=torch.isfinite(outputs.logits).all(1) & torch.isfinite(outputs.calibrated).all(1),
            request_id=batch.request_id,
            request_of_candidate=batch.inputs.request_of_candidate,
            requests_per_surface=tuple(batch.inputs.requests_per_surface),
        )

    def identity(self, config: RunConfig, rank: int) -> dict[str, Any]:
        """The batch as JSON-able values: requests by surface, and those with a score that is no number."""
        ids, split = self.request_id.cpu(), list(self.requests_per_surface)
        requests = dict(zip(config.surfaces, ids.split(split), strict=True))
        marks = dict(zip(config.surfaces, self._marked(~self.finite_C).split(split), strict=True))
        names = [f"{t}/{kind}" for kind in ("loss", "calibrated_loss") for t in config.tasks]
        losses = {n: v if math.isfinite(v) else str(v) for n, v in zip(names, self.losses.tolist(), strict=True)}
        return {
            "epoch": self.epoch,
            "step": self.step,
            "rank": rank,
            "losses": losses,
            "requests": {s: r.tolist() for s, r in requests.items()},
            "requests_without_finite_score": {s: requests[s][marks[s]].tolist() for s in config.surfaces},
        }

    def reason(self, config: RunConfig) -> str:
        """What a person should look at."""
        split = list(self.requests_per_surface)
        bad, good = self._marked(~self.finite_C).split(split), self._marked(self.finite_C).split(split)
        whole = [s for s, b, g in zip(config.surfaces, bad, good, strict=True) if b.any() and not g.any()]
        some = [s for s, b, g in zip(config.surfaces, bad, good, strict=True) if b.any() and g.any()]
        if some:
            return f"some requests of {', '.join(some)} have no finite score, so look at their features"
        if whole:
            return (
                f"no request of {', '.join(whole)} has a finite score, so parameters went bad in the step before; "
                "lower optimizer.dense_lr or optimizer.sparse_lr, or set optimizer.clip_gradient_norm"
            )
        return "all scores are finite, so look at the labels and weights"

    def _marked(self, candidates_C: Tensor) -> Tensor:
        """Bool [R] on the host: requests that have one of the marked candidates."""
        marks = torch.zeros(len(self.request_id), dtype=torch.bool)
        marks[self.request_of_candidate.cpu()[candidates_C.cpu()].long()] = True
        return marks


class StepWindow:
    """Sums over the steps between two reports. Closing it is the one place where training waits for the device.

    Args:
        config: of the run.
        ranks: this process among its peers.
        model: the sharded task.
        clock: of the step.
        folder: where the identity of a batch that is not finite is written.
        waited_s: what the loader has made this rank wait before.
    """

    def __init__(
        self, config: RunConfig, ranks: Ranks, model: nn.Module, clock: StepClock, folder: Path, *, waited_s: float
    ) -> None:
        self.config, self.ranks, self.clock, self.folder = config, ranks, clock, folder
        self.waited_before = waited_s
        mixture = next((m for m in model.modules() if isinstance(m, MMoE)), None)
        self.gates = GateWatch(mixture) if mixture is not None else None
        self.dense = [p for name, p in model.named_parameters() if table_of(name) is None]
        self.norm: Tensor | None = None
        self.looking = False
        self._reset()

    def begin(self, waited_s: float) -> None:
        """Count from now."""
        self.waited_before = waited_s
        self._reset()

    def _reset(self) -> None:
        self.start = time.perf_counter()
        self.seen: list[SeenStep] = []
        self.requests = self.impressions = 0
        self.last: Batch | None = None
        self.clock.read()

    def look(self, now: bool) -> None:
        """Whether the next step is one to look at closely."""
        self.looking = now
        if self.gates is not None:
            self.gates.watching = now

    def before_step(self) -> None:
        """Called when all gradients of a step are there, before they are clipped and used."""
        if self.looking:
            self.norm = gradient_norm(self.dense)

    def add(self, epoch: int, step: int, outputs: StepOutputs) -> None:
        self.seen.append(SeenStep.of(epoch, step, outputs))
        self.requests += sum(outputs.batch.inputs.requests_per_surface)
        self.impressions += sum(outputs.batch.inputs.candidates_per_surface)
        self.last = outputs.batch

    def check(self) -> None:
        """Make sure that every loss since the last report is a number; every rank calls this.

        Raises:
            NonFiniteLossError: one is not; each rank that saw one has written down which batch it was.
        """
        losses = torch.stack([s.losses for s in self.seen]) if self.seen else torch.zeros(0, 1)
        bad = (~torch.isfinite(losses).all(1)).nonzero().flatten().tolist()
        first = self.seen[bad[0]] if bad else None
        path = self.folder / f"not_finite_rank_{self.ranks.rank}.json"
        if first is not None:
            identity = first.identity(self.config, self.ranks.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(identity, indent=1) + "\n")
        if float(self.ranks.sum(torch.tensor([float(bool(bad))]))) == 0:
            return
        if first is None:
            raise NonFiniteLossError(
                f"the loss of another rank is NaN or infinite; its batch is in {self.folder / 'not_finite_rank_*.json'}"
            )
        raise NonFiniteLossError(
            f"the loss is NaN or infinite at step {first.step} of epoch {first.epoch}: {first.reason(self.config)}. "
            f"The batch's requests are in {path}; checkpoints from before that step are good"
        )

    def close(self, waited_s: float) -> dict[str, float]:
        """Metrics over all ranks; resets. `waited_s` is what this rank's loader made it wait since it began.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite.
        """
        self.check()
        steps, tasks = len(self.seen), self.config.tasks
        losses = torch.stack([s.losses for s in self.seen]).sum(0).cpu().double()
        total = self.ranks.sum(torch.cat([losses, torch.tensor([self.requests, self.impressions]).double()]))
        mean = (total[:-2] / (steps * self.ranks.world_size)).view(2, -1)
        metrics = {f"train/{t}/loss": float(mean[0, i]) for i, t in enumerate(tasks)}
        metrics |= {f"train/{t}/calibrated_loss": float(mean[1, i]) for i, t in enumerate(tasks)}
        parts = self.clock.read()
        seconds = time.perf_counter() - self.start
        metrics |= {
            "train/requests_per_second": float(total[-2]) / seconds,
            "train/impressions_per_second": float(total[-1]) / seconds,
            "train/wait_share": (waited_s - self.waited_before) / seconds,
            "train/step_seconds": seconds / steps,
        }
        metrics |= {f"train/step_seconds/{part}": value / steps for part, value in parts.items()}
        metrics |= {f"train/memory_bytes/{k}": v for k, v in memory_bytes(self.ranks.device).items()}
        metrics |= self._looked_at()
        self.waited_before = waited_s
        self._reset()
        return metrics

    def _looked_at(self) -> dict[str, float]:
        """Of the step that was looked at, on this rank."""
        metrics = self.gates.metrics() if self.gates is not None else {}
        if self.norm is not None:
            metrics["train/gradient_norm"] = float(self.norm)
            self.norm = None
        if self.looking and self.last is not None:
            inputs = self.last.inputs
            for ids in (inputs.request_ids, inputs.candidate_ids, inputs.sequence_ids):
                metrics |= {f"train/unique_ids/{key}": share for key, share in unique_share(ids).items()}
        return metrics


@contextmanager
def profiled(steps: tuple[int, int] | None, folder: Path, rank: int) -> Iterator[torch.profiler.profile | None]:
    """A profiler whose `step()` is called once a training step; it writes a trace for steps first to last.

    Args:
        steps: first, 2 or later, and last step to record, counted over the steps of this process; None for none.
        folder: gets `rank-R-steps-A-B.json.gz`, for chrome://tracing or https://ui.perfetto.dev, and a table beside it.
        rank: of this process.
    """
    if steps is None:
        yield None
        return
    first, last = steps
    name = f"rank-{rank}-steps-{first}-{last}"

    def write(profile: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / f"{name}.json.gz"))
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        (folder / f"{name}.txt").write_text(table)

    # The step before is the profiler's own first, which is slow.
    schedule = torch.profiler.schedule(wait=first - 2, warmup=1, active=last - first + 1, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True) as profile:
        yield profile


def rates_of(metrics: Mapping[str, float]) -> str:
    """One line for a person: impressions a second, and the parts of a step's time."""
    rate = metrics["train/impressions_per_second"]
    whole = metrics["train/step_seconds"]
    prefix = "train/step_seconds/"
    shares = {n.removeprefix(prefix): v / whole for n, v in metrics.items() if n.startswith(prefix)}
    parts = " ".join(f"{n} {s:.0%}" for n, s in shares.items() if s >= 0.005)
    return f"{rate:,.0f} impressions/s ({parts})"
