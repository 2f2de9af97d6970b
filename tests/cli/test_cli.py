"""The commands: what they pass on, how they fail, and how fast they answer."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# the train command asks these two how many processes to start: they stay the real ones
import samdetr.engine.distributed.launch
import samdetr.engine.distributed.parallel  # noqa: F401
from samdetr import __version__
from samdetr.cli.main import main, main_train
from samdetr.cli.train import mark_resume
from samdetr.errors import CheckpointError
from samdetr.recipe import Recipe, dump_recipe, load_recipe

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
WRONG_SIZES = ("0x800", "31x64", "64x31", "10001x64", "800", "wide", "", "-8x64", "800x1066x3", "9999999999x64")
SLOWEST_ANSWER = 1.0  # seconds; 0.5 is promised, the machine may be shared


def exit_code(command: Callable[[list[str]], object], *arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        command(list(arguments))
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Stands in for the engine; the list holds what the commands passed to it."""
    calls: list[object] = []

    def train(recipe: Recipe, *, resume: str | None, profile: bool) -> Path:
        calls.append((recipe, resume, "profile") if profile else (recipe, resume))
        return Path()

    def evaluate_checkpoint(path: str, *, overrides: list[str]) -> None:
        calls.append((path, overrides))

    def evaluate_official(path: str, recipe: Recipe) -> None:
        calls.append((path, recipe))

    def predict(checkpoint: str, source: str, *, output: str, threshold: float) -> None:
        calls.append((checkpoint, source, output, threshold))

    def report_recipes(recipes: dict[Path, Recipe], sizes: list[tuple[int, int]], form: str) -> None:
        calls.append((recipes, sizes, form))

    for name, functions in {
        "engine.train": [train],
        "engine.evaluate": [evaluate_checkpoint, evaluate_official],
        "engine.predict": [predict],
        "cost.report_text": [report_recipes],
    }.items():
        module = ModuleType(f"samdetr.{name}")
        for function in functions:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_train_passes_the_resolved_recipe(engine: list[object]) -> None:
    recipe = str(QUICKSTART)
    assert exit_code(main_train, recipe, "--set", "optim.lr=1", "--set", "run.name=b") == 0
    assert exit_code(main, "train", "--set", "optim.lr=1", recipe, "--set=run.name=b") == 0
    assert engine == [(load_recipe(recipe, ["optim.lr=1", "run.name=b"]), None)] * 2


def test_profile(engine: list[object]) -> None:
    assert exit_code(main_train, str(QUICKSTART), "--profile") == 0
    assert engine == [(load_recipe(QUICKSTART), None, "profile")]


@pytest.mark.parametrize(
    ("arguments", "resume"),
    [
        (["R"], None),
        (["R", "--resume"], ""),
        (["--resume", "R"], ""),
        (["R", "--resume", "runs/x/1"], "runs/x/1"),
        (["--resume", "runs/x/1", "R"], "runs/x/1"),
        (["--resume=runs/x/1", "R"], "runs/x/1"),
        (["R", "--resume", "--set", "optim.lr=1"], ""),
        (["R", "--resume", "runs/x/1", "--set", "optim.lr=1"], "runs/x/1"),
        (["--resume", "--", "R"], ""),
    ],
)
def test_resume(engine: list[object], arguments: list[str], resume: str | None) -> None:
    given = [str(QUICKSTART) if argument == "R" else argument for argument in arguments]
    assert exit_code(main_train, *given) == 0
    assert exit_code(main, "train", *given) == 0
    assert [call[1] for call in engine] == [resume, resume]  # type: ignore[index]


