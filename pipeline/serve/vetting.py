"""Whether a program is a graph of tensor operations and nothing else, found out before torch loads it.

`torch.export.load` trusts its file: it evaluates the text of symbolic sizes as Python, resolves any attribute of torch
as the target of a call (`torch.hub.os.system` is one), unpickles what a configuration calls a pickle, and loads
machine code that lies in the same archive. Here every part of the archive is held against what our own export
writes. It is read by torch's reader, so that no other reading of the same bytes is loaded.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError

_GRAPH = "models/model.json"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_SAMPLE = "data/sample_inputs/model.pt"
_MEMBER = re.compile(
    r"models/model\.json|data/(weights/model_weights|constants/model_constants)_config\.json"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|data/sample_inputs/model\.pt"
    r"|archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)|\.format_version"
)
# Operations on tensors and on sizes. What reads or writes files has a name among its arguments, see _WORDS.
_TARGET = re.compile(
    r"torch\.ops\.(aten|fbgemm|prims)\.(?!.*__)[A-Za-z_]\w*\.[A-Za-z]\w*"
    r"|_operator\.(add|sub|mul|floordiv|mod|truediv|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|torch\.sym_(max|min|not|float|int|ite|sum)"
)
_NEVER = re.compile(r"torch\.ops\.aten\.(from_file|save|load|_?print|warn|Python\w*)\.\w+")
# The texts that operations of models take: kinds of padding, rounding, activation.
_WORDS = {"constant", "reflect", "replicate", "circular", "none", "tanh", "trunc", "floor"}
# Of torch.einsum: chd,hdD->chD.
_EQUATION = re.compile(r"[A-Za-z]{1,8}(,[A-Za-z]{1,8}){0,3}->[A-Za-z]{0,8}")
_NOT_PLAIN = {"as_graph", "as_graphs", "as_custom_obj", "as_operator", "as_complex"}
_SIZE = re.compile(
    r"(?:(?:Symbol|Integer|Add|Mul|FloorDiv|CeilDiv|CleanDiv|Mod|PythonMod|Max|Min|Eq|Ne|Le|Lt|Ge|Gt)\("
    r"|\)|, |-?\d{1,19}|'[su]\d{1,9}'|(?:positive|integer|nonnegative|negative)=(?:True|False))*"
)
_LONGEST_SIZE = 4000
_GUARD = re.compile(r"(?:L\['inputs'\]|\['\w+'\]|\.size\(\)\[\d+\]|\d{1,19}|[ ()]|//|[=!<>]=|[<>+*%-]|and |or |not )*")
_SPEC_TYPES = {None, "builtins.dict", "builtins.tuple", "builtins.list"}


def vet_program(path: Path) -> None:
    """Check that loading and running a program runs no code but the operations of its graph.

    Args:
        path: of `model.pt2`.

    Raises:
        ArtifactError: it is no program of ours; the message names the part that is not.
    """
    members = _members(path)
    for name in _CONFIGS:
        if name in members:
            _vet_config(path, name, _json(path, name, members[name]))
    if _GRAPH not in members:
        raise ArtifactError(f"{path} cannot be loaded by torch: it holds no {_GRAPH}; export the artifact anew")
    program = _json(path, _GRAPH, members[_GRAPH])
    for problem in _problems(program):
        raise ArtifactError(f"{path} is no graph of tensor operations and is not loaded: {problem}")


def _members(path: Path) -> dict[str, bytes]:
    """Descriptions in the archive, as torch reads it; two readers must agree on what it consists of."""
    from torch.export.pt2_archive._package import PT2ArchiveReader

    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as error:
        raise ArtifactError(f"{path} is damaged: {error}; export the artifact anew") from error
    try:
        reader = PT2ArchiveReader(str(path))
        names = reader.get_file_names()
        content = {n: reader.read_bytes(n) for n in names if n.endswith(".json") or n == _SAMPLE}
    except (RuntimeError, ValueError, OSError, AssertionError) as error:  # what torch's reader raises
        raise ArtifactError(f"{path} cannot be loaded by torch: {error}; export the artifact anew") from error
    folders = {name.partition("/")[0] for name in listed}
    if len(folders) > 1 or sorted(n.partition("/")[2] for n in listed) != sorted(names):
        raise ArtifactError(f"{path} cannot be loaded by torch: it is no archive of one program")
    if len(set(names)) < len(names):
        raise ArtifactError(f"{path} holds a part twice and is not loaded")
    for name in names:
        if not _MEMBER.fullmatch(name):
            raise ArtifactError(f"{path} holds {name!r}, which no program of ours does, and is not loaded")
    if content.get(_SAMPLE):
        raise ArtifactError(f"{path} holds a pickle ({_SAMPLE}) and is not loaded")
    return content


def _json(path: Path, name: str, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {name} is no JSON ({error}); export the artifact anew") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is damaged: {name} is no JSON object; export the artifact anew")
    return content


def _vet_config(path: Path, name: str, content: dict[str, Any]) -> None:
    """Weights lie as plain bytes, in this archive."""
    config = content.get("config")
    if set(content) != {"config"} or not isinstance(config, dict):
        raise ArtifactError(f"{path} is damaged: {name} is no list of weights; export the artifact anew")
    for weight, entry in config.items():
        plain = isinstance(entry, dict) and entry.get("use_pickle") is False
        if not plain or not re.fullmatch(r"(weight|tensor)_\d+", str(entry.get("path_name"))):
            raise ArtifactError(f"{path} holds a pickle ({weight!r} of {name}) and is not loaded")


def _problems(program: dict[str, Any]) -> Iterator[str]:
    """What in a program's description is no operation on tensors or sizes."""
    for guard in program.get("guards_code") or ():
        if not isinstance(guard, str) or not _GUARD.fullmatch(guard):
            yield f"the guard {guard!r:.80}"
    for symbol in program.get("range_constraints") or ():
        if not re.fullmatch(r"[su]\d{1,9}", symbol):
            yield f"the size {symbol!r:.80}"
    graph = program.get("graph_module")
    if not isinstance(graph, dict) or graph.get("treespec_namedtuple_fields"):
        yield "named tuples"
    yield from _walk(program)


