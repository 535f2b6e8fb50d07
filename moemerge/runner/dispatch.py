"""Scheduler and residency in step with each other: what happens around the computing of a step."""

from moemerge.runner.scheduler import Scheduler, StepPlan
from moemerge.runner.sequence import Sequence
from moemerge.runner.swapping import Swapper


class Dispatcher:
    """Says what the next step does: `move_variants`, then `plan`, and `computed` when it is done."""

    def __init__(self, scheduler: Scheduler, swapper: Swapper) -> None:
        self._scheduler = scheduler
        self._swapper = swapper

    def move_variants(self, now_s: float) -> list[Sequence]:
        """Let variants come and go as those that wait ask for.

        Returns:
            Sequences that were preempted so that their variant can go.

        Raises:
            LoadingFailed: A variant cannot be had.
        """
        emptied = self._swapper.advance(self._scheduler.demand(), now_s)
        return [] if emptied is None else self._scheduler.empty(emptied, now_s)

    def plan(self, now_s: float) -> StepPlan:
        """What the step computes."""
        residency = self._swapper.residency
        return self._scheduler.plan(now_s, residency.residents, residency.open_to)

    def computed(self, plan: StepPlan) -> None:
        """The step was done."""
        self._scheduler.computed(plan)
        self._swapper.residency.computed({work.sequence.variant for work in plan.work})
