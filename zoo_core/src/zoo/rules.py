"""Key tables: how an original's state dict and ours name and store the same weights, as data that runs both ways.

An adapter writes its table once; :meth:`Rules.to_zoo` reads the original's checkpoints with it and
:meth:`Rules.to_reference` writes them again::

    rules = Rules(
        Rename("layers.{i}.mixer.norm.weight", "blocks.{i}.norm.weight"),
        Rename("layers.{i}.mixer.out_proj.weight", "blocks.{i}.out", Transpose(0, 1)),
        Stack(["layers.{i}.mixer.A_log", "layers.{i}.mixer.A_b_log"], "blocks.{i}.scan.A_log"),
        Concat(["attn.{i}.q.weight", "attn.{i}.k.weight"], "attn.{i}.qk.weight", sizes=[64, 32]),
        Tied("embedding.weight", "lm_head.weight"),
        Drop("{rest:*}.num_batches_tracked"),
    )
    ours = rules.to_zoo(original_state)
    assert rules.to_reference(ours).keys() == original_state.keys()

Patterns are whole keys. ``{name}`` stands for one part of a key (no dot, no slash), ``{name:d}`` for digits,
``{name:*}`` for anything; the same names appear on both sides. Rules are tried in order and the first that matches
takes the key; a key that no rule matches keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = [
    "Apply",
    "Concat",
    "Drop",
    "Permute",
    "Rename",
    "Reshape",
    "Rules",
    "Scale",
    "Split",
    "Squeeze",
    "Stack",
    "Tied",
    "Transpose",
    "Unsqueeze",
    "Unstack",
]

Fields = dict[str, str]
State = dict[str, Tensor]


class _Pattern:
    """A key with named gaps, matched against keys and filled with the values that were found."""

    _GAP = re.compile(r"\{(\w+)(?::([d*]))?\}")
    _KINDS: ClassVar[dict[str | None, str]] = {None: r"[^./]+", "d": r"\d+", "*": r".+"}

    def __init__(self, text: str, kinds: Mapping[str, str | None] | None = None) -> None:
        self.text = text
        self.names: list[str] = []
        #: what each name stands for; one side of a rule may leave it to the other to say
        self.kinds: dict[str, str | None] = {n: k for n, k in self._GAP.findall(text) if k} | dict(kinds or {})
        expression, position = "", 0
        for gap in self._GAP.finditer(text):
            name = gap[1]
            expression += re.escape(text[position : gap.start()])
            if name in self.names:
                expression += f"(?P={name})"
            else:
                expression += f"(?P<{name}>{self._KINDS[self.kinds.get(name)]})"
                self.names.append(name)
            position = gap.end()
        self._expression = re.compile(expression + re.escape(text[position:]))

    def match(self, key: str) -> Fields | None:
        found = self._expression.fullmatch(key)
        return found.groupdict() if found else None

    def fill(self, fields: Mapping[str, str]) -> str:
        return self._GAP.sub(lambda gap: fields[gap.group(1)], self.text)


# -- what happens to one tensor on the way ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Transpose:
    """Swap two axes."""

    first: int = 0
    second: int = 1

    def to_zoo(self, x: Tensor) -> Tensor:
        return x.transpose(self.first, self.second)

    to_reference = to_zoo


@dataclass(frozen=True)
class Permute:
    """Our axis i is the original's axis ``axes[i]``."""

    axes: tuple[int, ...]

    def to_zoo(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)

    def to_reference(self, x: Tensor) -> Tensor:
        return x.permute([self.axes.index(i) for i in range(len(self.axes))])


@dataclass(frozen=True)
class Reshape:
    """Our shape and the original's; each may hold one -1. A callable gets the tensor's shape, returns the new one."""

    zoo: Sequence[int] | Callable[[torch.Size], Sequence[int]]
    reference: Sequence[int] | Callable[[torch.Size], Sequence[int]]

    def to_zoo(self, x: Tensor) -> Tensor:
        return x.reshape(tuple(self.zoo(x.shape) if callable(self.zoo) else self.zoo))

    def to_reference(self, x: Tensor) -> Tensor:
        return x.reshape(tuple(self.reference(x.shape) if callable(self.reference) else self.reference))


@dataclass(frozen=True)
class Squeeze:
    """The original has an axis of size 1 that we do not have."""

    axis: int

    def to_zoo(self, x: Tensor) -> Tensor:
        if x.shape[self.axis] != 1:
            raise ValueError(f"axis {self.axis} of a tensor of shape {tuple(x.shape)} is not of size 1")
        return x.squeeze(self.axis)

    def to_reference(self, x: Tensor) -> Tensor:
        return x.unsqueeze(self.axis)


