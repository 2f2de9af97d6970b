"""What recipes' models cost, beside what is published: parameters, operations, memory. No data, weights or GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from samdetr.cost.flops import Macs, Memory, Size, build_on_meta, count_macs, training_memory
from samdetr.cost.published import PUBLISHED, Published
from samdetr.data.transforms import resized_sides

if TYPE_CHECKING:
    from samdetr.recipe import Recipe

PHOTOS = (Size(480, 640), Size(426, 640))  # whose evaluation sizes are counted by default
GIGA = 1e9


class Gflops(NamedTuple):
    """Billions of multiply-accumulates of an image."""

    published_form: float
    run: float
    over_published: float | None  # published form, less what is published of other images


class Figures(NamedTuple):
    """What a model is measured to be."""

    parameters: int
    trainable: int
    macs: Mapping[Size, Macs]
    memory: Memory


@dataclass(frozen=True)
class Report:
    """Of one recipe."""

    path: Path
    recipe: Recipe
    figures: Figures
    published: Published | None

    @property
    def gflops(self) -> Gflops:
        """The means over the sizes."""
        counts = self.figures.macs.values()
        published_form, run = (sum(column) / len(counts) / GIGA for column in zip(*counts, strict=True))
        over = None
        if self.published and self.published.gflops is not None:
            over = published_form - self.published.gflops
        return Gflops(published_form, run, over)

    @property
    def parameters_over(self) -> tuple[int, int] | None:
        """How many more parameters, and trained ones, than the published code's; None where it has none."""
        published, figures = self.published, self.figures
        if published is None or published.parameters is None or published.trainable is None:
            return None
        return figures.parameters - published.parameters, figures.trainable - published.trainable

    def to_json(self) -> dict[str, object]:
        """A JSON value; GFLOPs are billions of multiply-accumulates, memory is in bytes."""
        macs, memory = self.figures.macs.items(), self.figures.memory
        return {
            "recipe": str(self.path),
            "system": self.recipe.model.system,
            "epochs": self.recipe.train.epochs,
            "parameters": self.figures.parameters,
            "trainable": self.figures.trainable,
            "parameters_over_published": self.parameters_over,
            "gflops": [
                {"size": str(size), "published_form": count.published / GIGA, "run": count.run / GIGA}
                for size, count in macs
            ],
            "gflops_mean": self.gflops._asdict(),
            "training_memory": {**memory._asdict(), "size": str(memory.size), "total": memory.total},
            "published": self.published._asdict() if self.published else None,
        }


def evaluation_sizes(recipe: Recipe) -> tuple[Size, ...]:
    """The sizes to which the recipe's evaluation brings photos of 640 x 480 and 640 x 426 pixels."""
    section = recipe.augment
    sides = (resized_sides(*photo, section.eval_size, section.eval_max_size) for photo in PHOTOS)
    return tuple(Size(int(height), int(width)) for height, width in sides)


def make_reports(recipes: Mapping[Path, Recipe], sizes: Sequence[Size] = ()) -> list[Report]:
    """A report of each recipe, counted at ``sizes`` or at its `evaluation_sizes`."""
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
    """The figures of a recipe's model, on the meta device."""
    model = build_on_meta(recipe.model)
    numbers = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Figures(
        parameters=sum(number for number, _ in numbers),
        trainable=sum(number for number, trained in numbers if trained),
        macs={size: count_macs(model, size) for size in sizes},
        memory=training_memory(model, recipe),
    )


def by_sizes(reports: Sequence[Report]) -> dict[tuple[Size, ...], list[Report]]:
    """The reports in groups that were counted at the same sizes."""
    groups: dict[tuple[Size, ...], list[Report]] = {}
    for report in reports:
        groups.setdefault(tuple(report.figures.macs), []).append(report)
    return groups
