"""Checks of a split before the first step: in seconds, without decoding an image.

Findings about one box can be dropped on request; the others must be corrected in the files.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from samdetr.data.datasets import CocoData, positions
from samdetr.errors import DataError

Severity = Literal["error", "dropped", "note"]
_Mask = NDArray[np.bool_]

MEANINGS = {
    "image_duplicate_id": "the image id is used before",
    "image_size": "width or height is not positive",
    "file_name_unsafe": "file_name leaves the image folder",
    "file_missing": "the image file does not exist",
    "category_duplicate_id": "the category id is used twice",
    "annotation_duplicate_id": "the annotation id is used before",
    "image_unknown": "no such image in the file",
    "category_unknown": "no such category in the file",
    "category_not_in_train": "the training split lacks this category",
    "category_renamed": "the training split has another name for this category id",
    "no_objects": "the split has no objects",
    "box_not_finite": "a number of the box is NaN or infinite",
    "box_degenerate": "the box has no area inside the image",
    "box_negative": "the box begins more than 1 pixel left of or above the image",
    "box_outside": "the box ends more than 1 pixel right of or below the image",
    "box_clamped": "the box ends up to 1 pixel outside and is clamped",
    "too_many_objects": "more objects than queries: raise model.num_queries",
}
BOX_LEVEL = frozenset({"box_not_finite", "box_degenerate", "box_negative", "box_outside"})  # one box can be dropped

_EXAMPLES = 10
_TOLERANCE = 1.0  # pixels beyond the image that are clamped without an error
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # invisible, change the direction
_ROUNDING = 1e-6  # pixels; x + w of an exact box may exceed the image by float rounding


@dataclass(frozen=True)
class Finding:
    """One kind of problem in one split."""

    kind: str  # a key of MEANINGS
    severity: Severity
    count: int
    examples: tuple[str, ...]  # at most 10; each names the file and the annotation id


@dataclass(frozen=True)
class CheckReport:
    """The findings of one split."""

    split: str
    findings: tuple[Finding, ...]

    def errors(self) -> int:
        """Count the single problems that stop the training."""
        return sum(finding.count for finding in self.findings if finding.severity == "error")

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return table rows: split, severity, count, meaning, examples."""
        return [
            (self.split, f.severity, str(f.count), MEANINGS[f.kind], _shorten(f.examples, f.count))
            for f in self.findings
        ]


def check_data(
    data: CocoData, *, num_queries: int | None, on_bad: Literal["error", "drop"], against: Mapping[int, str] | None
) -> tuple[CocoData, CheckReport]:
    """Check a split; with ``on_bad = "drop"`` the returned data lacks annotations with box-level findings.

    against: category id -> name of the training split, where a validation split is checked. num_queries: the most
    objects that an image of the training split may have; None: any number. Bad data is reported, not raised.
    """
    masks = {**_reference_masks(data, against), **_box_masks(data)}
    findings = _image_findings(data)
    severity: Severity = "dropped" if on_bad == "drop" else "error"
    for kind, mask in masks.items():
        level: Severity = "note" if kind == "box_clamped" else severity if kind in BOX_LEVEL else "error"
        rows = np.flatnonzero(mask)
        examples = tuple(_annotation(data, row) for row in rows[:_EXAMPLES])
        findings.append(Finding(kind, level, len(rows), examples))
    if on_bad == "drop":
        bad = np.logical_or.reduce([mask for kind, mask in masks.items() if kind in BOX_LEVEL])
        data = _keep(data, ~bad)
    if not (~data.ann_crowd).any():
        findings.append(Finding("no_objects", "error", 1, (str(data.annotation_file),)))
    findings += _renamed_categories(data, against or {})
    if data.split == "train" and num_queries is not None:
        findings.append(_crowded_images(data, num_queries))
    return data, CheckReport(data.split, tuple(finding for finding in findings if finding.count))