@dataclass(frozen=True)
class Unsqueeze:
    """We have an axis of size 1 that the original does not have."""

    axis: int

    def to_zoo(self, x: Tensor) -> Tensor:
        return Squeeze(self.axis).to_reference(x)

    def to_reference(self, x: Tensor) -> Tensor:
        return Squeeze(self.axis).to_zoo(x)


@dataclass(frozen=True)
class Scale:
    """Ours is the original's times ``factor``."""

    factor: float

    def to_zoo(self, x: Tensor) -> Tensor:
        return x * self.factor

    def to_reference(self, x: Tensor) -> Tensor:
        return x / self.factor


@dataclass(frozen=True)
class Apply:
    """Any pair of inverse functions of a tensor; the last resort."""

    to_zoo: Callable[[Tensor], Tensor]
    to_reference: Callable[[Tensor], Tensor]


# -- what happens to a group of keys ---------------------------------------------------------------------------------


class Rule:
    """Groups of keys on the original's side (``theirs``) and on ours; either side may be several patterns."""

    theirs: tuple[_Pattern, ...] = ()
    ours: tuple[_Pattern, ...] = ()

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        return parts

    def backward(self, parts: list[Tensor]) -> list[Tensor]:
        return parts

    def nested(self, reference: str, zoo: str) -> Rule:
        raise NotImplementedError


def _patterns(texts: str | Iterable[str]) -> tuple[_Pattern, ...]:
    return tuple(_Pattern(t) for t in ([texts] if isinstance(texts, str) else texts))


def _prefixed(patterns: Iterable[_Pattern], prefix: str) -> tuple[_Pattern, ...]:
    return tuple(_Pattern(prefix + p.text, p.kinds) for p in patterns)


class _Group(Rule):
    def __init__(self, theirs: str | Iterable[str], ours: str | Iterable[str], ops: tuple[Any, ...] = ()) -> None:
        self.theirs, self.ours, self.ops = _patterns(theirs), _patterns(ours), ops
        kinds = {name: kind for p in (*self.theirs, *self.ours) for name, kind in p.kinds.items()}
        self.theirs = tuple(_Pattern(p.text, kinds) for p in self.theirs)
        self.ours = tuple(_Pattern(p.text, kinds) for p in self.ours)
        expected = set(self.theirs[0].names)
        for pattern in (*self.theirs, *self.ours):
            if set(pattern.names) != expected:
                raise ValueError(
                    f"pattern {pattern.text!r} has the fields {sorted(pattern.names)}, its partner "
                    f"{self.theirs[0].text!r} has {sorted(expected)}; a rule that runs both ways "
                    "has the same on each side"
                )

    def nested(self, reference: str, zoo: str) -> Rule:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.theirs, copy.ours = _prefixed(self.theirs, reference), _prefixed(self.ours, zoo)
        return copy

    def _there(self, x: Tensor) -> Tensor:
        for op in self.ops:
            x = op.to_zoo(x)
        return x

    def _back(self, x: Tensor) -> Tensor:
        for op in reversed(self.ops):
            x = op.to_reference(x)
        return x

    def __repr__(self) -> str:
        return f"{type(self).__name__}({[p.text for p in self.theirs]} <-> {[p.text for p in self.ours]})"


class Rename(_Group):
    """One key for one key; ``ops`` change the tensor on the way to the zoo, in order."""

    def __init__(self, reference: str, zoo: str, *ops: Any) -> None:
        super().__init__(reference, zoo, ops)

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        return [self._there(parts[0])]

    def backward(self, parts: list[Tensor]) -> list[Tensor]:
        return [self._back(parts[0])]


class Stack(_Group):
    """Several of the original's tensors on a new axis of ours. ``ops`` change each of them before stacking.

    Write the parts out (a list of patterns), or, when they are numbered, one pattern and ``over`` naming the field
    that counts them: ``Stack("x_proj.{k}.weight", "x_proj", over="k", count=4)``.
    """

    def __init__(
        self,
        reference: str | Sequence[str],
        zoo: str,
        *ops: Any,
        axis: int = 0,
        over: str | None = None,
        count: int | None = None,
    ) -> None:
        super().__init__(_numbered(reference, over, count), zoo, ops)
        self.axis = axis

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.stack([self._there(p) for p in parts], dim=self.axis)]

    def backward(self, parts: list[Tensor]) -> list[Tensor]:
        found = parts[0].unbind(self.axis)
        if len(found) != len(self.theirs):
            raise ValueError(
                f"{self!r}: axis {self.axis} has {len(found)} entries, the rule has {len(self.theirs)} keys"
            )
        return [self._back(p) for p in found]


