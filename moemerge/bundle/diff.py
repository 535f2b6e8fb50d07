"""What differs between two models: tensors by canonical name, settings and small files.

Layout, sharding and codes do not count: what is compared is what the model computes with.
"""

import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from moemerge.bundle.export import EffectivePart, Exported
from moemerge.bundle.opened import OpenedModel, is_readable
from moemerge.checkpoint.family import Setting
from moemerge.checkpoint.tensors import TensorReader, torch_dtype
from moemerge.errors import Finding, IncompatibleInputs
from moemerge.progress import Progress
from moemerge.similarity.difference import Difference

_PIECE = 4 * 2**20


class Status(StrEnum):
    """What became of a tensor, worst first."""

    REMOVED = "only in A"
    ADDED = "only in B"
    SHAPE = "other shape"
    DTYPE = "other dtype"
    CHANGED = "changed"
    UNREAD = "not downloaded"
    EQUAL = "equal"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """One tensor of two models.

    Attributes:
        name: Canonical name.
        status: What became of it.
        before: dtype and shape in the first model; empty where it is not there.
        after: The same in the second.
        relative: L2 norm of the difference over that of the first; None where not measured or no number.
        largest: Largest absolute difference, likewise.
    """

    name: str
    status: Status
    before: str = ""
    after: str = ""
    relative: float | None = None
    largest: float | None = None

    @property
    def role(self) -> str:
        """The name without numbers of layers and slots."""
        return re.sub(r"\.\d+", "", self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDifference:
    """The tensors of one role, through all layers and slots.

    Attributes:
        role: Canonical name without numbers.
        tensors: How many there are.
        changed: How many are not known to be equal.
        mean: Of their relative differences; None where none was measured.
        worst: The largest of them.
    """

    role: str
    tensors: int
    changed: int
    mean: float | None
    worst: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDifference:
    """Two models.

    Attributes:
        settings: Those that differ, by name, first and second.
        files: Small files that differ, by name, with what became of them.
        tensors: All of them, worst first.
    """

    settings: dict[str, tuple[Setting, Setting]]
    files: dict[str, Status]
    tensors: list[TensorDifference]

    @property
    def changed(self) -> list[TensorDifference]:
        """Tensors that are not known to be equal."""
        return [tensor for tensor in self.tensors if tensor.status is not Status.EQUAL]

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.settings or self.files or self.changed)

    def groups(self) -> list[GroupDifference]:
        """The tensors of one role together, in the order of names."""
        roles: dict[str, list[TensorDifference]] = {}
        for tensor in self.tensors:
            roles.setdefault(tensor.role, []).append(tensor)
        return [_summarise(role, tensors) for role, tensors in sorted(roles.items())]


def diff_models(
    first: OpenedModel, second: OpenedModel, progress: Progress, *, numeric: bool = False
) -> ModelDifference:
    """Compare two models of one family.

    Args:
        first: What `relative` differences refer to.
        second: The other.
        progress: Told of the bytes of `first` that were compared.
        numeric: Measure how far tensors are apart, rather than stop at the first byte that differs.

    Raises:
        IncompatibleInputs: They are of different families.
        DamagedInput: A file changed or ends early.
    """
    _require_one_family(first, second)
    progress.start(f"compare {first.label}", first.expert_bytes + first.other_bytes)
    found = []
    with TensorReader() as reader:
        for name in dict.fromkeys([*first.tensors, *second.tensors]):
            found.append(_diff_tensor(name, first, second, reader, numeric=numeric))
            progress.advance(first.tensors[name].nbytes if name in first.tensors else 0)
    return ModelDifference(
        settings=_diff_settings(first, second),
        files=_diff_files(first.files, second.files),
        tensors=sorted(found, key=_badness),
    )


def _summarise(role: str, tensors: list[TensorDifference]) -> GroupDifference:
    distances = [tensor.relative for tensor in tensors if tensor.relative is not None]
    return GroupDifference(
        role=role,
        tensors=len(tensors),
        changed=sum(tensor.status is not Status.EQUAL for tensor in tensors),
        mean=statistics.fmean(distances) if distances else None,
        worst=max(distances, default=None),
    )


