"""Record what training computes, so that a change that should change no number can be compared bit for bit.

    python tests/numbers/record.py OUT.json                # every variant below and every recipe
    python tests/numbers/record.py --compare A.json B.json # each difference; exit code 1 if a number differs
    python tests/numbers/record.py --fixtures OUT.json     # writes recipes.json and steps.json beside this file

Only the outside of the package is used: the commands, the recipes' keys, and the files of a run. Hashes and last bits
are of one machine and one torch; which ones is recorded too.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import platform
import random
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from PIL import Image

from samdetr.cli.main import main

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "recipes"
# of lines in metrics.jsonl: what no two runs have in common
TIMES = ("images_per_s", "data_wait", "memory_mb", "seconds", "time")
STEPS = 5
SHAPES = {
    "data.shapes.train_images": 4 * STEPS,
    "data.shapes.val_images": 3,
    "data.shapes.image_size": 64,
    "data.shapes.max_objects": 5,
}
REDUCED: dict[str, object] = SHAPES | {
    "run.seed": 7,
    "run.device": "cpu",
    "compute.precision": "fp32",
    "data.format": "shapes",
    "data.class_index": "contiguous",
    "data.workers": 0,
    "augment.train_sizes": [48, 56, 64],
    "augment.max_size": 96,
    "augment.eval_size": 64,
    "augment.eval_max_size": 96,
    "model.num_queries": 12,
    "model.backbone.weights": "none",
    "model.backbone.width": 16,
    "train.epochs": 1,
    "train.total_batch": 4,
    "train.micro_batch": 2,
    "train.log_every": 1,
    "eval.every": 1,
    "eval.top_k": 20,
}
CROP: dict[str, object] = {
    "augment.crop": 0.5,
    "augment.crop_resize_sizes": [64, 72],
    "augment.crop_min": 40,
    "augment.crop_max": 64,
}
BUCKETS: dict[str, object] = {"data.buckets": 2}
CLASSES, WITH_NO_OBJECT = {"model.num_classes": 8}, {"model.num_classes": 9}
TRANSFORMER: dict[str, object] = {
    "model.width": 32,
    "model.heads": 4,
    "model.encoder_layers": 1,
    "model.decoder_layers": 2,
    "model.ffn": 32,
    "model.dropout": 0.1,
}
REGIONS: dict[str, object] = {
    "model.backbone.norm": "batch",  # random weights without it overflow
    "model.regions.candidates_train": 100,
    "model.regions.candidates_eval": 50,
    "model.regions.proposals_train": 30,
    "model.regions.proposals_eval": 20,
    "model.regions.score_threshold": 0.0,
    "optim.warmup_steps": 2,
}
DETR = BUCKETS | CROP | CLASSES | TRANSFORMER
FASTER = BUCKETS | CROP | WITH_NO_OBJECT | REGIONS


class Variant(NamedTuple):
    """A recipe's file, and what is set in it besides `REDUCED`."""

    recipe: str
    keys: dict[str, object]
    code: int = 0  # that training ends with


