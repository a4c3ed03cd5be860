"""Which tensors of a model are optimized: names, patterns, ties, and what cannot be a weight."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hybridopt.errors import SelectionError


@dataclass
class Named:
    """Tensors by name in order, tied ones once."""

    tensors: dict[str, Tensor]
    aliases: dict[str, str] = field(default_factory=dict)
    """Second and later names of a tied weight -> its first name."""
    groups: list[dict[str, Any]] | None = None
    """Torch parameter groups as given, with `params` replaced by names; None for other sources."""
    frozen: frozenset[str] = frozenset()
    """Names taken only when selected explicitly."""


def named_tensors(source: Any) -> Named:
    """Names and tensors of any accepted source; tied weights once, under their first name."""
    groups: list[dict[str, Any]] | None = None
    frozen: frozenset[str] = frozenset()
    pairs: list[tuple[str, Any]]
    if isinstance(source, nn.Module):
        pairs = list(source.named_parameters(remove_duplicate=False))
        frozen = frozenset(name for name, p in pairs if not p.requires_grad)
    elif isinstance(source, Tensor):
        pairs = [("x", source)]
    elif isinstance(source, Mapping) and "params" not in source:
        pairs = list(source.items())
    elif isinstance(source, Iterable) and not isinstance(source, str | bytes):
        items = [source] if isinstance(source, Mapping) else list(source)
        if items and all(isinstance(item, Mapping) for item in items):
            pairs, groups = _read_groups(items)
        elif items and all(_is_named_pair(item) for item in items):
            pairs = [(name, tensor) for name, tensor in items]
        else:
            pairs = [(str(i), item) for i, item in enumerate(items)]
    else:
        raise SelectionError(
            "weights: expected a torch.nn.Module, a tensor, a sequence or mapping of tensors, or torch parameter "
            f"groups, got {type(source).__name__}"
        )
    return _without_ties(pairs, groups, frozen)


def _is_named_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor)


def _read_groups(items: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, Any]], list[dict[str, Any]]]:
    pairs: list[tuple[str, Any]] = []
    groups: list[dict[str, Any]] = []
    for g, group in enumerate(items):
        if "params" not in group:
            raise SelectionError(
                f"parameter group {g}: expected a 'params' entry as in torch.optim, got keys {sorted(group)}"
            )
        params = group["params"]
        members = [params] if isinstance(params, Tensor) else list(params)
        named = [item if _is_named_pair(item) else (f"{g}.{i}", item) for i, item in enumerate(members)]
        pairs.extend(named)
        groups.append({**group, "params": [name for name, _ in named]})
    return pairs, groups


def _without_ties(
    pairs: list[tuple[str, Any]], groups: list[dict[str, Any]] | None, frozen: frozenset[str]
) -> Named:
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in pairs:
        if not isinstance(tensor, Tensor):
            raise SelectionError(f"weights: {name!r} is a {type(tensor).__name__}, expected a torch.Tensor")
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        elif name in tensors:
            raise SelectionError(f"weights: the name {name!r} is given twice for different tensors")
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return Named(tensors, aliases, groups, frozen)


def select_tensors(
    named: Named, select: str | Sequence[str] | Callable[[str, Tensor], bool] | None
) -> Named:
    """Keep what `select` names; check that each kept tensor can be a weight."""
    if select is None:
        chosen = [name for name in named.tensors if name not in named.frozen]
    elif callable(select):
        chosen = [name for name, t in named.tensors.items() if select(name, t)]
    else:
        patterns = [select] if isinstance(select, str) else list(select)
        owner = match_patterns(patterns, [*named.tensors, *named.aliases], "select")
        wanted = {named.aliases.get(name, name) for name in owner}
        chosen = [name for name in named.tensors if name in wanted]
    if not chosen:
        hint = ""
        if named.frozen and select is None:
            hint = "; all of them are frozen (requires_grad=False): name those you want with select="
        raise SelectionError(
            f"select: expected at least one weight, {select!r} leaves none of {_some(named.tensors)}{hint}"
        )
    tensors = {name: named.tensors[name] for name in chosen}
    for name, tensor in tensors.items():
        _check_weight(name, tensor)
    _check_memory(tensors)
    groups = named.groups
    if groups is not None:
        groups = [{**g, "params": [p for p in g["params"] if p in tensors]} for g in groups]
        groups = [g for g in groups if g["params"]]
    aliases = {alias: name for alias, name in named.aliases.items() if name in tensors}
    return Named(tensors, aliases, groups, named.frozen)


def match_patterns(patterns: Sequence[str], names: Sequence[str], what: str) -> dict[str, str]:
    """Map each matched name to the one pattern that matches it.

    Raises:
        SelectionError: a pattern matches nothing (the nearest names are shown), or two patterns match one name.
    """
    owner: dict[str, str] = {}
    for pattern in patterns:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise SelectionError(
                f"{what}: the pattern {pattern!r} matches no weight; "
                + (f"nearest names: {', '.join(near)}" if near else f"the names are {_some(names)}")
            )
        for name in matched:
            if name in owner:
                raise SelectionError(
                    f"{what}: the patterns {owner[name]!r} and {pattern!r} both match {name!r}; "
                    "make them disjoint, so that each weight is named once"
                )
            owner[name] = pattern
    return owner


def _some(names: Iterable[str], limit: int = 8) -> str:
    listed = list(names)
    more = f", … ({len(listed)} in all)" if len(listed) > limit else ""
    return "[" + ", ".join(listed[:limit]) + more + "]"


def _check_weight(name: str, tensor: Tensor) -> None:
    if tensor.is_complex():
        raise SelectionError(
            f"weights: {name!r} is complex ({tensor.dtype}); optimize torch.view_as_real of it instead"
        )
    if not tensor.is_floating_point():
        raise SelectionError(
            f"weights: {name!r} holds {tensor.dtype}; expected a floating dtype. Leave it out with select=, or "
            "optimize a floating tensor that the loss rounds"
        )
    if tensor.device.type == "meta":
        raise SelectionError(f"weights: {name!r} is on the meta device and has no values; materialise the model first")
    if tensor.layout is not torch.strided:
        raise SelectionError(f"weights: {name!r} has layout {tensor.layout}; expected a dense (strided) tensor")
    if tensor.requires_grad and not tensor.is_leaf:
        raise SelectionError(
            f"weights: {name!r} is computed from other tensors (not a leaf); optimize those, or pass it detached"
        )


def _check_memory(tensors: Mapping[str, Tensor]) -> None:
    """Refuse two weights that overlap in memory: writing one would silently change the other."""
    spans = []
    for name, t in tensors.items():
        if t.numel() == 0:
            continue
        start = t.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        if last + 1 != t.numel():
            if last + 1 < t.numel():
                raise SelectionError(
                    f"weights: {name!r} is an expanded view (several entries share one number); clone() it first"
                )
            continue  # strided view with gaps: spans say nothing about overlap
        spans.append((str(t.device), start, start + t.numel() * t.element_size(), name))
    spans.sort()
    for (dev_a, _, end, a), (dev_b, start, _, b) in zip(spans, spans[1:], strict=False):
        if dev_a == dev_b and start < end:
            raise SelectionError(
                f"weights: {a!r} and {b!r} share memory, so one cannot be changed without the other; select only one"
            )
