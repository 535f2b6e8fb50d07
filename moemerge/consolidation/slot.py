"""The experts of one slot, one per variant, with the inputs that they are judged by.

Shapes: S inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moemerge.consolidation.codes.rounding import round_plainly
from moemerge.consolidation.forward import replacement_error, run_expert
from moemerge.consolidation.operators import Cluster, Member

_PROBE_BITS, _PROBE_GROUP = 4, 64

Members = tuple[int, ...]
Parts = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Slot:
    """The experts of one slot, one per variant.

    Attributes:
        members: With the inputs that decide what is made of them.
        judges: The same experts with other inputs, on which everything is measured.
        factors: Damage of a variant per mean gated square error on its inputs.
        partitions: Ways to divide the variants into those that share.
        base: The base's expert, when there is a base.
        seed: For operators that draw.
    """

    members: Sequence[Member]
    judges: Sequence[Member]
    factors: Sequence[float]
    partitions: Sequence[Sequence[Members]]
    base: Parts | None = None
    seed: int = 0

    def cluster(self, numbers: Members) -> Cluster:
        """Some of the variants' experts, to be merged."""
        members = [self.members[number] for number in numbers]
        return Cluster(members, self.base, self.seed, reference=self.members[0])

    def damage(
        self, number: int, parts: Parts, num_inputs: int | None = None, instead_of: Parts | None = None
    ) -> float:
        """Damage of a variant when these parts stand for its expert, on all inputs or on the first ones.

        Args:
            number: Of the variant.
            parts: What stands there.
            num_inputs: How many inputs; None for all.
            instead_of: What is to be stood for, if it is not the expert itself.
        """
        judge, some = self.judges[number], slice(num_inputs)
        inputs_SD, gates_S = judge.inputs_SD[some], judge.gates_S[some]
        own = judge.own if instead_of is None else run_expert(instead_of, judge.activation, inputs_SD)
        error = replacement_error(parts, judge.activation, inputs_SD, gates_S, own.output_SD[some])
        return self.factors[number] * error


def probe(slot: Slot, number: int) -> float:
    """Damage of a variant when its expert is plainly rounded to four bits."""
    member = slot.members[number]
    rounded = dict(member.matrices)
    for part in member.moments:
        rounded[part] = round_plainly(member.matrices[part], _PROBE_BITS, _PROBE_GROUP)
    return slot.damage(number, rounded)
