"""Time the data path on one core, published against fast: from files to the padded batch that a loader sends.

    OMP_NUM_THREADS=1 PYTHONPATH=.:kernels python perf/bench_data.py --out perf/records/<date>_cpu_data

Every variant loads the same micro-batches (same files, same draws, same padded shapes) of generated JPEGs of COCO's
sizes. Boxes must be equal and pixels within a few levels of 255, or no time is printed and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from perf.harness import measure
from perf.report import Report, Row, environment
from samdetr.data.batching import Sample, collate
from samdetr.data.buckets import BucketSampler, choose_buckets
from samdetr.data.datasets import CocoData, DetectionDataset, make_categories
from samdetr.data.decode import Pixels
from samdetr.data.device import to_device
from samdetr.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Plan, build_train_transform, resized_sides
from samdetr.recipe import AugmentSection, DataSection
from samdetr.structures import Batch, Categories

CPU = torch.device("cpu")
SIZES = ((480, 640),) * 9 + ((427, 640),) * 4 + ((640, 480),) * 4 + ((640, 427),) * 2 + ((375, 500),)  # (h, w)
SEED = 3
PUBLISHED, PARITY, FAST = "published (PIL throughout)", 'data.pixels = "published"', 'data.pixels = "fast"'
NORMALISED = f"{FAST}, normalised on this core"


class Files(NamedTuple):
    """Generated JPEGs."""

    data: CocoData
    kilobytes: float  # of one, on average


def texture(height: int, width: int, random: np.random.Generator) -> Image.Image:
    """Draw noise of many scales: a JPEG of 640 x 480 at quality 90 is about as large as COCO's photos."""
    pixels = random.normal(size=(height, width, 3)) * 3
    for cell in (2, 4, 8, 16, 32, 64, 128):
        for channel in range(3):
            coarse = random.normal(size=(-(-height // cell), -(-width // cell))).astype(np.float32)
            smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(smooth) * cell**0.5
    pixels = (pixels - pixels.mean()) / pixels.std() * 55 + 120
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def generate(folder: Path, count: int) -> Files:
    """Write ``count`` JPEGs of COCO's sizes with seven boxes each, COCO's mean."""
    random = np.random.default_rng(0)
    sides = np.array([SIZES[number % len(SIZES)] for number in range(count)])
    names = [f"{number}.jpg" for number in range(count)]
    for name, (height, width) in zip(names, sides.tolist(), strict=True):
        texture(height, width, random).save(folder / name, quality=90)
    owner = np.arange(count).repeat(7)
    boxes = random.uniform(0.05, 0.45, (len(owner), 4)) * sides[owner][:, [1, 0, 1, 0]]
    data = CocoData(
        split="train",
        image_root=folder,
        annotation_file=folder / "generated",
        category_ids=(1,),
        category_names=("thing",),
        image_ids=np.arange(count),
        file_names=names,
        widths=sides[:, 1],
        heights=sides[:, 0],
        ann_ids=np.arange(len(owner)),
        ann_image=owner,
        ann_image_id=owner,
        ann_category=np.ones(len(owner), np.int64),
        ann_boxes=boxes,
        ann_crowd=np.zeros(len(owner), np.bool_),
        ann_area=boxes[:, 2] * boxes[:, 3],
    )
    return Files(data, sum((folder / name).stat().st_size for name in names) / count / 1e3)


def published_image(path: Path, plan: Plan, max_size: int) -> Tensor:
    """Load a planned image as the published code does: PIL decodes, flips, resizes, crops; then float, normalised."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    if plan.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if plan.first:
        image = _resized(image, plan.first, None)
        top, left, height, width = plan.region
        image = image.crop((left, top, left + width, top + height))
    image = _resized(image, plan.size, max_size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    return F.normalize(pixels, list(IMAGENET_MEAN), list(IMAGENET_STD))


def _resized(image: Image.Image, size: int, max_size: int | None) -> Image.Image:
    """Resize with PIL by the published size rule."""
    high, wide = (int(side) for side in resized_sides(image.height, image.width, size, max_size))
    return image.resize((wide, high), Image.Resampling.BILINEAR)


def loads(files: Files, micro: int) -> dict[str, Callable[[int], Batch]]:
    """Return for each variant the function that loads a turn's micro-batch, as a loader process does."""
    data, section = files.data, DataSection()
    categories = make_categories(data, "contiguous", 1)
    parity, fast = _dataset(data, categories, "published"), _dataset(data, categories, "fast")
    transform = parity.train_transform()
    shapes = choose_buckets(transform, data.heights, data.widths, count=section.buckets, grid=section.bucket_grid)
    sampler = BucketSampler(parity.planned_sizes, len(parity), shapes, batch=micro, micro=micro, seed=SEED)
    batches = list(sampler)

    def ours(dataset: DetectionDataset, turn: int) -> Batch:
        chosen = batches[turn % len(batches)]
        return collate(dataset.load(chosen.keys), dataset.max_objects, chosen.shape)

    def published(turn: int) -> Batch:
        chosen, samples = batches[turn % len(batches)], []
        rows = [row for _, row in chosen.keys]
        plans = parity.plan(chosen.keys[0][0], np.array(rows))
        for place, row in enumerate(rows):
            image = published_image(data.image_root / data.file_names[row], plans.row(place), transform.max_size)
            nothing, size = torch.zeros(0, dtype=torch.int64), (int(data.heights[row]), int(data.widths[row]))
            samples.append(Sample(image, torch.zeros(0, 4), nothing, row, size))
        return collate(samples, parity.max_objects, chosen.shape)

    return {
        PUBLISHED: published,
        PARITY: partial(ours, parity),
        FAST: partial(ours, fast),
        NORMALISED: lambda turn: to_device(ours(fast, turn), CPU),
    }


def _dataset(data: CocoData, categories: Categories, pixels: Pixels) -> DetectionDataset:
    return DetectionDataset(
        data,
        categories,
        build_train_transform(AugmentSection(), raw=pixels == "fast"),
        seed=SEED,
        max_pixels=10**7,
        pixels=pixels,
    )


def check(variants: dict[str, Callable[[int], Batch]], report: Report, turns: int) -> bool:
    """Check, and print, that the fast batches have the published boxes, and pixels within the limits."""
    std = torch.tensor(IMAGENET_STD).reshape(3, 1, 1) * 255
    sound = True
    for name, other, limits in (
        (PUBLISHED, FAST, (3.0, 0.5)),
        (PARITY, FAST, (1.0, 0.02)),
    ):
        most, total, count = 0.0, 0.0, 0
        for turn in range(turns):
            want, got = variants[name](turn), to_device(variants[other](turn), CPU)
            difference = (want.images - got.images).abs() * std
            most = max(most, float(difference.max()))
            total, count = total + float(difference.sum()), count + int(3 * want.image_sizes.prod(dim=1).sum())
            if name == PARITY:
                sound &= all(torch.equal(a, b) for a, b in zip(want.targets, got.targets, strict=True))
        sound &= most <= limits[0] + 1e-3 and total / count <= limits[1]
        levels = {"most_levels": most, "mean_levels": total / count, "limits": limits}
        report.gates.append({"of": other, "against": name, **levels})
        report.note(f"pixels of {other} against {name}: at most {most:.2f} levels, on average {total / count:.4f}")
    if not sound:
        report.note("RED data: boxes or pixels of a fast path differ; no speed")
    return sound


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns its exit code."""
    parser = argparse.ArgumentParser(description="Images per second and core of the data path.")
    parser.add_argument("--images", type=int, default=120, help="generated JPEGs")
    parser.add_argument("--micro", type=int, default=16, help="images of a batch")
    parser.add_argument("--repeats", type=int, default=20, help="timed batches of each variant")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    report = Report("data", environment("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        files = generate(Path(folder), given.images)
        case = f"{given.images} JPEGs of {files.kilobytes:.0f} KB, batches of {given.micro}, one core"
        print(case, flush=True)
        variants = loads(files, given.micro)
        report.failed = not check(variants, report, min(given.repeats, given.images // given.micro))
        if not report.failed:
            report.rows = _rows(variants, case, given)
            print(f"  {'':44}{'ms / image':>12}{'p20':>8}{'p80':>8}{'images / s':>12}{'faster':>9}")
            for row in report.rows:
                cells = f"{row.ms:12.2f}{row.p20:8.2f}{row.p80:8.2f}{1e3 / row.ms:12.0f}{row.times_faster:9.2f}"
                print(f"  {row.variant:44}{cells}")
    report.complete = True
    report.write(given.out)
    return int(report.failed)


def _rows(variants: dict[str, Callable[[int], Batch]], case: str, given: argparse.Namespace) -> list[Row]:
    """Time each variant: milliseconds of one image."""
    timings = measure(variants, CPU, given.repeats)
    rows = []
    for name, timing in timings.items():
        if isinstance(timing, str):
            raise RuntimeError(f"{name}: {timing}")
        row = Row("data", case, "uint8" if name == FAST else "float32", "load", name, repeats=timing.repeats)
        row.ms, row.p20, row.p80 = (value / given.micro for value in timing[:3])
        rows.append(row)
    for row in rows:
        row.times_faster = rows[0].ms / row.ms
    return rows


if __name__ == "__main__":
    sys.exit(main())