def raise_for_errors(reports: Sequence[CheckReport]) -> None:
    """Raise one DataError with a line for each kind of error in the reports, if there is any."""
    errors = [(report.split, f) for report in reports for f in report.findings if f.severity == "error"]
    if not errors:
        return
    total = sum(finding.count for _, finding in errors)
    lines = [f"the data has {total} problem{'s' if total > 1 else ''}:"]
    for split, finding in errors:
        lines.append(f"  {split:<5}  {finding.count:>7}  {MEANINGS[finding.kind]}")
        lines += [f"{'':18}{example}" for example in finding.examples]
        if finding.count > len(finding.examples):
            lines.append(f"{'':18}... and {finding.count - len(finding.examples)} more")
    droppable = sum(finding.count for _, finding in errors if finding.kind in BOX_LEVEL)
    if droppable == 0:
        lines.append("Correct the files or the recipe.")
    elif droppable == total:
        lines.append('Correct the files, or set data.on_bad = "drop" to leave out these boxes.')
    else:
        lines.append(f'Correct the files or the recipe; data.on_bad = "drop" helps for {droppable} of {total} only.')
    raise DataError("\n".join(lines))


def _reference_masks(data: CocoData, against: Mapping[int, str] | None) -> dict[str, _Mask]:
    """Return masks [M] of annotations whose ids are repeated or point nowhere."""
    repeated = np.ones(len(data.ann_ids), dtype=np.bool_)
    repeated[np.unique(data.ann_ids, return_index=True)[1]] = False
    unknown = positions(data.category_ids, data.ann_category) < 0
    masks: dict[str, _Mask] = {
        "annotation_duplicate_id": repeated,
        "image_unknown": data.ann_image < 0,
        "category_unknown": unknown,
    }
    if against is not None:
        masks["category_not_in_train"] = ~unknown & (positions(sorted(against), data.ann_category) < 0)
    return masks


def _renamed_categories(data: CocoData, against: Mapping[int, str]) -> list[Finding]:
    """Find categories with an id of the training split and another name."""
    renamed = [
        f"category id {number} of '{data.annotation_file.name}': {name!r}, in the training split {against[number]!r}"
        for number, name in zip(data.category_ids, data.category_names, strict=True)
        if against.get(number, name) != name
    ]
    return [Finding("category_renamed", "error", len(renamed), tuple(renamed[:_EXAMPLES]))]


def _box_masks(data: CocoData) -> dict[str, _Mask]:
    """Return masks [M] of annotations with a bad box; an annotation is in one of them at most."""
    left, top, box_width, box_height = data.ann_boxes.T
    with np.errstate(over="ignore", invalid="ignore"):
        right, bottom = left + box_width, top + box_height
        finite = np.isfinite(data.ann_boxes).all(axis=1) & np.isfinite(right) & np.isfinite(bottom)
        width, height = _image_sides(data)
        no_area = (box_width <= 0) | (box_height <= 0)
        inside_width = np.minimum(right, width) - np.maximum(left, 0)
        inside_height = np.minimum(bottom, height) - np.maximum(top, 0)
    known = np.isfinite(width)
    negative = known & ((left < -_TOLERANCE) | (top < -_TOLERANCE))
    outside = known & ((right > width + _TOLERANCE + _ROUNDING) | (bottom > height + _TOLERANCE + _ROUNDING))
    vanishes = no_area | (known & ~negative & ~outside & ((inside_width <= 0) | (inside_height <= 0)))
    over = (left < 0) | (top < 0) | (right > width + _ROUNDING) | (bottom > height + _ROUNDING)
    sound = finite & ~vanishes
    return {
        "box_not_finite": ~finite,
        "box_degenerate": finite & vanishes,
        "box_negative": sound & negative,
        "box_outside": sound & ~negative & outside,
        "box_clamped": sound & known & ~negative & ~outside & over,
    }


def _image_sides(data: CocoData) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return width and height of each annotation's image [M]; infinite where the file does not give them."""
    if len(data.image_ids) == 0:
        return np.full(len(data.ann_ids), np.inf), np.full(len(data.ann_ids), np.inf)
    sound = (data.ann_image >= 0) & (data.widths > 0)[data.ann_image] & (data.heights > 0)[data.ann_image]
    width = np.where(sound, data.widths[data.ann_image], np.inf)
    return width, np.where(sound, data.heights[data.ann_image], np.inf)


