"""The facts about a detector that the engine needs besides calling it, and the names in published checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from samdetr.errors import CheckpointError

if TYPE_CHECKING:
    from samdetr.models import Detector

REPEATED = "transformer.decoder."  # prefix of the second copy of heads that a published file holds twice
State = Mapping[str, Tensor]  # a state dict, of published keys
FlopFormula = Callable[..., int]  # of a module, its arguments and its result -> flops, as cost/flops.py counts


def no_copies(model: Any, names: Mapping[str, str]) -> dict[str, str]:
    """Return nothing, as no published key repeats another one."""
    return {}


def repeated_box_heads(model: Any, names: Mapping[str, str]) -> dict[str, str]:
    """Return the published decoder's second copy of the box heads: its key -> original. names: ours -> published."""
    return {REPEATED + names[name]: names[name] for name in names if name.startswith("decoder.box_heads.")}


def fits_every_file(model: Any, state: State) -> None:
    """Raise nothing, as no key of the recipe changes what the published files hold."""


def is_published(model: Any) -> None:
    """Raise nothing, as every form of the system was published."""


class PublishedLayout(NamedTuple):
    """How a system's published checkpoints name and shape the parameters.

    The maps go from our prefixes to published ones; of several that fit, the first counts. A value that ends in
    "layers." is an MLP, whose linear layers the published names count without the ReLUs between them.
    """

    landmark: str  # key in this system's files and in none of a later entry of `SYSTEMS`
    whole: Mapping[str, str]
    encoder_layer: Mapping[str, str]
    decoder_layer: Mapping[str, str]
    convolutions: str  # our linear layers that are 1 x 1 convolutions there, as a regular expression of names
    check: Callable[[Any, State], None] = fits_every_file  # raises CheckpointError where a key does not fit the file
    check_model: Callable[[Any], None] = is_published  # raises CheckpointError where no such model was published
    copies: Callable[[Any, Mapping[str, str]], dict[str, str]] = no_copies  # published duplicate key -> original
    reordered: Mapping[str, Reordering] = {}  # weights in another order there, by how their names end


class Reordering(NamedTuple):
    """A weight in the published order, and in ours."""

    published: Callable[[Tensor], Tensor]
    ours: Callable[[Tensor], Tensor]


class System(NamedTuple):
    """A detector that `model.system` can choose. Each stands in its own file, and in the table `SYSTEMS`."""

    name: str  # as in a recipe
    build: Callable[[Any], Detector]  # from its section, with random weights
    class_heads: str  # name prefix of parameters with one row per class
    published: PublishedLayout | None  # None: nothing was published that fits
    published_flops: Mapping[type[nn.Module], FlopFormula] = {}  # extra operations of the published code (for GFLOPs)
    sampling: tuple[str, ...] = ()  # name parts of the parameters that use optim.sampling_lr_factor


def check_settings(**settings: tuple[object, object]) -> None:
    """Compare keys of the section [model]. setting: (value needed, value in recipe).

    Raises CheckpointError for the first setting whose values differ.
    """
    for key, (needed, value) in settings.items():
        if needed != value:
            wanted = str(needed).lower()
            raise CheckpointError(f"the published checkpoint is of another model: set model.{key} = {wanted}.")
