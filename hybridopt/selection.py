"""Which tensors of a model are optimized: names, patterns, ties, and what cannot be a weight."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
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
    """Names and tensors of any accepted source; tied weights once, under their first name.

    A mapping with a `"params"` entry that is a tensor is a mapping of tensors, otherwise one parameter group.
    """
    groups: list[dict[str, Any]] | None = None
    pairs: list[tuple[str, Any]]
    if isinstance(source, nn.Module):
        pairs = list(source.named_parameters(remove_duplicate=False))
    elif isinstance(source, Tensor):
        return Named({"x": source})
    elif isinstance(source, Mapping) and not is_group(source):
        pairs = list(source.items())
    elif isinstance(source, Iterable) and not isinstance(source, str | bytes | Set):
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
            + ("; the loss comes first, then the model" if callable(source) else "")
        )
    return _without_ties(pairs, groups)


def is_group(source: Mapping[str, Any]) -> bool:
    """Whether a mapping is a torch parameter group rather than tensors by name."""
    return "params" in source and not isinstance(source["params"], Tensor)


def _is_named_pair(item: Any) -> bool:
    return (
        isinstance(item, tuple)
        and len(item) == 2
        and isinstance(item[0], str)
        and isinstance(item[1], Tensor)
    )


def _read_groups(items: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, Any]], list[dict[str, Any]]]:
    pairs: list[tuple[str, Any]] = []
    groups: list[dict[str, Any]] = []
    home: dict[int, int] = {}  # id of a tensor -> its group
    for g, group in enumerate(items):
        if "params" not in group:
            raise SelectionError(
                f"parameter group {g}: expected a 'params' entry as in torch.optim, got keys {sorted(group)}"
            )
        params = group["params"]
        members = [params] if isinstance(params, Tensor) else list(params)
        given = group.get("param_names", ())  # as in the groups of a torch optimizer made of named parameters
        names = list(given) if len(given) == len(members) else [f"{g}.{i}" for i in range(len(members))]
        named: list[Any] = [
            item if _is_named_pair(item) else (name, item) for name, item in zip(names, members, strict=True)
        ]
        for name, tensor in named:
            if home.setdefault(id(tensor), g) != g:
                raise SelectionError(
                    f"parameter groups: {name!r} is in group {home[id(tensor)]} and again in group {g}; a weight can "
                    "have the options of one group only"
                )
        pairs.extend(named)
        options = {k: v for k, v in group.items() if k != "param_names"}
        groups.append({**options, "params": [name for name, _ in named]})
    return pairs, groups


def _without_ties(pairs: list[tuple[str, Any]], groups: list[dict[str, Any]] | None) -> Named:
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in pairs:
        if not isinstance(name, str):
            raise SelectionError(f"weights: expected names as keys, got {name!r}")
        if not isinstance(tensor, Tensor):
            raise SelectionError(f"weights: {name!r} is a {type(tensor).__name__}, expected a torch.Tensor")
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        elif name in tensors:
            raise SelectionError(f"weights: the name {name!r} is given twice for different tensors")
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    frozen = frozenset(
        name for name, t in tensors.items() if isinstance(t, nn.Parameter) and not t.requires_grad
    )
    return Named(tensors, aliases, groups, frozen)


def select_tensors(named: Named, select: str | Sequence[str] | Callable[[str, Tensor], bool] | None) -> Named:
    """Keep what `select` names; check that each kept tensor can be a weight."""
    if select is None:
        chosen = [name for name in named.tensors if name not in named.frozen]
    elif isinstance(select, nn.Module | Tensor):
        raise SelectionError(
            f"select: expected a name pattern, several, or a predicate (name, tensor) -> bool, got a "
            f"{type(select).__name__}; write its name, e.g. select='head.*'"
        )
    elif callable(select):
        chosen = [name for name, t in named.tensors.items() if select(name, t)]
    else:
        if not isinstance(select, Iterable):
            raise SelectionError(
                f"select: expected a pattern, several, or a predicate (name, tensor) -> bool, got {select!r}"
            )
        patterns = [select] if isinstance(select, str) else list(select)
        owner = match_patterns(patterns, [*named.tensors, *named.aliases], "select")
        wanted = {named.aliases.get(name, name) for name in owner}
        chosen = [name for name in named.tensors if name in wanted]
    if not chosen:
        hint = ""
        if select is None and named.frozen:
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
        if not isinstance(pattern, str):
            raise SelectionError(f"{what}: expected patterns for names, got {pattern!r}")
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


def spread_patterns(
    values: Mapping[str, Any], names: Sequence[str], aliases: Mapping[str, str], what: str
) -> dict[str, str]:
    """Map each weight's first name to the one pattern of `values` that matches it, or a second name of it.

    Raises:
        SelectionError: as `match_patterns`; also if two patterns reach one tied weight under two names.
    """
    owner: dict[str, str] = {}
    for name, pattern in match_patterns(list(values), [*names, *aliases], what).items():
        weight = aliases.get(name, name)
        if owner.setdefault(weight, pattern) != pattern:
            raise SelectionError(
                f"{what}: the patterns {owner[weight]!r} and {pattern!r} both match {weight!r} (tied to "
                f"{name!r}); make them disjoint, so that each weight is named once"
            )
    return owner


def choose_weights(which: Any, named: Named, what: str) -> npt.NDArray[np.bool_] | None:
    """Which weights of the selected tensors are meant, shape (n,); None where it is none of them.

    Args:
        which: None; True = all; a pattern, several, or a predicate `(name, tensor) -> bool`, for whole tensors; or a
            bool array of shape (n,).

    Raises:
        SelectionError: it is something else, or as `match_patterns`.
    """
    sizes = {name: t.numel() for name, t in named.tensors.items()}
    n = sum(sizes.values())
    if which is None:
        return None
    if which is True:
        chosen: set[str] = set(sizes)
    elif isinstance(which, str) or (
        isinstance(which, list | tuple) and all(isinstance(p, str) for p in which)
    ):
        patterns = [which] if isinstance(which, str) else which
        chosen = set(spread_patterns(dict.fromkeys(patterns), list(sizes), named.aliases, what))
    elif callable(which):
        chosen = {name for name, tensor in named.tensors.items() if which(name, tensor)}
    else:
        mask = np.array(which)
        if mask.shape != (n,) or mask.dtype != np.bool_:
            raise SelectionError(
                f"{what}: expected True, patterns for names, a predicate, or a bool array of shape ({n},), got "
                f"{which!r}"
            )
        return mask if mask.any() else None
    parts = [np.full(size, name in chosen) for name, size in sizes.items()]
    return np.concatenate(parts) if chosen else None


def _some(names: Iterable[str], limit: int = 8) -> str:
    listed = list(names)
    more = f", … ({len(listed)} in all)" if len(listed) > limit else ""
    return "[" + ", ".join(listed[:limit]) + more + "]"


_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _check_weight(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise SelectionError(
            f"weights: {name!r} is not initialized (a lazy module); call the model once with a dummy batch first"
        )
    if tensor.is_complex():
        raise SelectionError(
            f"weights: {name!r} is complex ({tensor.dtype}); optimize torch.view_as_real of it instead"
        )
    if not tensor.is_floating_point():
        raise SelectionError(
            f"weights: {name!r} holds {tensor.dtype}; expected a floating dtype. Leave it out with select=, or "
            "optimize a floating tensor that the loss rounds"
        )
    if tensor.dtype not in _DTYPES:
        raise SelectionError(
            f"weights: {name!r} holds {tensor.dtype}; expected one of {', '.join(map(str, _DTYPES))}. Optimize a "
            "wider copy that the loss casts"
        )
    if tensor.device.type == "meta":
        raise SelectionError(
            f"weights: {name!r} is on the meta device and has no values; materialise the model first"
        )
    if tensor.layout is not torch.strided:
        raise SelectionError(
            f"weights: {name!r} has layout {tensor.layout}; expected a dense (strided) tensor"
        )
    if tensor.is_inference():
        raise SelectionError(
            f"weights: {name!r} was made under torch.inference_mode and cannot be written; clone() it outside"
        )
    if tensor.requires_grad and not tensor.is_leaf:
        raise SelectionError(
            f"weights: {name!r} is computed from other tensors (not a leaf); optimize those, or pass it detached"
        )


class _Span(NamedTuple):
    """The bytes from a tensor's first entry to its last one; with gaps between entries unless `dense`."""

    device: str
    start: int
    end: int
    dense: bool
    name: str
    tensor: Tensor


