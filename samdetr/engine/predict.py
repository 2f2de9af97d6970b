"""Detections on photos that need no annotations: drawn pictures and a COCO results file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from samdetr.data.decode import decode_image
from samdetr.data.transforms import build_eval_transform
from samdetr.engine.checkpoint.weights import load_trained
from samdetr.engine.coco import CocoDetections, coco_detections
from samdetr.engine.compute.precision import autocast, choose_device, choose_precision
from samdetr.engine.evaluate import best_detections
from samdetr.engine.failures.out_of_memory import START_UP, explain_place
from samdetr.engine.run.log import print_line
from samdetr.errors import DataError, SamdetrError
from samdetr.visualize.predictions import draw_detections, save_png

RESULTS_FILE = "predictions.json"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@torch.no_grad()
def predict(checkpoint: str, source: str, *, output: str, threshold: float) -> None:
    """Write ``<output>/<photo>.png`` for each photo and ``<output>/predictions.json`` for all of them.

    source: a photo or a folder of photos. threshold: lowest score kept. The JSON has the images with the ids that
    its annotations name, the categories, and for every detection bbox (x, y, w, h in pixels) and score.
    A photo that cannot be read is left out and named at the end. Raises SamdetrError then, and when nothing can be
    read or written, or the folder holds an earlier prediction. Where no photo can be read, nothing is written.
    """
    photos = find_photos(Path(source))
    folder = Path(output)
    if (folder / RESULTS_FILE).exists():
        raise SamdetrError(f"{folder} holds an earlier prediction: choose another --output, or delete it.")
    model, recipe, categories, _ = load_trained(checkpoint)
    device = choose_device(
        "cpu" if recipe.run.device == "cpu" else "auto",  # "cuda" was the training machine's
        recipe.compute.kernels,
    )
    with explain_place(device, START_UP):
        model.to(device).eval()
    precision = choose_precision(recipe.compute.precision, device)
    transform = build_eval_transform(recipe.augment)
    by_id = dict(zip(categories.ids, categories.names, strict=True))
    console = Console()
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    unreadable: list[str] = []
    for number, photo in enumerate(photos, start=1):
        try:
            pixels = decode_image(photo, max_pixels=recipe.data.max_pixels)
        except DataError as error:
            unreadable.append(str(error))
            continue
        _make_folder(folder)
        image, _, _ = transform(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        with explain_place(device, f"the prediction of {photo}"), autocast(precision, device):
            outputs = model(image[None].to(device), torch.tensor([image.shape[-2:]], device=device))
            original = torch.tensor([pixels.shape[-2:]], device=device)
            found = best_detections(outputs, original, recipe.eval.top_k, recipe.loss.classification)
        every = coco_detections(found, [number], categories)
        kept = every.where(every.scores >= threshold)
        images.append({"id": number, "file_name": photo.name, "width": pixels.shape[2], "height": pixels.shape[1]})
        for line in kept.lines():
            area = line["bbox"][2] * line["bbox"][3]
            annotations.append({"id": len(annotations) + 1, **line, "area": area, "iscrowd": 0})
        save_png(folder / f"{photo.name}.png", draw_kept(pixels, kept, by_id))
        objects = "1 object" if len(kept) == 1 else f"{len(kept) or 'no'} objects"
        objects += "" if len(kept) else f" with a score of {threshold:g} or more"
        print_line(console, f"{photo}: {objects}")
    if images:
        category_rows = [{"id": number, "name": name} for number, name in by_id.items()]
        _write_json(folder / RESULTS_FILE, {"images": images, "categories": category_rows, "annotations": annotations})
        print_line(console, f"pictures and {RESULTS_FILE} are in {folder}")
    if unreadable:
        raise DataError(f"{len(unreadable)} of {len(photos)} photos could not be read: " + "; ".join(unreadable[:10]))


def draw_kept(pixels: Tensor, kept: CocoDetections, names: dict[int, str]) -> Tensor:
    """Draw the detections on the photo, uint8 [3, H, W]. names: by category id."""
    boxes = torch.from_numpy(kept.boxes).float()
    corners = torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=-1)
    labels = [names[number] for number in kept.category_ids.tolist()]
    return draw_detections(pixels, corners, labels, kept.scores.tolist())


def find_photos(source: Path) -> list[Path]:
    """List the photo, or the photos of the folder by name. Raises DataError when there is none."""
    if source.is_dir():
        photos = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES)
        if not photos:
            raise DataError(f"{source} holds no photos ({', '.join(SUFFIXES)}).")
        return photos
    if not source.is_file():
        raise DataError(f"there is no photo or folder {source}.")
    return [source]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SamdetrError(f"cannot write to {folder} ({error.strerror}): choose another --output.") from error


def _write_json(file: Path, content: dict[str, list[dict[str, object]]]) -> None:
    """Write the whole file or none: half of one would be taken for an earlier prediction."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1))
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SamdetrError(f"cannot write {file} ({error.strerror}).") from error
