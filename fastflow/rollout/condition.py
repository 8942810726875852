"""Conditioning as a pytree with one entry per prompt, gathered for the rows of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..transfer import upload


@dataclass(frozen=True)
class Shared:
    """A part of the conditioning that passes to the network as it is, whatever the rows."""

    value: Any


def tree_map(function: Callable[[str, Any], Any], tree: Any, path: str) -> Any:
    """The tree with function(path, leaf) at its leaves. Dicts and tuples are inner nodes; lists are leaves."""
    if isinstance(tree, dict):
        return {key: tree_map(function, value, f"{path}[{key!r}]") for key, value in tree.items()}
    if isinstance(tree, tuple):
        parts = [tree_map(function, value, f"{path}[{i}]") for i, value in enumerate(tree)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return function(path, tree)


def leaves(tree: Any, path: str = "condition") -> list[tuple[str, Any]]:
    """(path, leaf) of all leaves, in order."""
    found: list[tuple[str, Any]] = []
    tree_map(lambda path, value: found.append((path, value)), tree, path)
    return found


def check(tree: Any, prompts: int | None, name: str, *, broadcast: bool = False) -> None:
    """Every entry is one per prompt (or, with broadcast, one for all). Raises ValueError or TypeError naming the entry.

    prompts: how many there are; None: what no entry says, so only their kinds are checked.
    """

    def leaf(path: str, value: Any) -> None:
        if value is None or isinstance(value, Shared):
            return
        if isinstance(value, Tensor):
            if not value.dim():
                raise ValueError(f"{path}: wanted a tensor [P, ...], got a 0-dim one; ff.Shared(x) passes x as it is")
            size = value.shape[0]
        elif isinstance(value, list):
            size = len(value)
        else:
            raise TypeError(
                f"{path}: wanted a tensor [P, ...], a list of P entries, None or ff.Shared(value), got {type(value).__name__}"
            )
        if prompts is not None and size != prompts and not (broadcast and size == 1):
            wanted = f"{prompts} (one per prompt)" + (" or 1" if broadcast else "")
            raise ValueError(f"{path}: wanted {wanted} on axis 0, got {size}; ff.Shared(x) passes x as it is")

    tree_map(leaf, tree, name)


def check_rows(tree: Any, rows: int, name: str) -> None:
    """Every tensor and list has one entry per row of a call. Raises ValueError naming the entry."""

    def leaf(path: str, value: Any) -> None:
        size = len(value) if isinstance(value, list) or (isinstance(value, Tensor) and value.dim()) else rows
        if size != rows:
            raise ValueError(
                f"{path}: wanted {rows} entries, one per row of sample, got {size}; gather them by prompt_index"
            )

    tree_map(leaf, tree, name)


def prompts_of(tree: Any, name: str) -> int | None:
    """The number of prompts that the tree's first entry names; None if it has none."""
    sizes: list[int] = []

    def leaf(path: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.dim():
            sizes.append(value.shape[0])
        elif isinstance(value, list):
            sizes.append(len(value))

    tree_map(leaf, tree, name)
    return sizes[0] if sizes else None


def gather(tree: Any, index: Tensor, places: Tensor | None = None) -> Any:
    """The entries of prompts `index` (int64 [N], CPU): tensors by rows of axis 0, lists by position.

    An entry that serves all prompts is copied for every row too, so that the network sees one kind of strides.
    places: the same index on a device, so that nothing is copied there.
    """
    on_device: dict[torch.device, Tensor] = {index.device: index}
    if places is not None:
        on_device[places.device] = places

    def leaf(path: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.shape[0] == 1:
                return value.expand(index.shape[0], *value.shape[1:]).clone(memory_format=torch.contiguous_format)
            if value.device not in on_device:
                on_device[value.device] = upload(index, value.device)
            return value.index_select(0, on_device[value.device])
        if isinstance(value, list):
            return [value[0] if len(value) == 1 else value[i] for i in index.tolist()]
        return value

    return tree_map(leaf, tree, "condition")


def one_entry(tree: Any, name: str) -> Any:
    """The tree with one entry of zeros where it has none: what the dummy rows of an empty rank see.

    Raises ValueError for an empty list, whose entries nobody can guess.
    """

    def leaf(path: str, value: Any) -> Any:
        if isinstance(value, list) and not value:
            raise ValueError(
                f"{path}: wanted at least one entry, also on a rank without samples, got []; give any prompt's"
            )
        return value.new_zeros(1, *value.shape[1:]) if isinstance(value, Tensor) and not len(value) else value

    return tree_map(leaf, tree, name)


def unwrap(tree: Any) -> Any:
    """The tree as the network gets it: tensors with the strides of fresh ones, Shared parts as their value."""

    def leaf(path: str, value: Any) -> Any:
        if isinstance(value, Shared):
            return value.value
        return plain(value) if isinstance(value, Tensor) else value

    return tree_map(leaf, tree, "condition")


def plain(tensor: Tensor) -> Tensor:
    """The tensor with the strides of a fresh one, also on axes of size 1: a compiled network knows its inputs by them."""
    fresh = [1]
    for size in reversed(tensor.shape[1:]):
        fresh.append(fresh[-1] * max(size, 1))
    if tensor.stride() == tuple(reversed(fresh[: tensor.dim()])):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def concatenate(first: Any, second: Any, path: str = "condition") -> Any:
    """Rows of `first` (negative), then rows of `second`. Raises ValueError where entries cannot share a call."""
    if isinstance(first, dict) and isinstance(second, dict):
        if first.keys() != second.keys():
            raise ValueError(
                f"{path}, negative: wanted the same entries in both, got {sorted(second)} in {path} and {sorted(first)} in "
                "negative"
            )
        return {key: concatenate(first[key], second[key], f"{path}[{key!r}]") for key in first}
    if isinstance(first, tuple) and isinstance(second, tuple):
        if len(first) != len(second):
            raise ValueError(f"negative: wanted the {len(second)} entries of {path}, got {len(first)}")
        parts = [concatenate(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(first, second, strict=True))]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape[1:] != second.shape[1:]:
            raise ValueError(
                f"negative: wanted the shape of {path}, [N, {', '.join(map(str, second.shape[1:]))}], to share a call, got "
                f"[N, {', '.join(map(str, first.shape[1:]))}]; use ff.CFG(..., calls=2)"
            )
        return torch.cat([first, second])
    if isinstance(first, list) and isinstance(second, list):
        return [*first, *second]
    if not _one_value(first, second):
        if _kind(first) != _kind(second):
            raise ValueError(
                f"negative: wanted {_kind(second)} at {path}, as the condition has, to share a call, got {_kind(first)}; "
                "use ff.CFG(..., calls=2)"
            )
        raise ValueError(
            f"negative: wanted at {path} the same {_kind(second)} for both halves of a call, got another; "
            "use ff.CFG(..., calls=2)"
        )
    return first


def check_pair(negative: Any, condition: Any) -> None:
    """Raises what `concatenate` would raise for rows of the two, without a row of either."""

    def no_rows(path: str, value: Any) -> Any:
        return value[:0] if isinstance(value, (Tensor, list)) else value

    concatenate(tree_map(no_rows, negative, "negative"), tree_map(no_rows, condition, "condition"))


def _one_value(first: Any, second: Any) -> bool:
    """Whether one part that is not gathered serves both halves of a call."""
    if not (isinstance(first, Shared) and isinstance(second, Shared)):
        return first is None and second is None
    simple = isinstance(first.value, (str, int, float, bool)) and type(first.value) is type(second.value)
    return first.value is second.value or (simple and first.value == second.value)


def _kind(value: Any) -> str:
    return f"ff.Shared({type(value.value).__name__})" if isinstance(value, Shared) else type(value).__name__
