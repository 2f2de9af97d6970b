"""The strict loader: every mistake with its line and a suggestion, overrides, and the shipped recipes."""

from __future__ import annotations

import re
import string
import textwrap
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import get_args

import pytest

from samdetr.errors import RecipeError
from samdetr.recipe import Recipe, dump_recipe, load_recipe
from samdetr.recipe.loading import key_lines
from samdetr.recipe.messages import keys_of

SYSTEMS = (
    *("sam_detr", "sam_detr_ms", "detr", "conditional_detr", "dab_detr"),
    *("smca_detr", "smca_detr_ms", "deformable_detr", "faster_rcnn"),
)
RECIPES = sorted(Path(__file__).parents[2].glob("recipes/*.toml"))
PUBLISHED = {  # epochs, drop epoch, total batch, norm of the input projection, dilation, SMCA
    "r50_12ep": (12, (10,), 16, "group_norm", False, False),
    "r50_50ep": (50, (40,), 16, "none", False, False),
    "r50_smca_12ep": (12, (10,), 16, "group_norm", False, True),
    "r50_smca_50ep": (50, (40,), 16, "none", False, True),
    "r50_dc5_12ep": (12, (10,), 8, "group_norm", True, False),
    "r50_dc5_50ep": (50, (40,), 8, "none", True, False),
    "r50_dc5_smca_12ep": (12, (10,), 8, "group_norm", True, True),
    "r50_dc5_smca_50ep": (50, (40,), 8, "none", True, True),
    "r50_ms_12ep": (12, (10,), 16, "group_norm", False, False),
    "r50_ms_50ep": (50, (40,), 16, "group_norm", False, False),
    "r50_ms_smca_12ep": (12, (10,), 16, "group_norm", False, True),
    "r50_ms_smca_50ep": (50, (40,), 16, "group_norm", False, True),
}
PUBLISHED_DETR = {  # epochs, drop epoch, total batch, queries, dilation
    "detr_r50_500ep": (500, (400,), 64, 100, False),
    "detr_r50_dc5_500ep": (500, (400,), 64, 100, True),
    "detr_focal_r50_12ep": (12, (10,), 16, 300, False),
    "detr_focal_r50_50ep": (50, (40,), 16, 300, False),
    "detr_focal_r50_dc5_12ep": (12, (10,), 16, 300, True),
    "detr_focal_r50_dc5_50ep": (50, (40,), 16, 300, True),
}
PUBLISHED_CONDITIONAL = {  # epochs, drop epoch, total batch, dilation
    "conditional_detr_r50_12ep": (12, (10,), 16, False),
    "conditional_detr_r50_50ep": (50, (40,), 16, False),
    "conditional_detr_r50_dc5_12ep": (12, (10,), 8, True),
    "conditional_detr_r50_dc5_50ep": (50, (40,), 8, True),
}
PUBLISHED_SMCA = {  # epochs, drop epoch, total batch, dilation
    "smca_detr_r50_12ep": (12, (10,), 16, False),
    "smca_detr_r50_50ep": (50, (40,), 16, False),
    "smca_detr_r50_dc5_12ep": (12, (10,), 16, True),
    "smca_detr_r50_dc5_50ep": (50, (40,), 16, True),
}
SMCA_MS = {"smca_detr_r50_ms_50ep": ("convolution", 500), "smca_detr_r50_ms_attention_50ep": ("attention", 300)}
PUBLISHED_RCNN = {  # epochs, drop epochs, stages, dilation, candidates and proposals in training
    "faster_rcnn_r50_c4_12ep": (12, (8, 11), 3, False, 12000, 2000),
    "faster_rcnn_r50_c4_36ep": (36, (28, 33), 3, False, 12000, 2000),
    "faster_rcnn_r50_dc5_12ep": (12, (8, 11), 4, True, 12000, 2000),
    "faster_rcnn_r50_dc5_36ep": (36, (28, 33), 4, True, 12000, 2000),
    "faster_rcnn_r50_dc5_108ep": (108, (100, 105), 4, True, 12000, 2000),
    "faster_rcnn_r50_fpn_108ep": (108, (100, 105), 4, False, 2000, 1000),
}
OURS = (  # rows of no published table
    "quickstart",
    "small_scratch",
    "smca_detr_r50_dc5_50ep",
    "smca_detr_r50_ms_50ep",
    "deformable_detr_r50_ms_refine_50ep",
    "deformable_detr_r50_ms_two_stage_50ep",
)