def test_resume_of_a_run_takes_its_recipe(
    engine: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    assert exit_code(main_train, "--resume", "run") == 1
    assert capsys.readouterr().err == "error: --resume: run is not a run folder (it has no recipe.toml).\n"
    Path("run/recipe.toml").write_text("[optim]\nlr = 0.5\n")
    assert exit_code(main_train, "--resume", "run", "--set", "train.epochs=3") == 0
    assert engine == [(load_recipe("run/recipe.toml", ["train.epochs=3"]), "run")]
    for arguments in (["--resume"], []):
        assert exit_code(main_train, *arguments) == 2
        assert "give a RECIPE" in capsys.readouterr().err


def test_the_recipe_of_an_old_run(engine: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has keys of other systems, which every command reads past."""
    stored = tmp_path / "recipe.toml"
    shutil.copy(ROOT / "tests" / "recipe" / "old_run.toml", stored)
    (tmp_path / "environment.json").write_text("{}")
    recipe = load_recipe(stored)
    assert exit_code(main_train, str(stored), "--print-recipe") == 0
    assert capsys.readouterr().out == dump_recipe(recipe)
    assert exit_code(main_train, str(stored)) == 0
    assert exit_code(main_train, "--resume", str(tmp_path)) == 0
    assert exit_code(main, "report", str(stored)) == 0
    assert exit_code(main, "eval", "--official", "f.pth", str(stored)) == 0
    trained, resumed = (recipe, None), (recipe, str(tmp_path))
    assert engine == [trained, resumed, ({stored: recipe}, [], "table"), ("f.pth", recipe)]


def test_mark_resume_leaves_other_values_alone() -> None:
    assert mark_resume(["--set", "--resume", "a.toml"]) == ["--set", "--resume", "a.toml"]
    assert mark_resume(["--", "--resume", "a"]) == ["--", "--resume", "a"]
    assert mark_resume(["--set"]) == ["--set"]


def test_print_recipe_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(main_train, str(QUICKSTART), "--print-recipe", "--set", "optim.lr=0.5") == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    assert load_recipe(printed) == load_recipe(QUICKSTART, ["optim.lr=0.5"])


def test_eval(engine: list[object]) -> None:
    assert exit_code(main, "eval", "runs/x/1", "--set", "eval.batch=2") == 0
    assert exit_code(main, "eval", "--official", "f.pth", str(QUICKSTART), "--set", "eval.batch=2") == 0
    assert engine == [("runs/x/1", ["eval.batch=2"]), ("f.pth", load_recipe(QUICKSTART, ["eval.batch=2"]))]


def test_eval_of_a_recipe_asks_for_a_checkpoint(engine: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(main, "eval", str(QUICKSTART)) == 2
    assert "official" in capsys.readouterr().err
    assert engine == []


def test_predict(engine: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(main, "predict", "best", "photos") == 0
    assert exit_code(main, "predict", "best", "a.jpg", "--output", "out", "--threshold", "0.5") == 0
    assert exit_code(main, "predict", "best", "a.jpg", "--threshold", "1.5") == 2
    assert "threshold" in capsys.readouterr().err
    assert engine == [("best", "photos", "predictions", 0.3), ("best", "a.jpg", "out", 0.5)]


def test_report(engine: list[object]) -> None:
    recipe = {QUICKSTART: load_recipe(QUICKSTART)}
    assert exit_code(main, "report", str(QUICKSTART)) == 0
    assert exit_code(main, "report", str(QUICKSTART), "--sizes", "64x96,32x10000", "--sizes", "64x96", "--json") == 0
    assert exit_code(main, "report", "--all", "--markdown") == 0
    assert exit_code(main, "report", str(QUICKSTART), "--set", "model.num_queries=7") == 0
    assert engine.pop() == ({QUICKSTART: load_recipe(QUICKSTART, ["model.num_queries=7"])}, [], "table")
    assert engine[:2] == [(recipe, [], "table"), (recipe, [(64, 96), (32, 10000)], "json")]
    everything, sizes, form = engine[2]  # type: ignore[misc]
    assert (list(everything), sizes, form) == (sorted((ROOT / "recipes").glob("*.toml")), [], "markdown")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give recipe files, or --all"),
        (["R", "--all"], "give recipe files, or --all"),
        (["R", "--json", "--markdown"], "one of --json and --markdown"),
        (["R", "--sizes", "800x1066", "800x1201"], "--sizes HxW,800x1201"),
        *((["R", "--sizes", f"64x64,{wrong}"], f'--sizes: "{wrong}" is not HEIGHTxWIDTH') for wrong in WRONG_SIZES),
    ],
)
def test_report_names_the_wrong_argument(
    engine: list[object], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(QUICKSTART) if argument == "R" else argument for argument in arguments]
    assert exit_code(main, "report", *given) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert engine == []


def test_report_of_all_needs_the_repository(
    engine: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("samdetr.cli.report.SHIPPED", tmp_path)
    assert exit_code(main, "report", "--all") == 2
    assert capsys.readouterr().err.startswith(f"--all: there are no recipes in {tmp_path}")


def test_recipe_mistakes_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text('[optim]\nlrr = 1\n[train]\nepochs = "many"\n')
    assert exit_code(main_train, "x.toml", "--set", "run.nam=a") == 2
    assert exit_code(main, "eval", "--official", "f.pth", "x.toml", "--set", "run.nam=a") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "x.toml:2: optim.lrr: unknown key. Did you mean optim.lr?",
        'x.toml:4: train.epochs: expected a whole number, got the string "many"',
        "--set run.nam=a: run.nam: unknown key. Did you mean run.name?",
    ] * 2  # fmt: skip


def test_other_problems_are_one_sentence(
    engine: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(checkpoint: str, source: str, *, output: str, threshold: float) -> None:
        raise CheckpointError("last.safetensors: is cut short; use best.safetensors.")

    monkeypatch.setattr(sys.modules["samdetr.engine.predict"], "predict", broken)
    assert exit_code(main, "predict", "a", "b") == 1
    assert capsys.readouterr().err == "error: last.safetensors: is cut short; use best.safetensors.\n"


def test_ctrl_c(engine: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(recipe: Recipe, *, resume: str | None, profile: bool) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["samdetr.engine.train"], "train", interrupted)
    monkeypatch.setattr("samdetr.cli.main._leave", sys.exit)  # not this process
    assert exit_code(main_train, str(QUICKSTART)) == 130


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(main, "trian") == 2
    assert "train" in capsys.readouterr().err
    assert exit_code(main_train, "--epochs", "3") == 2
    assert exit_code(main_train) == 2
    assert exit_code(main, "--version") == 0
    assert capsys.readouterr().out == f"samdetr {__version__}\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("from samdetr.cli.main import main_train; main_train(['--help'])", 0),
        ("from samdetr.cli.main import main; main(['predict', '--help'])", 0),
        ("from samdetr.cli.main import main; main(['report', '--help'])", 0),
        ("from samdetr.cli.main import main_train; main_train(['RECIPE', '--set', 'optim.lrr=1'])", 2),
        ("from samdetr.cli.main import main_train; main_train(['RECIPE', '--print-recipe'])", 0),
        ("import samdetr", 0),
    ],
    ids=["train --help", "predict --help", "report --help", "recipe error", "print recipe", "import"],
)
def test_answers_at_once_and_without_torch(code: str, status: int) -> None:
    code = code.replace("RECIPE", str(QUICKSTART))
    watched = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", watched], cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout.splitlines()[-1] == "False"
    assert statistics.median(seconds) < SLOWEST_ANSWER, seconds


def test_public_names() -> None:
    import samdetr

    assert set(samdetr.__all__) <= set(dir(samdetr))
    assert samdetr.load_recipe is load_recipe
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        samdetr.nothing  # noqa: B018