def _check_memory(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that overlap in memory: writing one would silently change the other.

    Looks at the first and last address of each tensor; single addresses are compared (8 bytes an entry) only
    where a view has gaps.
    """
    spans = []
    for name, t in tensors.items():
        if t.numel() == 0:
            continue
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        dense = last + 1 == t.numel()
        if not dense and len(np.unique(_addresses(t))) < t.numel():
            raise SelectionError(
                f"weights: {name!r} is an expanded view (several entries share one number); clone() it first"
            )
        start = t.data_ptr()
        spans.append(_Span(str(t.device), start, start + (last + 1) * t.element_size(), dense, name, t))
    spans.sort(key=lambda span: span[:3])
    active: list[_Span] = []
    for span in spans:
        active = [other for other in active if other.device == span.device and other.end > span.start]
        for other in active:
            if _overlap(other, span):
                raise SelectionError(
                    f"weights: {other.name!r} and {span.name!r} share memory, so one cannot be changed without the "
                    "other; select only one"
                )
        active.append(span)


def _overlap(a: _Span, b: _Span) -> bool:
    """Whether two tensors whose spans overlap have a byte in common."""
    if a.dense and b.dense:
        return True
    unit = min(a.tensor.element_size(), b.tensor.element_size())
    return bool(np.isin(_addresses(a.tensor, unit), _addresses(b.tensor, unit)).any())


def _addresses(tensor: Tensor, unit: int | None = None) -> npt.NDArray[np.int64]:
    """The addresses of all entries, in bytes; of every `unit` bytes of them, if given."""
    size = tensor.element_size()
    found = np.zeros((), dtype=np.int64)
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = np.add.outer(found, np.arange(length, dtype=np.int64) * (stride * size))
    return np.add.outer(found, tensor.data_ptr() + np.arange(0, size, unit or size, dtype=np.int64)).ravel()