def write(folder: Path, text: str, name: str = "x.toml") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text).lstrip("\n"))
    return path


def mistakes(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]


def test_defaults_and_name_of_the_file(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "", "mine.toml"))
    assert recipe.run.name == "mine"
    assert recipe.model_copy(update={"run": Recipe().run}) == Recipe()
    assert load_recipe(write(tmp_path, '[run]\nname = "other"')).run.name == "other"


def test_integers_become_floats_and_arrays_become_tuples(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "[optim]\nlr = 1\ndrop_epochs = [3, 9]"))
    assert (recipe.optim.lr, type(recipe.optim.lr)) == (1.0, float)
    assert recipe.optim.drop_epochs == (3, 9)


def test_all_mistakes_at_once_with_lines_and_suggestions(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        epochs = 3
        [optim]
        lrr = 1
        lr = "fast"
        backbone_lr = -1
        drop_epochs = [
          3,  # a comment with ] and [
          "b",
        ]
        [optm]
        lr = 1
        [train]
        total_batch = 5
        epochs = true
        [model]
        num_classes = 2.5
        heads = 7
        backbone = {name = "resnet51", dilation = 1}
        [model.bakbone]
        """,
    )
    assert mistakes(path) == [
        "1: epochs: unknown key. Did you mean train.epochs?",
        "3: optim.lrr: unknown key. Did you mean optim.lr?",
        '4: optim.lr: expected a number, got the string "fast"',
        "5: optim.backbone_lr: must be >= 0 (got -1)",
        '6: optim.drop_epochs[1]: expected a whole number, got the string "b"',
        "10: optm: unknown section. Did you mean optim?",
        "12: train.micro_batch: must divide train.total_batch, 5 (got 2)",
        "14: train.epochs: expected a whole number, got true",
        "16: model.num_classes: expected a whole number, got the number 2.5",
        "17: model.heads: must divide model.width, 256 (got 7)",
        '18: model.backbone.name: expected "resnet10", "resnet18", "resnet34", "resnet50" or "resnet101", '
        'got the string "resnet51". Did you mean "resnet50"?',
        "18: model.backbone.dilation: expected true or false, got the whole number 1",
        "19: model.bakbone: unknown section. Did you mean model.backbone?",
    ]


ONE_MISTAKE = """
optim.lr = inf                    | optim.lr: must be a finite number (got inf)
optim.lr = nan                    | optim.lr: must be a finite number (got nan)
optim.lr = 0                      | optim.lr: must be > 0 (got 0)
optim.drop_epochs = [9, 3]        | optim.drop_epochs: must ascend (got [9, 3])
optim.drop_epochs = [3, 3]        | optim.drop_epochs: must ascend (got [3, 3])
data.workers = 1979-05-27         | data.workers: expected a whole number, got the date or time 1979-05-27
data.resize = "device" \
    | data.resize: unknown key. data has format, train_images, train_annotations, val_images, val_annotations, \
class_index, on_bad, max_pixels, workers, batching, buckets, bucket_grid, pixels, shapes.
data.buckets = 1                  | data.buckets: must be >= 2 (got 1)
data.format = "voc"               | data.format: expected "coco" or "shapes", got the string "voc"
run = 3                           | run: expected a section, got the whole number 3
run.name = 3                      | run.name: expected a string, got the whole number 3 (put it in quotes)
run.name = "a/b"                  | run.name: must be a plain folder name, without slashes (got "a/b")
run.name = ".."                   | run.name: must be a plain folder name, without slashes (got "..")
augment.train_sizes = []          | augment.train_sizes: must not be empty
augment.train_sizes = 3           | augment.train_sizes: expected an array, got the whole number 3
augment.max_size = 799 \
    | augment.max_size: must be at least the largest of augment.train_sizes, 800 (got 799)
augment.crop_max = 383            | augment.crop_max: must be at least augment.crop_min, 384 (got 383)
augment.eval_max_size = 1         | augment.eval_max_size: must be at least augment.eval_size, 800 (got 1)
model.dropout = 1.0               | model.dropout: must be < 1 (got 1.0)
model.width = 36                  | model.width: must be a multiple of 8 (got 36)
model.width = 40 \
    | model.input_norm: "group_norm" has 32 groups, which do not divide model.width, 40
model.backbone.width = 32 \
    | model.backbone.width: must be 64 with model.backbone.weights = "imagenet" (got 32)
model.backbone = {name = "resnet18", dilation = true} \
    | model.backbone.dilation: resnet18 cannot be dilated; use resnet50 or resnet101
model.backbone = {stages = 3, dilation = true} \
    | model.backbone.stages: must be 4 with model.backbone.dilation, which changes the fourth stage (got 3)
model = {system = "detr", smca = true} \
    | model.smca: unknown key. It belongs to systems sam_detr, sam_detr_ms; the system of this recipe is detr.
model = {system = "sam_detr", class_prior = 0.0} \
    | model.class_prior: unknown key. It belongs to system detr; the system of this recipe is sam_detr.
model.smca_stride = "feature" \
    | model.smca_stride: unknown key. It belongs to system smca_detr; the system of this recipe is sam_detr.
model.smca_strid = "feature" \
    | model.smca_strid: unknown key. Did you mean model.smca_stride, which belongs to system smca_detr?
model.system = "smca_dert" \
    | model.system: expected "sam_detr", "sam_detr_ms", "detr", "conditional_detr", "dab_detr", "smca_detr", \
"smca_detr_ms", "deformable_detr" or "faster_rcnn", got the string "smca_dert". Did you mean "smca_detr"?
model.system = 3 \
    | model.system: expected "sam_detr", "sam_detr_ms", "detr", "conditional_detr", "dab_detr", "smca_detr", \
"smca_detr_ms", "deformable_detr" or "faster_rcnn", got the whole number 3
model = 3                         | model: expected a section, got the whole number 3
model = {system = "detr", regions.hidden = 8} \
    | model.regions: unknown section. It belongs to system faster_rcnn; the system of this recipe is detr.
model = {system = "detr", bakbone.width = 8} \
    | model.bakbone: unknown section. Did you mean model.backbone?
model = {system = "detr", backbone.widht = 8} \
    | model.backbone.widht: unknown key. Did you mean model.backbone.width?
model = {system = "smca_detr", smca_stride = "image"} \
    | model.smca_stride: expected "published" or "feature", got the string "image"
smca_stride = "feature"           | smca_stride: unknown key. Did you mean model.smca_stride?
model = {system = "deformable_detr", feature_levels = 4, backbone.stages = 2} \
    | model.feature_levels: model.backbone.stages must be at least 3 with model.feature_levels = 4 (got 2)
model = {system = "sam_detr_ms", width = 40} \
    | model.width: must be a multiple of 32, the groups of the input norm (got 40)
loss = {classification = "softmax", focal_gamma = 1} \
    | loss.focal_gamma: has no meaning with loss.classification = "softmax": leave it out
loss.no_object_weight = 0.2 \
    | loss.no_object_weight: has no meaning with loss.classification = "focal": leave it out
init = {official = "a.pth", checkpoint = "b"} \
    | init.checkpoint: init.official is set too; a run starts from one of them
zzzzzz = 1 \
    | zzzzzz: unknown key. The sections are run, compute, parallel, init, data, augment, model, \
loss, optim, train, checkpoint, eval.
eval.zzzzzz = 1                   | eval.zzzzzz: unknown key. eval has every, batch, top_k, evaluator.
data.shapes.zzzzzz = 1 \
    | data.shapes.zzzzzz: unknown key. data.shapes has folder, train_images, val_images, image_size, max_objects, seed.
run.device = "gpu" \
    | run.device: expected "auto", "cpu" or "cuda", got the string "gpu". Did you mean "cuda"?
"""


@pytest.mark.parametrize("case", ONE_MISTAKE.strip().splitlines(), ids=lambda case: case.split("|")[0].strip())
def test_one_mistake(tmp_path: Path, case: str) -> None:
    text, expected = (part.strip() for part in case.split("|"))
    assert mistakes(write(tmp_path, f"# a comment\n{text}\n")) == [f"2: {expected}"]


def test_not_toml(tmp_path: Path) -> None:
    assert mistakes(write(tmp_path, "[optim]\nlr = \n")) == ["2: not valid TOML: Invalid value"]
    assert mistakes(write(tmp_path, '[optim]\nlr = """\n'))[0].startswith("3: not valid TOML: ")
    assert mistakes(write(tmp_path, "[run]\n[run]"))[0].startswith("2: not valid TOML: ")


def test_unreadable_files(tmp_path: Path) -> None:
    assert mistakes(tmp_path / "none.toml") == [" there is no such recipe file"]
    assert mistakes(tmp_path) == [" this is a folder: give a recipe file; that of a run is its recipe.toml"]
    (tmp_path / "latin.toml").write_bytes(b'[run]\nname = "\xe9"')
    assert mistakes(tmp_path / "latin.toml")[0].startswith(" the recipe cannot be read: ")


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "[optim]\nlr = 1e-3")
    overrides = [
        "optim.lr=2",
        "model.backbone.weights=none",
        "data.train_images=/data/a=b",
        "data.shapes.train_images=7",
        "augment.train_sizes=[64, 96]",
        'run.name="3"',
        "model.smca=true",
        "init.official=",
    ]
    recipe = load_recipe(path, overrides)
    assert recipe.optim.lr == 2.0
    assert recipe.model.backbone.weights == "none"
    assert recipe.data.train_images == "/data/a=b"
    assert recipe.data.shapes.train_images == 7
    assert recipe.augment.train_sizes == (64, 96)
    assert recipe.run.name == "3"
    assert recipe.model.smca is True
    assert recipe.init.official == ""


