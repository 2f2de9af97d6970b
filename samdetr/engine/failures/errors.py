"""How a run ends early: errors of torch and of lost processes become messages, saves under way are finished."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from samdetr.engine.checkpoint.saving import Saver
from samdetr.engine.distributed.decision import Stopped
from samdetr.engine.distributed.signals import StopSignal
from samdetr.engine.distributed.world import World, is_communication_error
from samdetr.engine.failures.out_of_memory import training_message
from samdetr.engine.run.folder import how_to_continue, resume_command
from samdetr.errors import SamdetrError

if TYPE_CHECKING:
    from samdetr.engine.checkpoint.format import Progress
    from samdetr.recipe import Recipe


@contextmanager
def translate_errors(
    recipe: Recipe,
    progress: Progress,
    folder: Path,
    *,
    world: World,
    stop: StopSignal,
    saver: Saver,
    say: Callable[[str], None],
    device: torch.device,
    precision: torch.dtype,
) -> Iterator[None]:
    """Turn the errors of a run's epochs into SamdetrErrors that say how to continue; finish the save under way.

    After a signal: print how to continue, and end the program as `StopSignal.exit` does. After a second one: end it
    without waiting for the save. Other errors pass.
    """
    try:
        yield
    except Stopped:
        say(f"stopped after step {progress.step}; {how_to_continue(folder)}")
        stop.exit()
    except KeyboardInterrupt:
        if stop.at_once:
            saver.end(at_once=True)
            say(f"stopped at once; what came after the last checkpoint is lost; {how_to_continue(folder)}")
            stop.exit()
        raise
    except SamdetrError as error:
        saver.end()
        if saver.failed:  # before this: a full disk stops the pictures too
            say(str(error))
            saver.wait()
        raise
    except torch.OutOfMemoryError as error:
        saver.end()  # the run can continue from what it writes
        raise SamdetrError(
            training_message(error, recipe, progress, folder, device=device, precision=precision, processes=world.size)
        ) from error
    except RuntimeError as error:
        if world.size == 1 or not is_communication_error(error):
            raise
        raise SamdetrError(_lost_process(error, world, progress.step, folder)) from error
    finally:
        saver.end(at_once=stop.at_once)
        torch.compiler.set_stance("default")  # a failed compilation may have changed it, for the whole process


def _lost_process(error: RuntimeError, world: World, step: int, folder: Path) -> str:
    """Name the ranks that stopped responding, if any still do, and where this process waited for them."""
    ranks = world.unresponsive_ranks()
    place = [frame.name for frame in traceback.extract_tb(error.__traceback__) if "samdetr" in frame.filename][-1]
    where = f"after step {step}, in {place}: {str(error).splitlines()[0]}"
    way = f"Continue with {resume_command(folder)}."
    if not ranks:
        return f"contact was lost for a while {where}; all processes respond again. {way}"
    who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    return f"{who} stopped responding {where}; it hangs or has ended, and its last output is above. {way}"