def _image_findings(data: CocoData) -> list[Finding]:
    """Find problems of images, files and categories: all of them are errors."""
    first = np.unique(data.image_ids, return_index=True)[1]
    repeated = np.setdiff1d(np.arange(len(data.image_ids)), first)
    original = positions(data.image_ids, data.image_ids[repeated])
    names, widths, heights = data.file_names, data.widths, data.heights
    sizes = np.flatnonzero((widths <= 0) | (heights <= 0))
    unsafe, missing = _file_problems(data)
    ids = data.category_ids
    texts = {
        "image_duplicate_id": [
            f"image id {data.image_ids[row]}: {names[row]!r} and {names[other]!r}"
            for row, other in zip(repeated, original, strict=True)
        ],
        "image_size": [f"{names[row]!r}: width {widths[row]}, height {heights[row]}" for row in sizes],
        "file_name_unsafe": [f"image id {data.image_ids[row]}: {names[row]!r}" for row in unsafe],
        "file_missing": [str(data.image_root / names[row]) for row in missing],
        "category_duplicate_id": [f"category id {a}" for a, b in pairwise(ids) if a == b],
    }
    return [Finding(kind, "error", len(lines), tuple(lines[:_EXAMPLES])) for kind, lines in texts.items()]


def _file_problems(data: CocoData) -> tuple[list[int], list[int]]:
    """Return the rows of images whose name leaves the folder, and whose file is missing; each folder is listed once."""
    root = data.image_root.resolve()
    listings: dict[str, dict[str, bool] | None] = {}
    unsafe, missing = [], []
    for row, name in enumerate(data.file_names):
        if is_unsafe_name(name):
            unsafe.append(row)
            continue
        folder, _, base = name.rpartition("/")
        if folder not in listings:
            listings[folder] = _listing(root / folder, root)
        listing = listings[folder]
        if listing is None:
            unsafe.append(row)
        elif base not in listing:
            missing.append(row)
        elif listing[base] and not (root / name).resolve().is_relative_to(root):
            unsafe.append(row)
    return unsafe, missing


def _listing(folder: Path, root: Path) -> dict[str, bool] | None:
    """List a folder: for each file whether it is a symbolic link; None if the folder lies outside ``root``."""
    if not folder.resolve().is_relative_to(root):
        return None
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
    except OSError:
        return {}


def is_unsafe_name(name: str) -> bool:
    """Return whether a file_name is no plain relative path: absolute, ``..``, ``~``, URL, backslash, NUL, ...

    Characters that unicode calls equivalent to dots and slashes count as such; characters that change the
    writing direction are refused.
    """
    plain = name if name.isascii() else unicodedata.normalize("NFKC", name)
    if not plain or plain.startswith(("/", "~")) or "\\" in plain or "://" in plain:
        return True
    if ".." in plain and ".." in plain.split("/"):
        return True
    if plain.count("/") != name.count("/"):
        return True
    if name.isascii():
        return not name.isprintable()
    return any(unicodedata.category(c) in ("Cc", "Cs") or unicodedata.bidirectional(c) in _TURNS for c in name)


def _crowded_images(data: CocoData, num_queries: int) -> Finding:
    """Find images with more objects than the model has queries, the fullest first."""
    rows = data.ann_image[~data.ann_crowd & (data.ann_image >= 0)]
    counts = np.bincount(rows, minlength=len(data.image_ids))
    over = np.flatnonzero(counts > num_queries)
    over = over[np.argsort(-counts[over], kind="stable")]
    limit = f"model.num_queries = {num_queries}"
    examples = [f"{data.file_names[row]!r}: {counts[row]} objects, {limit}" for row in over[:_EXAMPLES]]
    return Finding("too_many_objects", "error", len(over), tuple(examples))


def _annotation(data: CocoData, row: int) -> str:
    """Describe an annotation so that a person finds it in the file."""
    image = data.ann_image[row]
    name = repr(data.file_names[image]) if image >= 0 else f"image id {data.ann_image_id[row]} (unknown)"
    size = f" ({data.widths[image]} x {data.heights[image]})" if image >= 0 else ""
    box = ", ".join(f"{number:g}" for number in data.ann_boxes[row])
    category = data.ann_category[row]
    return f"annotation {data.ann_ids[row]} of {name}{size}: bbox [{box}], category id {category}"


def _keep(data: CocoData, mask: _Mask) -> CocoData:
    """Return the data with the annotations of a mask [M] only."""
    return replace(
        data,
        ann_ids=data.ann_ids[mask],
        ann_image=data.ann_image[mask],
        ann_image_id=data.ann_image_id[mask],
        ann_category=data.ann_category[mask],
        ann_boxes=data.ann_boxes[mask],
        ann_crowd=data.ann_crowd[mask],
        ann_area=data.ann_area[mask],
    )


def _shorten(examples: Sequence[str], count: int) -> str:
    """Join the examples into one cell."""
    more = f"; ... {count - len(examples)} more" if count > len(examples) else ""
    return "; ".join(examples) + more