class Unstack(_Group):
    """One of the original's tensors is several of ours, along an axis that vanishes (the inverse of Stack)."""

    def __init__(
        self,
        reference: str,
        zoo: str | Sequence[str],
        *ops: Any,
        axis: int = 0,
        over: str | None = None,
        count: int | None = None,
    ) -> None:
        super().__init__(reference, _numbered(zoo, over, count), ops)
        self.axis = axis

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        found = parts[0].unbind(self.axis)
        if len(found) != len(self.ours):
            raise ValueError(f"{self!r}: axis {self.axis} has {len(found)} entries, the rule has {len(self.ours)} keys")
        return [self._there(p) for p in found]

    def backward(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.stack([self._back(p) for p in parts], dim=self.axis)]


class Concat(_Group):
    """Several of the original's tensors end to end in one of ours. ``sizes`` cuts it again: one length a part
    (one may be -1); None cuts equal parts. ``ops`` change each part before joining."""

    def __init__(
        self, reference: Sequence[str], zoo: str, *ops: Any, axis: int = 0, sizes: Sequence[int] | None = None
    ) -> None:
        super().__init__(reference, zoo, ops)
        self.axis, self.sizes = axis, _checked_sizes(sizes, len(reference))

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat([self._there(p) for p in parts], dim=self.axis)]

    def backward(self, parts: list[Tensor]) -> list[Tensor]:
        return [self._back(p) for p in _cut(parts[0], self.axis, self.sizes, len(self.theirs), self)]


class Split(_Group):
    """One of the original's tensors is cut into several of ours (the inverse of Concat). ``ops`` change each piece."""

    def __init__(
        self, reference: str, zoo: Sequence[str], *ops: Any, axis: int = 0, sizes: Sequence[int] | None = None
    ) -> None:
        super().__init__(reference, zoo, ops)
        self.axis, self.sizes = axis, _checked_sizes(sizes, len(zoo))

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        return [self._there(p) for p in _cut(parts[0], self.axis, self.sizes, len(self.ours), self)]

    def backward(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat([self._back(p) for p in parts], dim=self.axis)]


def _numbered(texts: str | Sequence[str], over: str | None, count: int | None) -> Sequence[str]:
    if over is None and not isinstance(texts, str):
        return texts
    if over is None or count is None or not isinstance(texts, str):
        raise ValueError("give either a list of patterns, or one pattern with over= (the field that counts) and count=")
    return [texts.replace("{" + over + "}", str(i)) for i in range(count)]


def _checked_sizes(sizes: Sequence[int] | None, parts: int) -> list[int] | None:
    if sizes is None:
        return None
    if len(sizes) != parts or list(sizes).count(-1) > 1:
        raise ValueError(f"sizes={list(sizes)}: expected one length for each of {parts} parts, at most one of them -1")
    return list(sizes)


