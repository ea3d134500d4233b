"""The life of a request, the same on both sides: which state follows which.

  WAITING --GRANTED--> MOVING --ALL_HERE--> COMPLETE --RELEASE--> RELEASED
     |                   |                                            ^
     +------FAIL---------+----FAIL----> DRAINING -------QUIET---------+

WAITING  the sender has asked, or the receiver expects; nobody writes yet
MOVING   pages may be written
COMPLETE all of it is there; the pages are the caller's
DRAINING it ended badly, and a write may still be under way: the pages are nobody's
RELEASED the pages may be used for something else
"""

from __future__ import annotations

import enum


class State(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    MOVING = "moving"
    COMPLETE = "complete"
    DRAINING = "draining"
    RELEASED = "released"


class Event(enum.Enum):
    """What happens to a request."""

    GRANTED = "granted"  # the receiver told the sender its pages
    ALL_HERE = "all here"
    FAIL = "fail"  # cancelled, out of time, a peer lost, refused
    QUIET = "quiet"  # no write can land any more
    RELEASE = "release"  # by the caller


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.WAITING, Event.GRANTED): State.MOVING,
    (State.WAITING, Event.FAIL): State.RELEASED,
    (State.MOVING, Event.ALL_HERE): State.COMPLETE,
    (State.MOVING, Event.FAIL): State.DRAINING,
    (State.DRAINING, Event.QUIET): State.RELEASED,
    (State.COMPLETE, Event.RELEASE): State.RELEASED,
}


def advance(state: State, event: Event) -> State:
    """The state after ``event``.

    Raises:
      ValueError: it cannot happen then, so something is wrong with jaxfabric.
    """
    after = TRANSITIONS.get((state, event))
    if after is None:
        raise ValueError(f"jf.kv: a request that is {state.value} cannot {event.value}")
    return after