VARIANTS = {
    "sam_detr": Variant("r50_12ep", DETR),
    "sam_detr_smca": Variant("r50_smca_12ep", DETR),
    "sam_detr_dc5": Variant("r50_dc5_12ep", DETR),
    "sam_detr_dc5_smca": Variant("r50_dc5_smca_50ep", DETR),
    "sam_detr_1point": Variant("r50_12ep_1point", DETR),
    "sam_detr_1point_reweighted": Variant("r50_12ep_1point_reweighted", DETR),
    "sam_detr_8points": Variant("r50_12ep_8points", DETR),
    "sam_detr_average": Variant("r50_12ep_average", DETR),
    "sam_detr_max": Variant("r50_12ep_max", DETR),
    "sam_detr_whole_image": Variant("r50_12ep_whole_image", DETR),
    "sam_detr_ms": Variant("r50_ms_12ep", DETR),
    "sam_detr_ms_smca": Variant("r50_ms_smca_12ep", DETR),
    "detr": Variant("detr_r50_500ep", DETR | WITH_NO_OBJECT),
    "detr_dc5": Variant("detr_r50_dc5_500ep", DETR | WITH_NO_OBJECT),
    "detr_focal": Variant("detr_focal_r50_12ep", DETR),
    "conditional_detr": Variant("conditional_detr_r50_12ep", DETR),
    "conditional_detr_dc5": Variant("conditional_detr_r50_dc5_12ep", DETR),
    "dab_detr": Variant("dab_detr_r50_50ep", DETR),
    "smca_detr": Variant("smca_detr_r50_12ep", DETR),
    "smca_detr_dc5": Variant("smca_detr_r50_dc5_12ep", DETR),
    "smca_detr_ms": Variant("smca_detr_r50_ms_50ep", DETR),
    "smca_detr_ms_attention": Variant("smca_detr_r50_ms_attention_50ep", DETR | {"model.encoder_layers": 3}),
    "deformable_detr": Variant("deformable_detr_r50_12ep", DETR),
    "deformable_detr_dc5": Variant("deformable_detr_r50_dc5_12ep", DETR),
    "deformable_detr_ms": Variant("deformable_detr_r50_ms_50ep", DETR),
    "deformable_detr_ms_refine": Variant("deformable_detr_r50_ms_refine_50ep", DETR),
    "deformable_detr_ms_two_stage": Variant("deformable_detr_r50_ms_two_stage_50ep", DETR),
    "faster_rcnn_c4": Variant("faster_rcnn_r50_c4_12ep", FASTER),
    "faster_rcnn_dc5": Variant("faster_rcnn_r50_dc5_12ep", FASTER | {"model.regions.hidden": 16}),
    "faster_rcnn_fpn": Variant("faster_rcnn_r50_fpn_108ep", FASTER | {"model.regions.hidden": 16, "model.width": 32}),
    "quickstart": Variant("quickstart", {"model.width": 32, "optim.warmup_steps": 2}),  # nothing cropped or dropped
    "small_scratch": Variant("small_scratch", CROP | CLASSES | {"model.width": 32, "optim.warmup_steps": 2}),
    "random_published": Variant(
        "r50_12ep", CROP | CLASSES | TRANSFORMER | {"data.batching": "random", "data.pixels": "published"}
    ),
    "average_of_weights": Variant("r50_12ep", DETR | {"optim.ema_decay": 0.99}),
    "cosine": Variant("r50_12ep", DETR | {"optim.schedule": "cosine", "optim.warmup_steps": 2}),
    "drop": Variant(
        "r50_12ep",
        DETR | {"data.shapes.train_images": 4, "train.epochs": STEPS, "optim.drop_epochs": [2, 4], "eval.every": STEPS},
    ),
    "padding_masked": Variant("r50_smca_12ep", DETR | {"model.padding": "masked"}),
    "bf16": Variant("r50_12ep", DETR | {"compute.precision": "bf16"}),
    "activation_checkpointing": Variant("r50_12ep", DETR | {"compute.activation_checkpointing": "layers"}),
    "skip": Variant("r50_12ep", DETR | {"train.on_nonfinite": "skip"}),
    "skipping": Variant(  # all steps after the first, whose update makes the weights useless, also for the evaluation
        "r50_12ep", DETR | {"train.on_nonfinite": "skip", "train.max_skips": 9, "optim.lr": 1e36}, code=1
    ),
    "sgd": Variant("r50_12ep", DETR | {"optim.optimizer": "sgd", "optim.momentum": 0.8, "optim.lr": 1e-3}),
}


