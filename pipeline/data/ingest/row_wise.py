"""Whether an expression of a spec has a value for a row by itself, so that rows may be evaluated in any batches.

Polars' own `is_row_separable` says yes to `a - avg(a)` and fails on `a // 2` (2.1), so the tree of the expression
is compared with what is known to look at one row. What is not known counts as looking at more.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import polars as pl

_FAMILIES = {"StringExpr": {"ConcatVertical"}, "ListExpr": set(), "TemporalExpr": set(), "Sql": set()}
_FAMILIES["Boolean"] = {"Any", "All", "IsUnique", "IsDuplicated", "IsFirstDistinct", "IsLastDistinct"}
_PLAIN = {"Abs", "Negate", "Coalesce", "FillNull", "MaxHorizontal", "MinHorizontal", "Round", "Floor", "Ceil", "Sign"}
_PLAIN |= {"Pow", "Log", "Log1p", "Exp", "Clip", "Replace", "ReplaceStrict", "Trigonometry", "Bitwise"}


def is_row_wise(expression: str) -> bool:
    """Whether the value of a row depends on that row alone, as far as is known.

    >>> [is_row_wise(e) for e in ("a // 2", "a IN (1, 2)", "a - avg(a)", "count(*)", "row_number() OVER ()")]
    [True, True, False, False, False]
    """
    try:
        meta = pl.sql_expr(expression).meta
    except pl.exceptions.PolarsError:
        return True  # a column's name that is no SQL; reading the file says if it is neither
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the format is not stable: what is new in it counts as not known
        tree = json.loads(meta.serialize(format="json"))
    return _expression(tree)


def _expression(node: Any) -> bool:
    if not isinstance(node, dict) or len(node) != 1:
        return False
    ((kind, body),) = node.items()
    if kind in ("Column", "Literal"):
        return True
    if kind == "Alias":
        return _expression(body[0])
    if not isinstance(body, dict):
        return False
    inner = {"BinaryExpr": ("left", "right"), "Cast": ("expr",), "Ternary": ("predicate", "truthy", "falsy")}
    if kind in inner:
        return all(_expression(body.get(name)) for name in inner[kind])
    return kind == "Function" and all(map(_expression, body.get("input", [None]))) and _function(body.get("function"))


def _function(node: Any) -> bool:
    name, how = next(iter(node.items())) if isinstance(node, dict) and len(node) == 1 else (node, None)
    if isinstance(node, dict) and len(node) > 1:  # a function's name and its options
        name = next(iter(node))
    if name in _FAMILIES:
        member = next(iter(how)) if isinstance(how, dict) and how else how
        return str(member) not in _FAMILIES[name]
    return name in _PLAIN