def _diff_tensor(
    name: str, first: OpenedModel, second: OpenedModel, reader: TensorReader, *, numeric: bool
) -> TensorDifference:
    if name not in second.tensors:
        return TensorDifference(name=name, status=Status.REMOVED, before=_form(first.tensors[name]))
    if name not in first.tensors:
        return TensorDifference(name=name, status=Status.ADDED, after=_form(second.tensors[name]))
    before, after = first.tensors[name], second.tensors[name]
    status, difference = _compare(before, after, reader, numeric=numeric)
    return TensorDifference(
        name=name,
        status=status,
        before=_form(before),
        after=_form(after),
        relative=difference.relative if difference else None,
        largest=difference.largest if difference else None,
    )


def _compare(
    before: Exported, after: Exported, reader: TensorReader, *, numeric: bool
) -> tuple[Status, Difference | None]:
    """What became of a tensor that is in both; the difference only where it was measured."""
    if before.shape != after.shape:
        return Status.SHAPE, None
    if before == after:  # the very same bytes of a file
        return Status.EQUAL, None
    if not (is_readable(before) and is_readable(after)):
        return Status.DTYPE if before.dtype != after.dtype else Status.UNREAD, None
    if before.dtype != after.dtype:
        return Status.DTYPE, _measure(before, after, reader) if numeric else None
    if not numeric:
        return (Status.EQUAL if _has_equal_bytes(before, after, reader) else Status.CHANGED), None
    difference = _measure(before, after, reader)
    return (Status.EQUAL if difference.is_equal else Status.CHANGED), difference


def _measure(before: Exported, after: Exported, reader: TensorReader) -> Difference:
    difference = Difference()
    for pair in zip(_pieces(before, reader), _pieces(after, reader), strict=True):
        difference.add(*pair)
    return difference


def _has_equal_bytes(before: Exported, after: Exported, reader: TensorReader) -> bool:
    pairs = zip(_pieces(before, reader), _pieces(after, reader), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def _pieces(tensor: Exported, reader: TensorReader) -> Iterator[Tensor]:
    """The values in order, so many at a time."""
    if isinstance(tensor, EffectivePart):
        yield from torch.split(tensor.compute(reader).view(-1), _PIECE)
        return
    dtype = torch_dtype(tensor)
    for chunk in reader.chunks(tensor, _PIECE * dtype.itemsize):
        yield torch.frombuffer(chunk, dtype=dtype)


def _form(tensor: Exported) -> str:
    return f"{tensor.dtype} {'x'.join(map(str, tensor.shape))}"


def _badness(tensor: TensorDifference) -> tuple[int, float]:
    """For sorting: what is missing, then what is no number, then by distance."""
    order = list(Status).index(tensor.status)
    measured = tensor.relative if tensor.relative is not None else float("inf")
    is_distance = tensor.status in (Status.DTYPE, Status.CHANGED)
    return (order if not is_distance else list(Status).index(Status.DTYPE)), -measured


def _diff_settings(first: OpenedModel, second: OpenedModel) -> dict[str, tuple[Setting, Setting]]:
    names = dict.fromkeys([*first.settings, *second.settings])
    pairs = {name: (first.settings.get(name), second.settings.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _diff_files(first: dict[str, Path], second: dict[str, Path]) -> dict[str, Status]:
    found = dict.fromkeys(sorted(first.keys() - second.keys()), Status.REMOVED)
    found |= dict.fromkeys(sorted(second.keys() - first.keys()), Status.ADDED)
    both = sorted(first.keys() & second.keys())
    return found | {
        name: Status.CHANGED for name in both if first[name].read_bytes() != second[name].read_bytes()
    }


def _require_one_family(first: OpenedModel, second: OpenedModel) -> None:
    ours, theirs = first.family.name, second.family.name
    if ours != theirs:
        finding = Finding(
            level="error", code="FAMILY_DIFFERS", where=second.label, found=theirs, expected=ours
        )
        raise IncompatibleInputs(
            f"{second.label} is a {theirs}, {first.label} a {ours}: their tensors have nothing to do "
            f"with each other. Compare checkpoints of one family",
            [finding],
        )