def command(*arguments: str, code: int = 0) -> str:
    """Run ``samdetr ...`` in this process and return what it printed. Raises RuntimeError at another exit code."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(list(arguments))
        except SystemExit as end:
            ended = end.code
    if ended != code:
        raise RuntimeError(f"samdetr {' '.join(arguments)}: {ended}\n{out.getvalue()}")
    return out.getvalue()


def train_variant(name: str, folder: Path, shapes: Path) -> Path:
    """Train a variant in ``folder`` and return the folder of its run. shapes: where the pictures are kept."""
    keys = REDUCED | VARIANTS[name].keys
    keys |= {"run.name": name, "run.folder": str(folder), "data.shapes.folder": str(shapes)}
    settings = [word for key, value in keys.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    command("train", str(RECIPES / f"{VARIANTS[name].recipe}.toml"), *settings, code=VARIANTS[name].code)
    return folder / name / "1"


def lines_of(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of some kinds, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines if line["kind"] in kinds]


def tensors_hash(folder: Path) -> str:
    """Hash all tensors in a folder's safetensors files, whatever their names are; "" where there are none."""
    hashes = []
    for file in sorted(folder.glob("**/*.safetensors")):
        for _, tensor in safetensors.deserialize(file.read_bytes()):
            facts = f"{tensor['dtype']} {list(tensor['shape'])} ".encode()
            hashes.append(hashlib.sha256(facts + bytes(tensor["data"])).hexdigest())
    return text_hash(" ".join(sorted(hashes))) if hashes else ""


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def record_run(run: Path) -> dict[str, Any]:
    """Return what a run logged, and the hashes of its last checkpoint."""
    parts = {part: tensors_hash(run / "checkpoints" / "last" / part) for part in ("model", "optimizer", "average")}
    return {
        "steps": lines_of(run, "train"),
        "epochs_and_skips": lines_of(run, "epoch", "skip"),
        "evaluation": lines_of(run, "eval"),
        **parts,
    }


def record_variant(name: str, folder: Path, shapes: Path, photos: Path) -> dict[str, Any]:
    """Train a variant; return what its run logged and saved, and what ``samdetr predict`` finds in the photos."""
    run = train_variant(name, folder, shapes)
    if VARIANTS[name].code:
        return record_run(run)
    found = folder / name / "predictions"
    command("predict", str(run / "checkpoints" / "last"), str(photos), "--threshold", "0", "--output", str(found))
    text = (found / "predictions.json").read_text()
    detections = {"count": len(json.loads(text)["annotations"]), "sha256": text_hash(text)}
    return {**record_run(run), "detections": detections}


def make_photos(folder: Path) -> Path:
    """Draw two small pictures of rectangles in a new folder, and return it."""
    folder.mkdir()
    draw = random.Random(0)
    for number, size in enumerate(((64, 48), (50, 60))):
        picture = Image.new("RGB", size, (90, 120, 60))
        for _ in range(6):
            x, y = draw.randrange(size[0] - 12), draw.randrange(size[1] - 12)
            colour = tuple(draw.randrange(256) for _ in range(3))
            picture.paste(colour, (x, y, x + draw.randrange(5, 30), y + draw.randrange(5, 30)))
        picture.save(folder / f"{number}.png")
    return folder


