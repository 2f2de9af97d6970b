"""The next thing that all processes do: each reports what it met, and one collective call decides for all."""

from __future__ import annotations

from enum import IntEnum

from samdetr.engine.distributed.signals import StopSignal
from samdetr.engine.distributed.world import World

_SIGNAL_NUMBERS = 128  # more than any signal's


class Decision(IntEnum):
    """The action of every process before the next step; where the processes differ, the largest counts."""

    CONTINUE = 0
    STOP = 1  # a signal came
    BAD_IMAGE = 2  # an image of the next batch cannot be used
    SAVE_FAILED = 3
    NOT_FINITE = 4  # a step's loss or gradient, and it may not be skipped


class Stopped(Exception):  # noqa: N818, it is no error
    """A run ends after a signal; all that was to be saved is on the disk."""


def agree(
    world: World, stop: StopSignal, *, bad_image: bool = False, save_failed: bool = False, not_finite: bool = False
) -> Decision:
    """Return what all processes do next, by what each of them met. All must call it, at the same place.

    After `Decision.STOP` every process's ``stop.number`` is the signal. Where a process met something worse than a
    signal, that decides, and another process's signal stays its own. A signal that comes during the call counts at the
    next call. One collective call of the hosts, which waits for no device.
    """
    signal = stop.number or 0
    met = Decision.CONTINUE
    if not_finite:
        met = Decision.NOT_FINITE
    elif save_failed:
        met = Decision.SAVE_FAILED
    elif bad_image:
        met = Decision.BAD_IMAGE
    elif signal:
        met = Decision.STOP
    # one number carries both: the decision, then the signal
    agreed, number = divmod(world.all_reduce_max(met * _SIGNAL_NUMBERS + signal), _SIGNAL_NUMBERS)
    if number:
        stop.number = number
    return Decision(agreed)
