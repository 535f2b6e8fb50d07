"""A property that is computed once, and by one thread while another computes that of its own object."""

import threading

from moemerge.consolidation.cached import CachedProperty


class Thing:
    def __init__(self, meeting=None):
        self.meeting, self.count = meeting, 0

    @CachedProperty
    def size(self):
        """How large."""
        self.count += 1
        if self.meeting is not None:
            self.meeting.wait(10)
        return self.count


def test_property_is_computed_once():
    thing = Thing()
    assert (thing.size, thing.size, thing.count) == (1, 1, 1)
    assert Thing.size.__doc__ == "How large."


def test_threads_do_not_wait_for_each_other():
    meeting = threading.Barrier(2)
    things = [Thing(meeting), Thing(meeting)]
    threads = [threading.Thread(target=lambda thing=thing: thing.size) for thing in things]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not meeting.broken
    assert [thing.count for thing in things] == [1, 1]