def record_recipes() -> dict[str, dict[str, Any]]:
    """Return every recipe with all its keys, as ``--print-recipe`` resolves it, flat: ``section.key``."""
    files = sorted(RECIPES.glob("*.toml"))
    return {file.stem: dict(flat(tomllib.loads(command("train", str(file), "--print-recipe")))) for file in files}


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts, with dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def environment() -> dict[str, str]:
    """Return what decides the last bits besides the code."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    named = [
        facts[key] for key in ("model name", "cpu family", "model", "stepping") if key in facts
    ]  # names are shared
    return {
        "torch": torch.__version__,
        "cpu": " ".join(named) or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def record(names: list[str]) -> dict[str, Any]:
    """Record every recipe, and the runs of the variants in ``names``."""
    runs = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        photos = make_photos(folder / "photos")
        for name in names:
            began = time.perf_counter()
            runs[name] = record_variant(name, folder / "runs", folder / "shapes", photos)
            print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return {
        "environment": environment() | {"threads": str(torch.get_num_threads())},
        "recipes": record_recipes(),
        "runs": runs,
    }


def differences(one: Any, other: Any, place: str) -> Iterator[str]:
    """Yield a line for each number, text or key in which two recorded values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            if key not in one or key not in other:
                yield f"{place}.{key}: only in the {'second' if key in other else 'first'}"
            else:
                yield from differences(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from differences(left, right, f"{place}[{number}]")
    elif one != other:
        yield f"{place}: {one!r} != {other!r}"


def compare(first: dict[str, Any], second: dict[str, Any]) -> int:
    """Print what differs; return 1 if a number of a run or a recipe's value does, 0 if at most the sets of keys do."""
    for line in differences(first["environment"], second["environment"], "environment"):
        print(f"note: {line}")
    wrong = list(differences(first["runs"], second["runs"], "runs"))
    one_sided: Counter[str] = Counter()
    for name in sorted(first["recipes"].keys() | second["recipes"].keys()):
        before, after = first["recipes"].get(name), second["recipes"].get(name)
        if before is None or after is None:
            wrong.append(f"recipes.{name}: only in the {'second' if before is None else 'first'}")
            continue
        both = before.keys() & after.keys()
        wrong += differences(*({key: values[key] for key in both} for values in (before, after)), f"recipes.{name}")
        one_sided.update(f"vanished: {key} = {before[key]!r}" for key in before.keys() - after.keys())
        one_sided.update(f"appeared: {key} = {after[key]!r}" for key in after.keys() - before.keys())
    for line, count in sorted(one_sided.items()):
        print(f"note: {line}, in {count} recipes")
    for line in wrong:
        print(line)
    print(f"{len(first['runs'])} runs, {len(first['recipes'])} recipes: {len(wrong)} differences")
    return int(bool(wrong))


def summarise(run: dict[str, Any]) -> dict[str, Any]:
    """Return what steps.json has of a recorded run: losses, gradient norms, and hashes of all else that is compared."""
    return {
        "loss": [line["loss"] for line in run["steps"]],
        "grad_norm": [line["grad_norm"] for line in run["steps"]],
        **{part: run[part] for part in ("model", "optimizer", "average")},
        **{part: text_hash(json.dumps(run[part])) for part in ("steps", "epochs_and_skips", "evaluation")},
        "detections": run["detections"]["sha256"] if "detections" in run else "",
    }


def write_fixtures(recorded: dict[str, Any]) -> None:
    """Write the files that test_numbers.py compares with."""
    recipes = recorded["recipes"]
    common: dict[str, Any] = {}
    for key in sorted(set.intersection(*(set(values) for values in recipes.values()))):
        common[key] = json.loads(Counter(json.dumps(values[key]) for values in recipes.values()).most_common(1)[0][0])
    own = {
        name: {key: value for key, value in values.items() if key not in common or value != common[key]}
        for name, values in recipes.items()
    }
    _write(HERE / "recipes.json", {"defaults": common, **own})
    _write(
        HERE / "steps.json",
        {
            "environment": recorded["environment"],
            "runs": {name: summarise(run) for name, run in recorded["runs"].items()},
        },
    )


def _write(file: Path, content: dict[str, Any]) -> None:
    """Write JSON with one line for each entry of the second level."""
    rows = []
    for name, entries in content.items():
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        rows.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    file.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def command_line() -> int:
    """Do what the arguments ask, and return the exit code."""
    parser = argparse.ArgumentParser(description="Record numbers, or compare two records.")
    parser.add_argument("out", nargs="?", type=Path, help="where the record is written")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"))
    parser.add_argument("--fixtures", type=Path, metavar="OUT", help="write the test's fixtures from a record")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    if arguments.compare:
        return compare(*(json.loads(file.read_text()) for file in arguments.compare))
    if arguments.fixtures:
        write_fixtures(json.loads(arguments.fixtures.read_text()))
    elif arguments.out:
        torch.set_num_threads(arguments.threads)
        arguments.out.write_text(json.dumps(record(arguments.only), indent=1))
    else:
        parser.error("give OUT.json, --compare or --fixtures")
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
