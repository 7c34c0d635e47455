"""An artifact's program as something to call: the exported graph, or its compiled form, with weights that can change.

A program is immutable: `with_tensors` gives another one that shares what has not changed, so whoever holds the old one
goes on with the old weights to the end of its call.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from pipeline.errors import ArtifactError
from pipeline.serve.artifact import COMPILED, MODEL
from pipeline.serve.signature import Signature


class Program(Protocol):
    """Named tensors to probabilities [C, T]. Threads may share one."""

    @property
    def device(self) -> torch.device:
        """Where inputs must lie."""

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Probabilities, float32 [C, T]."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Tables and dense weights by name; not to be written to."""

    def with_tensors(self, changed: Mapping[str, Tensor]) -> Program:
        """The same program with other values of some tensors; this one stays as it is."""


class GraphProgram:
    """The bare graph: `ExportedProgram.module()` checks input bounds by algebra at every call (10 ms).

    Args:
        graph: of an exported program.
        inputs: names, in order.
        weights: tables and dense weights by name, in the order of the graph's arguments.
    """

    def __init__(self, graph: nn.Module, inputs: Sequence[str], weights: Mapping[str, Tensor]) -> None:
        self._graph, self._inputs, self._weights = graph, tuple(inputs), dict(weights)

    @property
    def device(self) -> torch.device:
        return next(iter(self._weights.values())).device

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._graph(*self._weights.values(), *(tensors[name] for name in self._inputs))[0]

    def tensors(self) -> Mapping[str, Tensor]:
        return self._weights

    def with_tensors(self, changed: Mapping[str, Tensor]) -> GraphProgram:
        device = self.device
        moved = {name: tensor.to(device) for name, tensor in changed.items()}
        return GraphProgram(self._graph, self._inputs, self._weights | moved)


class CompiledProgram:
    """Native code made by AOTInductor. Other weights take another instance of the same code.

    Args:
        package: the compiled package.
        model: the exported program beside it, which names the weights.
        inputs: names, in order.
        weights: in place of those in the package; it uses these very tensors.
    """

    def __init__(
        self, package: Path, model: Path, inputs: Sequence[str], weights: Mapping[str, Tensor] | None = None
    ) -> None:
        from torch._inductor.package import load_package

        self._package, self._model, self._inputs = package, model, tuple(inputs)
        # So many calls may run at once; further ones wait for one to end.
        compiled = load_package(str(package), num_runners=os.cpu_count() or 1)
        self._run = compiled.loader.boxed_run
        self._weights = weights
        if weights is not None:
            mine = {name: weights[name] for name in compiled.get_constant_fqns() if name in weights}
            compiled.load_constants(mine, check_full_update=True, user_managed=True)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._run([tensors[name] for name in self._inputs])[0]

    def tensors(self) -> Mapping[str, Tensor]:
        if self._weights is None:
            self._weights = _weights(torch.export.load(self._model))
        return self._weights

    def with_tensors(self, changed: Mapping[str, Tensor]) -> CompiledProgram:
        weights = {**self.tensors(), **{name: tensor.contiguous() for name, tensor in changed.items()}}
        return CompiledProgram(self._package, self._model, self._inputs, weights)


def load_program(
    folder: Path, signature: Signature, *, device: torch.device | None = None, compiled: bool = True
) -> Program:
    """The program of a checked artifact, compiled where it holds compiled code and `device` is the CPU.

    Args:
        folder: of the artifact.
        signature: of the artifact.
        device: where to run; None is the CPU. Compiled code is for the CPU alone.
        compiled: take compiled code where there is some.

    Raises:
        ArtifactError: this version of torch cannot load it, or it is not the program that the signature describes.
    """
    import torchrec.sparse.jagged_tensor  # noqa: F401  registers the fbgemm operators

    names = [i.name for i in signature.inputs]
    device = device or torch.device("cpu")
    try:
        if compiled and device.type == "cpu" and (folder / COMPILED).is_file():
            return CompiledProgram(folder / COMPILED, folder / MODEL, names)
        program = torch.export.load(folder / MODEL)
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
            # The pass changes the graph and leaves the code that was made of it, with checks that inputs lie on a CPU.
            program.graph_module.recompile()
    except Exception as error:
        raise ArtifactError(f"{folder / MODEL} cannot be loaded by torch {torch.__version__}: {error}") from error
    inputs = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    if inputs != [f"inputs_{name}" for name in names]:
        raise ArtifactError(f"the program takes {inputs}, the signature names {names}")
    return GraphProgram(program.graph_module, names, _weights(program))


def _weights(program: ExportedProgram) -> dict[str, Tensor]:
    """Everything that the graph takes beside its inputs, in order."""
    found: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT:
            name = str(spec.target)
            found[name] = (program.state_dict if name in program.state_dict else program.constants)[name].detach()
    return found