def _cut(x: Tensor, axis: int, sizes: list[int] | None, parts: int, rule: Rule) -> list[Tensor]:
    total = x.shape[axis]
    if sizes is None:
        if total % parts:
            raise ValueError(f"{rule!r}: length {total} does not divide into {parts} equal parts; give sizes=")
        sizes = [total // parts] * parts
    if -1 in sizes:
        sizes = [total - sum(sizes) - 1 if s == -1 else s for s in sizes]
    if sum(sizes) != total or min(sizes) < 0:
        raise ValueError(f"{rule!r}: length {total} cannot be cut into {sizes}")
    return list(x.split(sizes, dim=axis))


@dataclass
class Tied(Rule):
    """Two names of the original for one tensor. Ours (still named by the later rules) follows from ``kept``;
    ``copy`` is left out on the way in, after a check that it is equal, and written again on the way back."""

    kept: str
    copy: str
    theirs: tuple[_Pattern, ...] = field(init=False)
    ours: tuple[_Pattern, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        self.theirs = _patterns(self.copy)
        self.source = _Pattern(self.kept)

    def nested(self, reference: str, zoo: str) -> Rule:
        return replace(self, kept=reference + self.kept, copy=reference + self.copy)


@dataclass
class Drop(Rule):
    """A tensor that we do not hold: derived buffers, counters, dead parameters.

    ``restore`` writes it again on the way back: a callable that gets the original-format state so far and the fields
    of ``once`` (a pattern; the tensor is written once for each key that matches it), and returns the tensor. Without
    it the key is left out, which the original accepts for buffers that it derives itself.
    """

    pattern: str
    once: str | None = None
    restore: Callable[[Mapping[str, Tensor], Fields], Tensor] | None = None
    theirs: tuple[_Pattern, ...] = field(init=False)
    ours: tuple[_Pattern, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        self.theirs = _patterns(self.pattern)
        if (self.once is None) != (self.restore is None):
            raise ValueError("Drop: give once= and restore= together, or neither")

    def nested(self, reference: str, zoo: str) -> Rule:
        once = None if self.once is None else reference + self.once
        return replace(self, pattern=reference + self.pattern, once=once)


class Rules:
    """An ordered key table. See the module's text for its language."""

    def __init__(self, *rules: Rule | Rules) -> None:
        self.rules: list[Rule] = []
        for rule in rules:
            self.rules.extend(rule.rules if isinstance(rule, Rules) else [rule])

    def __add__(self, other: Rules) -> Rules:
        return Rules(self, other)

    def nested(self, reference: str, zoo: str) -> Rules:
        """The same table below a prefix on each side ("encoder.", "backbone."), for models inside models.

        Keys that no rule names keep their rest: the prefix alone is exchanged."""
        inner = [rule.nested(reference, zoo) for rule in self.rules]
        return Rules(*inner, Rename(reference + "{rest:*}", zoo + "{rest:*}"))

    def to_zoo(self, state: Mapping[str, Tensor]) -> State:
        """Our names and layouts from the original's. Raises ValueError when a group of keys is incomplete, or when
        tensors have shapes that its rule cannot take."""
        out: State = {}
        for rule, fields, keys in self._groups(state, "theirs"):
            if isinstance(rule, Drop):
                continue
            if isinstance(rule, Tied):
                self._check_tie(rule, fields, state)
                continue
            if rule is None:
                _put(out, keys[0], state[keys[0]])
                continue
            parts = self._applied(rule.forward, keys, state)
            for pattern, tensor in zip(rule.ours, parts, strict=True):
                _put(out, pattern.fill(fields), tensor)
        return out

    def to_reference(self, state: Mapping[str, Tensor]) -> State:
        """The original's names and layouts from ours; the inverse of :meth:`to_zoo`."""
        out: State = {}
        for rule, fields, keys in self._groups(state, "ours"):
            if rule is None:
                _put(out, keys[0], state[keys[0]])
                continue
            parts = self._applied(rule.backward, keys, state)
            for pattern, tensor in zip(rule.theirs, parts, strict=True):
                _put(out, pattern.fill(fields), tensor)
        for rule in self.rules:
            if isinstance(rule, Tied):
                for key in list(out):
                    fields = rule.source.match(key)
                    if fields is not None:
                        out[rule.theirs[0].fill(fields)] = out[key]
            elif isinstance(rule, Drop) and rule.once is not None and rule.restore is not None:
                once = _Pattern(rule.once)
                for key in list(out):
                    fields = once.match(key)
                    if fields is not None:
                        out[rule.theirs[0].fill(fields)] = rule.restore(out, fields)
        return out

    def _groups(self, state: Mapping[str, Tensor], side: str):
        """Yield (rule, fields, keys of the group in the rule's order), each key of ``state`` in one group."""
        seen: set[str] = set()
        for key in state:
            if key in seen:
                continue
            for rule in self.rules:
                fields = next((f for p in getattr(rule, side) if (f := p.match(key)) is not None), None)
                if fields is None:
                    continue
                keys = [p.fill(fields) for p in getattr(rule, side)]
                absent = [k for k in keys if k not in state]
                if absent:
                    raise ValueError(f"{rule!r}: found {key!r} but not {absent}; the rule needs all of them together")
                seen.update(keys)
                yield rule, fields, keys
                break
            else:
                seen.add(key)
                yield None, {}, [key]

    @staticmethod
    def _applied(run: Callable[[list[Tensor]], list[Tensor]], keys: list[str], state: Mapping[str, Tensor]):
        """What a rule makes of the tensors; where their shapes do not fit it, the error names keys and shapes."""
        try:
            return run([state[k] for k in keys])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:  # torch's own for shapes are RuntimeErrors
            given = ", ".join(f"{k} {tuple(state[k].shape)}" for k in keys)
            raise ValueError(f"the shapes of these tensors do not fit their key rule: {given}. {error}") from error

    @staticmethod
    def _check_tie(rule: Tied, fields: Fields, state: Mapping[str, Tensor]) -> None:
        kept, copy = rule.source.fill(fields), rule.theirs[0].fill(fields)
        if kept not in state:
            raise ValueError(f"{copy!r} is a copy of {kept!r}, which is not in the state dict")
        if state[kept].device.type != "meta" and not torch.equal(state[kept], state[copy]):
            raise ValueError(f"{copy!r} differs from {kept!r}; in this system they are one tensor")


def _put(out: State, key: str, tensor: Tensor) -> None:
    if key in out:
        raise ValueError(f"two rules write {key!r}")
    out[key] = tensor
