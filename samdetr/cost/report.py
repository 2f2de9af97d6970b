"""Parameters, flops and memory of recipes' models, beside what is published. Needs no data, weights or GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from samdetr.cost.flops import Flops, count_flops
from samdetr.cost.memory import Memory, training_memory
from samdetr.cost.meta import Size, build_on_meta
from samdetr.cost.published import PUBLISHED, Published
from samdetr.data.transforms import resized_sides

if TYPE_CHECKING:
    from samdetr.recipe import Recipe

PHOTOS = (Size(480, 640), Size(426, 640))  # whose evaluation sizes are counted by default
GIGA = 1e9


class Gflops(NamedTuple):
    """Billions of flops of an image, means over the sizes."""

    published_form: float
    run: float
    over_published: float | None  # published form less the published number, which is of other images


class Figures(NamedTuple):
    """Counts of one model."""

    parameters: int
    trainable: int
    flops: Mapping[Size, Flops]
    memory: Memory


@dataclass(frozen=True)
class Report:
    """Figures of one recipe, beside its published row."""

    path: Path
    recipe: Recipe
    figures: Figures
    published: Published | None

    @property
    def gflops(self) -> Gflops:
        """Means over the sizes."""
        counts = self.figures.flops.values()
        published_form, run = (sum(column) / len(counts) / GIGA for column in zip(*counts, strict=True))
        published = self.published.gflops if self.published else None
        return Gflops(published_form, run, None if published is None else published_form - published)

    @property
    def parameters_over(self) -> tuple[int, int] | None:
        """Parameters, and trained ones, beyond the published code's; None where it has none."""
        published, figures = self.published, self.figures
        if published is None or published.parameters is None or published.trainable is None:
            return None
        return figures.parameters - published.parameters, figures.trainable - published.trainable

    def to_json(self) -> dict[str, object]:
        """Return a JSON value; GFLOPs are billions of flops, memory is in bytes."""
        memory = self.figures.memory
        return {
            "recipe": str(self.path),
            "system": self.recipe.model.system,
            "epochs": self.recipe.train.epochs,
            "parameters": self.figures.parameters,
            "trainable": self.figures.trainable,
            "parameters_over_published": self.parameters_over,
            "gflops": [
                {"size": str(size), "published_form": count.published / GIGA, "run": count.run / GIGA}
                for size, count in self.figures.flops.items()
            ],
            "gflops_mean": self.gflops._asdict(),
            "training_memory": {**memory._asdict(), "size": str(memory.size), "total": memory.total},
            "published": self.published._asdict() if self.published else None,
        }


def evaluation_sizes(recipe: Recipe) -> tuple[Size, ...]:
    """Return the sizes to which the recipe's evaluation brings photos of 640 x 480 and 640 x 426 pixels."""
    section = recipe.augment
    sides = (resized_sides(*photo, section.eval_size, section.eval_max_size) for photo in PHOTOS)
    return tuple(Size(int(height), int(width)) for height, width in sides)


def make_reports(recipes: Mapping[Path, Recipe], sizes: Sequence[Size] = ()) -> list[Report]:
    """Report each recipe, counted at ``sizes`` or at its `evaluation_sizes`."""
    found: dict[object, Figures] = {}  # recipes often differ in their schedule alone
    reports = []
    with Console(stderr=True).status("counting") as status:
        for path, recipe in recipes.items():
            wanted = tuple(sizes) or evaluation_sizes(recipe)
            state = (recipe.optim.optimizer, recipe.optim.ema_decay)
            step = (recipe.train.micro_batch, recipe.compute.activation_checkpointing)
            alike = (recipe.model, recipe.loss, recipe.augment, step, state)
            if (alike, wanted) not in found:
                status.update(f"counting {path.stem}")
                found[alike, wanted] = measure(recipe, wanted)
            reports.append(Report(path, recipe, found[alike, wanted], PUBLISHED.get(path.stem)))
    return reports


def measure(recipe: Recipe, sizes: Sequence[Size]) -> Figures:
    """Count a recipe's model, on the meta device."""
    model = build_on_meta(recipe.model)
    numbers = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Figures(
        parameters=sum(number for number, _ in numbers),
        trainable=sum(number for number, trained in numbers if trained),
        flops={size: count_flops(model, size) for size in sizes},
        memory=training_memory(model, recipe),
    )


def by_sizes(reports: Sequence[Report]) -> dict[tuple[Size, ...], list[Report]]:
    """Group reports that were counted at the same sizes."""
    groups: dict[tuple[Size, ...], list[Report]] = {}
    for report in reports:
        groups.setdefault(tuple(report.figures.flops), []).append(report)
    return groups
