"""What codes do to the experts of a layer, as multiples of what is measured for every one of them.

Encoding every expert in every code would cost more than the merge. Within a layer the multiples hardly depend
on the slot, but they do on the variant: the fewer directions its inputs take, the more of a code's error lies
where no input looks. So they are measured in one slot, for every variant. Codes that differ in bits alone
follow from one of them: a bit more quarters the damage, as it does for any fine quantiser (Gersho and Gray
1992, Vector quantization, 5.6).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moemerge.bundle.manifest import CodeSpec
from moemerge.consolidation.codes.moments import add_part_moments
from moemerge.consolidation.ladder import PLAIN, Ladder, encode, encode_residual
from moemerge.consolidation.operators import OPERATORS
from moemerge.consolidation.slot import Parts, Slot, probe
from moemerge.models.packed import Matrix, effective

# Codes from which those of other bits follow, and what other codes are compared with.
_POOL_BITS, _RESIDUAL_BITS = (4, 8), (1, 2)
_POOL_ANCHOR, _RESIDUAL_ANCHOR = "4-bit", "1-bit"
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Factors:
    """What codes do to the experts of a variant in a layer, as multiples.

    Attributes:
        own: By pool code: damage of an expert alone in it over damage of plain rounding to four bits.
        pool: The same for a shared pool expert: what the code adds to sharing.
        of_sharing: By residual code, what it leaves of the damage of sharing.
        of_rounding: What it leaves of the damage that a code does.
    """

    own: Mapping[str, float]
    pool: Mapping[str, float]
    of_sharing: Mapping[str, float]
    of_rounding: Mapping[str, float]


def measure_factors(slot: Slot, ladder: Ladder, operator: str = "mean") -> list[Factors]:
    """What codes do to each member of a slot.

    Every code is tried on one of them, the one in the middle by what sharing does to it; on the others those
    from which the rest follows.

    Args:
        slot: Stands for its layer.
        ladder: The codes.
        operator: What makes the shared expert.
    """
    numbers = range(len(slot.members))
    centre = OPERATORS[operator].make(slot.cluster(tuple(numbers)))
    moments = add_part_moments([member.moments for member in slot.members])
    # Operators that take a member harm that one not at all, and whom sharing harms most is not typical.
    typical = sorted(numbers, key=lambda number: slot.damage(number, centre))[len(slot.members) // 2]
    shared = {
        name: _dense(encode(centre, code, moments))
        for name, code in _measured(ladder.pool, _POOL_BITS).items()
    }
    found = _Tried(slot, centre, shared).on(typical, ladder)
    return [
        found if number == typical else _Tried(slot, centre, shared).partly_on(number, ladder, found)
        for number in numbers
    ]


def residual_shares(
    slot: Slot, number: int, stored: Parts, residuals: Mapping[str, CodeSpec | None]
) -> dict[str, float]:
    """By residual code, what is left of the damage that a pool expert does to a member.

    Args:
        slot: Of the member.
        number: Its place in the slot.
        stored: The pool expert as stored, float32.
        residuals: The codes; one that is None leaves everything and is not told.
    """
    member, whole = slot.members[number], slot.damage(number, stored)
    missing = {part: member.matrices[part] - matrix for part, matrix in stored.items()}
    measured = _measured(residuals, _RESIDUAL_BITS)
    shares = {}
    for name, code in measured.items():
        added = encode_residual(missing, code, member.moments)
        repaired = {**stored, **{part: stored[part] + matrix.dense() for part, matrix in added.items()}}
        shares[name] = min(1.0, slot.damage(number, repaired) / max(whole, _TINY))
    return _filled(shares, residuals)


@dataclass(frozen=True, slots=True)
class _Tried:
    """Codes tried on members of a slot.

    Attributes:
        slot: The slot.
        centre: The shared expert, not coded.
        shared: By code, the same coded.
    """

    slot: Slot
    centre: Parts
    shared: Mapping[str, Parts]

    def on(self, number: int, ladder: Ladder) -> Factors:
        """Every code."""
        member, probed = self.slot.members[number], max(probe(self.slot, number), _TINY)
        own = {
            name: _dense(encode(member.matrices, code, member.moments))
            for name, code in _measured(ladder.pool, _POOL_BITS).items()
        }
        damage = {name: self.slot.damage(number, parts) / probed for name, parts in own.items()}
        of_sharing = residual_shares(self.slot, number, self.centre, ladder.residuals)
        coarsest = own[max(damage, key=lambda name: damage[name])]
        of_rounding = residual_shares(self.slot, number, coarsest, ladder.residuals)
        pool = self._pool(number, probed)
        return Factors(
            {PLAIN: 0.0, **_filled(damage, ladder.pool)},
            {PLAIN: 0.0, **_filled(pool, ladder.pool)},
            of_sharing,
            of_rounding,
        )

    def partly_on(self, number: int, ladder: Ladder, full: Factors) -> Factors:
        """A few codes; others stand to them as they do where all were tried."""
        member, probed = self.slot.members[number], max(probe(self.slot, number), _TINY)
        own = dict(full.own)
        if (anchor := ladder.pool.get(_POOL_ANCHOR)) is not None:
            coded = _dense(encode(member.matrices, anchor, member.moments))
            own = _scaled(full.own, _POOL_ANCHOR, self.slot.damage(number, coded) / probed)
        bits = {name: code for name, code in ladder.residuals.items() if code and code.kind == "bits"}
        of_sharing = dict(full.of_sharing)
        if bits:
            measured = residual_shares(self.slot, number, self.centre, bits)
            of_sharing = _scaled(full.of_sharing, _RESIDUAL_ANCHOR, measured[_RESIDUAL_ANCHOR]) | measured
        pool = {PLAIN: 0.0, **_filled(self._pool(number, probed), ladder.pool)}
        return Factors(own, pool, of_sharing, full.of_rounding)

    def _pool(self, number: int, probed: float) -> dict[str, float]:
        # Where sharing does far more than rounding, the difference of their damages is chance.
        return {
            name: self.slot.damage(number, parts, instead_of=self.centre) / probed
            for name, parts in self.shared.items()
        }


def _scaled(full: Mapping[str, float], anchor: str, measured: float) -> dict[str, float]:
    ratio = measured / max(full[anchor], _TINY)
    return {name: value * ratio for name, value in full.items()}


def _measured(codes: Mapping[str, CodeSpec | None], bits: Sequence[int]) -> dict[str, CodeSpec]:
    """The codes that others follow from."""
    return {
        name: code
        for name, code in codes.items()
        if code is not None and (code.kind != "bits" or code.bits in bits)
    }


def _filled(seen: Mapping[str, float], codes: Mapping[str, CodeSpec | None]) -> dict[str, float]:
    """What was measured, and what follows for codes that were not; empty when nothing was."""
    found = dict(seen)
    for name, code in codes.items():
        if code is None or name in found or not seen:
            continue
        nearest = min(
            (other for other in seen if _differ_in_bits(codes[other], code)),
            key=lambda other: abs(_bits(codes[other]) - code.bits),
        )
        found[name] = found[nearest] * 4.0 ** (_bits(codes[nearest]) - code.bits)
    return {name: found[name] for name in codes if name in found}


def _differ_in_bits(one: CodeSpec | None, other: CodeSpec) -> bool:
    return one is not None and (one.kind, one.group) == (other.kind, other.group)


def _bits(code: CodeSpec | None) -> int:
    assert code is not None
    return code.bits


def _dense(coded: Mapping[str, Matrix]) -> dict[str, Tensor]:
    return {part: effective(matrix, None, torch.float32) for part, matrix in coded.items()}