def test_override_mistakes_follow_those_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[optim]\nlr = 1e-3\nclip = 0.1\n[train]\nmicro_batch = 4")
    overrides = [
        "optim.lrr=1",
        "optim.lr=fast",
        "evl.every=2",
        "model.smca=yes",
        "train.total_batch=6",
        "optim",
        "optim.lr.x=1",
        "epochs=1",
        "seed = 1",
    ]
    assert mistakes(path, *overrides) == [
        "3: optim.clip: unknown key. Did you mean optim.clip_norm?",
        "5: train.micro_batch: must divide train.total_batch, 6 (got 4)",
        "--set optim.lrr=1: optim.lrr: unknown key. Did you mean optim.lr?",
        '--set optim.lr=fast: optim.lr: expected a number, got the string "fast"',
        "--set evl.every=2: evl: unknown section. Did you mean eval?",
        '--set model.smca=yes: model.smca: expected true or false, got the string "yes"',
        "--set optim: expected section.key=value",
        "--set optim.lr.x=1: optim.lr is a value, not a section",
        "--set epochs=1: expected section.key=value. Did you mean train.epochs?",
        "--set seed = 1: expected section.key=value. Did you mean run.seed or data.shapes.seed?",
    ]


def keys_of_all_systems() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every key once, with the first system that has it."""
    seen = set()
    for system in SYSTEMS:
        for keys, _ in keys_of(Recipe, system):
            if keys not in seen and keys != ("model", "system"):
                seen.add(keys)
                yield system, keys


def test_single_edit_typos_get_the_right_suggestion(tmp_path: Path) -> None:
    right, wrong = 0, []
    for system, keys in keys_of_all_systems():
        name, letters = keys[-1], string.ascii_lowercase
        middle = len(name) // 2
        typos = {
            name[:middle] + name[middle + 1 :],
            name[:middle] + letters[len(name)] + name[middle:],
            name[:middle] + letters[len(name)] + name[middle + 1 :],
            name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :],
        } - {key[-1] for key, _ in keys_of(Recipe)}
        for typo in typos - {""}:
            text = f'model.system = "{system}"\n{".".join([*keys[:-1], typo])} = 1'
            line = next(line for line in mistakes(write(tmp_path, text)) if line.startswith("2: "))
            if line.endswith(f" Did you mean {'.'.join(keys)}?"):
                right += 1
            else:
                wrong.append(line)
    assert right > 200
    assert right / (right + len(wrong)) >= 0.9, wrong


def test_key_lines() -> None:
    text = textwrap.dedent(
        '''\
        top = 1   # [not.a.table]
        "quoted # key" = "a # [b] = \\" c"
        a.b . 'c d' = [ 1, [2,
          3], # ] comment
          "]", """x
        ] = [y]""" ,
        ]
        t = """
        [no]
        no = 1 \\""" ""\"""
        l = \'\'\'
        [no]\'\'\'
        e = {}
        f = []
        inline = { x = 1, y = { z = [ 4, 5 ] }, w.v = 'a}' }
        [one . "two"]
        key = 1979-05-27T07:32:00Z # c

        [[many]]
        k = -1e-3
        [[many]]
        m = inf'''
    )
    assert key_lines(text) == {
        ("top",): 1,
        ("quoted # key",): 2,
        ("a",): 3,
        ("a", "b"): 3,
        ("a", "b", "c d"): 3,
        ("t",): 8,
        ("l",): 11,
        ("e",): 13,
        ("f",): 14,
        ("inline",): 15,
        ("inline", "x"): 15,
        ("inline", "y"): 15,
        ("inline", "y", "z"): 15,
        ("inline", "w"): 15,
        ("inline", "w", "v"): 15,
        ("one",): 16,
        ("one", "two"): 16,
        ("one", "two", "key"): 17,
        ("many",): 19,
        ("many", "k"): 20,
        ("many", "m"): 22,
    }


def test_strings_survive_a_dump(tmp_path: Path) -> None:
    odd = 'a"b\\c\td\x7fé\U0001f600'
    path = write(tmp_path, "")
    recipe = load_recipe(path, ["optim.lr=1e-30", "optim.weight_decay=123456789012345678.0"])
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_images": odd})})
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.run.name == path.stem
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe
    header = path.read_text().split("\n[")[0]
    assert f"samdetr-train recipes/{path.name}" in header
    assert path.stem in OURS or re.search(
        "AP published (by the paper|in the .* repository.*), not yet reproduced", header
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_states_what_differs(path: Path) -> None:
    """Its system, the paths of its data, and only keys that differ from the defaults of the system."""
    recipe = load_recipe(path)
    defaults = Recipe().model_copy(update={"model": type(recipe.model)(), "run": Recipe().run})
    tables = {("data", "shapes"), ("model", "backbone"), ("model", "regions")}
    stated = {keys for keys in key_lines(path.read_text()) if len(keys) > 1} - tables
    always = {("model", "system")}
    if recipe.data.format == "coco":
        always |= {("data", f"{split}_{what}") for split in ("train", "val") for what in ("images", "annotations")}
    differing = {keys for keys in stated if value_at(recipe, keys) != value_at(defaults, keys)}
    assert stated == differing | always


def value_at(recipe: Recipe, keys: tuple[str | int, ...]) -> object:
    return attrgetter(".".join(map(str, keys)))(recipe)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules(name: str) -> None:
    recipe = load_recipe(next(path for path in RECIPES if path.stem == name))
    model, optim, train = recipe.model, recipe.optim, recipe.train
    found = (
        train.epochs,
        optim.drop_epochs,
        train.total_batch,
        "group_norm" if model.samples_maps else model.input_norm,
        model.backbone.dilation,
        model.smca,
    )
    assert found == PUBLISHED[name]
    assert (recipe.run.seed, recipe.eval.batch, recipe.data.on_bad, model.padding) == (
        42,
        1,
        "drop",
        "published",
    )
    # Everything else is the default, which is the published value.
    assert recipe.augment == Recipe().augment
    assert recipe.loss == Recipe().loss
    assert (optim.lr, optim.backbone_lr, optim.weight_decay, optim.clip_norm) == (1e-4, 1e-5, 1e-4, 0.1)
    assert (model.num_classes, model.num_queries, model.width, model.ffn) == (91, 300, 256, 2048)


@pytest.mark.parametrize("name", PUBLISHED_DETR)
def test_published_schedules_of_detr(name: str) -> None:
    recipe = load_recipe(next(path for path in RECIPES if path.stem == name))
    model, optim, train, loss = recipe.model, recipe.optim, recipe.train, recipe.loss
    found = (train.epochs, optim.drop_epochs, train.total_batch, model.num_queries, model.backbone.dilation)
    assert found == PUBLISHED_DETR[name]
    assert (model.system, model.num_classes, model.input_norm, model.padding) == ("detr", 92, "none", "published")
    assert (recipe.eval.batch, recipe.run.seed) == (1, 42)
    if "focal" in name:
        assert (loss, model.class_prior) == (Recipe().loss, 0.01)
    else:
        assert (loss.classification, loss.no_object_weight, model.class_prior) == ("softmax", 0.1, 0.0)
        assert (loss.class_weight, loss.l1_weight, loss.giou_weight) == (1, 5, 2)
        assert (loss.class_cost, loss.l1_cost, loss.giou_cost) == (1, 5, 2)
    assert recipe.augment == Recipe().augment
    assert (optim.lr, optim.backbone_lr, optim.weight_decay, optim.clip_norm) == (1e-4, 1e-5, 1e-4, 0.1)


@pytest.mark.parametrize("name", [*PUBLISHED_CONDITIONAL, *PUBLISHED_SMCA])
def test_published_schedules_of_other_systems(name: str) -> None:
    recipe = load_recipe(next(path for path in RECIPES if path.stem == name))
    model, optim, train = recipe.model, recipe.optim, recipe.train
    found = (train.epochs, optim.drop_epochs, train.total_batch, model.backbone.dilation)
    assert found == (PUBLISHED_CONDITIONAL | PUBLISHED_SMCA)[name]
    smca = name in PUBLISHED_SMCA
    assert (model.num_classes, model.num_queries, recipe.eval.top_k) == ((92, 300, 300) if smca else (91, 300, 100))
    assert (model.system, model.input_norm) == ("smca_detr" if smca else "conditional_detr", "none")
    assert (model.padding, recipe.eval.batch) == ("published", 1)
    assert not smca or model.smca_stride == "published"
    assert (recipe.augment, recipe.loss) == (Recipe().augment, Recipe().loss)
    assert (optim.lr, optim.backbone_lr, optim.weight_decay, optim.clip_norm) == (1e-4, 1e-5, 1e-4, 0.1)


@pytest.mark.parametrize("name", SMCA_MS)
def test_schedules_of_smca_detr_on_several_scales(name: str) -> None:
    """That of one scale, with what its command sets otherwise."""
    recipe, one_scale = (load_recipe(RECIPES[0].with_name(f"{stem}.toml")) for stem in (name, "smca_detr_r50_50ep"))
    own = {"system", "scale_encoder", "smca_stride", "input_norm", "encoder_layers", "ffn"}
    assert one_scale.model.input_norm == "none"
    assert (recipe.model.system, recipe.model.encoder_layers, recipe.model.ffn) == ("smca_detr_ms", 5, 1024)
    assert (recipe.model.scale_encoder, recipe.eval.top_k) == SMCA_MS[name]
    assert recipe.model.model_dump(exclude=own) == one_scale.model.model_dump(exclude=own)
    assert recipe.eval == one_scale.eval.model_copy(update={"top_k": recipe.eval.top_k})
    for section in ("augment", "loss", "optim", "train"):
        assert getattr(recipe, section) == getattr(one_scale, section)


def test_mistakes_of_smca_detr_on_several_scales() -> None:
    recipe = RECIPES[0].with_name("smca_detr_r50_ms_50ep.toml")
    for key, message in (
        (
            'input_norm="group_norm"',
            r"unknown key\. It belongs to systems sam_detr, detr, conditional_detr, dab_detr, s",
        ),
        ("backbone.dilation=true", r'with model\.system = "smca_detr_ms" stages must be at least 3 and dilation false'),
        ("backbone.stages=2", r'with model\.system = "smca_detr_ms" stages must be at least 3 and dilation false'),
        (
            'smca_stride="feature"',
            r"unknown key\. It belongs to system smca_detr; the system .* is smca_detr_ms",
        ),
        ("feature_levels=4", r"unknown key\. It belongs to systems sam_detr_ms, deformable_detr; "),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe, [f"model.{key}"])
    with pytest.raises(RecipeError, match=r"scale_encoder: unknown key\. It belongs to system smca_detr_ms; the s"):
        load_recipe(RECIPES[0].with_name("smca_detr_r50_50ep.toml"), ['model.scale_encoder="attention"'])


@pytest.mark.parametrize("name", PUBLISHED_RCNN)
def test_published_schedules_of_faster_rcnn(name: str) -> None:
    recipe = load_recipe(next(path for path in RECIPES if path.stem == name))
    model, optim, train = recipe.model, recipe.optim, recipe.train
    regions, stages = model.regions, (model.backbone.stages, model.backbone.dilation)
    found = (train.epochs, optim.drop_epochs, *stages, regions.candidates_train, regions.proposals_train)
    assert found == PUBLISHED_RCNN[name]
    assert (model.num_classes, recipe.data.class_index, model.num_queries, recipe.eval.top_k) == (
        81,
        "contiguous",
        100,
        100,
    )
    assert (regions.proposals_eval, regions.score_threshold, train.total_batch) == (1000, 0.05, 16)
    assert (optim.optimizer, optim.momentum, optim.warmup_steps) == ("sgd", 0.9, 1000)
    assert (optim.lr, optim.backbone_lr, optim.weight_decay, optim.clip_norm) == (0.02, 0.02, 1e-4, 0)
    assert (recipe.augment.train_sizes, recipe.augment.crop) == (tuple(range(640, 801, 32)), 0)


def test_every_key_is_described() -> None:
    models = get_args(Recipe.model_fields["model"].annotation)
    sections = [one for _, one in keys_of(Recipe) if hasattr(one, "model_fields")]
    assert len(models) == len(SYSTEMS)
    for section in {*models, *sections}:
        for name, field in section.model_fields.items():
            nested = hasattr(field.annotation, "model_fields")
            assert nested or re.search(r"\w", field.description or ""), (section, name)