def _walk(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for entry in value:
            yield from _walk(entry)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _field(name, entry)
            yield from _walk(entry)


def _field(name: str, value: Any) -> Iterator[str]:
    match name:
        case "expr_str" if not isinstance(value, str) or len(value) > _LONGEST_SIZE or not _SIZE.fullmatch(value):
            yield f"the size {value!r:.80}"
        case "target" if not isinstance(value, str | dict | None):
            yield f"the operation {value!r:.80}"
        case "target" if isinstance(value, str) and (not _TARGET.fullmatch(value) or _NEVER.fullmatch(value)):
            yield f"the operation {value!r:.80}"
        case "as_string" if value not in _WORDS and not _EQUATION.fullmatch(str(value)):
            yield f"the text {value!r:.80}"
        case "as_strings" if value:
            yield f"the texts {value!r:.80}"
        case "in_spec" | "out_spec" if value and not _is_plain_spec(value):
            yield f"the structure {value!r:.80}"
        case _ if name in _NOT_PLAIN and value is not None:
            yield f"an argument {name}"


def _is_plain_spec(text: Any) -> bool:
    """Whether a structure of arguments consists of tuples, lists and dictionaries by name."""
    try:
        version, spec = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return False
    return version == 1 and _is_plain(spec)


def _is_plain(spec: Any) -> bool:
    if not isinstance(spec, dict) or set(spec) != {"type", "context", "children_spec"}:
        return False
    if not isinstance(spec["children_spec"], list) or spec["type"] not in _SPEC_TYPES:
        return False
    try:
        context = json.loads(spec["context"]) if spec["context"] is not None else None
    except (ValueError, TypeError, RecursionError):
        return False
    keys = context if isinstance(context, list) else [] if context is None else [None]
    return all(isinstance(k, str) for k in keys) and all(_is_plain(c) for c in spec["children_spec"])
