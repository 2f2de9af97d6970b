"""Recipes in and out: TOML files, changes by ``--set``, and the recipes stored with runs and checkpoints."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from samdetr.errors import RecipeError
from samdetr.recipe.messages import Keys, explain, keys_named, keys_of, place_of
from samdetr.recipe.recipe import Recipe
from samdetr.recipe.sections import Section

RECIPE_FILE, ENVIRONMENT_FILE = "recipe.toml", "environment.json"  # in the folder of every run
# Deleted keys and the values with which they changed nothing; smca_detr_ms was stored with input_norm = "none".
_FORMER = (("data", "resize", "worker"), ("model", "input_norm", "none"))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe, apply ``section.key=value`` overrides, and check everything.

    The value of an override is TOML; what is not valid TOML is taken as a string. A recipe without ``run.name`` gets
    the file's stem. The recipe in a run folder may be one that an earlier version wrote.

    Raises RecipeError with one line for each mistake: ``<path>:<line>: <key>: <mistake>``.
    """
    path = Path(path)
    text = _read(path)
    values = _parsed(text, path)
    if path.name == RECIPE_FILE and path.with_name(ENVIRONMENT_FILE).is_file():
        values = _without_former_keys(values)
    recipe = _validated(values, overrides, path, text)
    if recipe.run.name:
        return recipe
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": path.stem})})


def stored_recipe(values: dict[str, Any], place: str) -> Recipe:
    """Return the recipe of a checkpoint's JSON, which an earlier version may have written.

    place: checkpoint path, for messages. Raises RecipeError.
    """
    return _validated(_without_former_keys(values), (), place, "")


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return the recipe with ``section.key=value`` changes, checked as in `load_recipe`. Raises RecipeError."""
    return _validated(tomllib.loads(dump_recipe(recipe)), overrides, "the stored recipe", "")


def dump_recipe(recipe: Recipe) -> str:
    """Return the whole recipe as TOML with every key; `load_recipe` reads an equal recipe from it."""
    return "\n".join(_tables(recipe, "")).lstrip() + "\n"


def key_lines(text: str) -> dict[Keys, int]:
    """Return the line, from 1, where each table and each key of a valid TOML text first stands.

    A path is the tuple of keys: ``("data", "shapes", "seed")``. Of a value over several lines the first counts.
    """
    lines: dict[Keys, int] = {}
    table: Keys = ()
    statement, first = "", 1
    for number, line in enumerate(text.split("\n"), start=1):
        first = first if statement else number
        statement += line + "\n"
        try:
            values = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:  # the value goes on in the next line
            continue
        is_header, statement = statement.lstrip().startswith("["), ""
        paths = list(_paths(values, () if is_header else table))
        table = paths[-1] if is_header else table
        for path in paths:
            lines.setdefault(path, first)
    return lines


def _paths(values: dict[str, Any], parent: Keys) -> Iterator[Keys]:
    for key, value in values.items():
        yield (*parent, key)
        if isinstance(value, dict):
            yield from _paths(value, (*parent, key))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: this is a folder: give a recipe file; that of a run is its recipe.toml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the recipe cannot be read: {error}") from None


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # tomllib puts the place at the end of its message
        place = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        line = place[1] if place else text.count("\n") + 1
        message = re.sub(r" [(]at .*[)]$", "", str(error))
        raise RecipeError(f"{path}:{line}: not valid TOML: {message}") from None


def _without_former_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Return stored values without `_FORMER` and without the keys of other systems that have their default there.

    Recipes were once stored with the keys of all systems.
    """
    values = copy.deepcopy(values)
    sections = {name: section for name, section in values.items() if isinstance(section, dict)}
    own = {keys for keys, _ in keys_of(Recipe, sections.get("model", {}).get("system", "sam_detr"))}
    systems = [system().model_dump() for system in get_args(Recipe.model_fields["model"].annotation)]
    of_systems = (("model", key, default) for system in systems for key, default in system.items())
    for name, key, former in (*_FORMER, *of_systems):
        if (name, key) not in own and sections.get(name, {}).get(key) == former:
            del sections[name][key]
    return values


def _validated(values: dict[str, Any], overrides: Sequence[str], place: Path | str, text: str) -> Recipe:
    """Return the recipe of ``values`` after the overrides; ``place`` and ``text`` are where the values stand."""
    overridden: dict[Keys, str] = {}
    mistakes = []
    for override in overrides:
        try:
            overridden[_apply_override(values, override)] = override
        except ValueError as error:
            meant = keys_named(override.partition("=")[0].strip(), Recipe)
            hint = f". Did you mean {' or '.join(meant)}?" if meant else ""
            mistakes.append(f"--set {override}: {error}{hint}")
    try:
        recipe = Recipe.model_validate(_with_tuples(values))
    except ValidationError as error:
        mistakes = _located(error, place, key_lines(text), overridden) + mistakes
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return recipe


def _apply_override(values: dict[str, Any], override: str) -> Keys:
    """Apply one ``section.key=value`` to the values and return its keys. Raises ValueError with the mistake."""
    name, equals, value = override.partition("=")
    keys = tuple(part.strip() for part in name.split("."))
    if not equals or len(keys) < 2 or not all(keys):
        raise ValueError("expected section.key=value")
    for depth, key in enumerate(keys[:-1], start=1):
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ValueError(f"{'.'.join(keys[:depth])} is a value, not a section")
    try:
        values[keys[-1]] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        values[keys[-1]] = value.strip()
    return keys


def _with_tuples(value: Any) -> Any:
    """Return the value with its arrays as tuples, which strict sections take."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value


def _located(
    error: ValidationError, place: Path | str, lines: dict[Keys, int], overridden: dict[Keys, str]
) -> list[str]:
    """Return the mistakes with their place in front: those of the file by line, then those of ``--set`` in order."""
    found: list[tuple[bool, int, str]] = []
    for entry in error.errors(include_url=False):
        keys = place_of(entry)
        explanation = explain(entry, Recipe)
        for position, (changed, override) in enumerate(overridden.items()):
            if keys[: len(changed)] == changed or (keys not in lines and changed[: len(keys)] == keys):
                found.append((True, position, f"--set {override}: {explanation}"))
                break
        else:
            line = next((lines[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in lines), 0)
            found.append((False, line, f"{place}:{line}: {explanation}" if line else f"{place}: {explanation}"))
    return [sentence for *_, sentence in sorted(found, key=lambda item: item[:2])]


def _tables(section: Section, name: str) -> list[str]:
    """Return the lines of a section and of those below it."""
    rows = [f"\n[{name}]"] if name else []
    below: list[str] = []
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, Section):
            below += _tables(value, f"{name}.{key}".removeprefix("."))
        else:
            rows.append(f"{key} = {_value_text(value)}")
    return rows + below


def _value_text(value: object) -> str:
    """Return a string, boolean, number or tuple of them as TOML."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(_value_text(item) for item in value)}]"
    return str(value).lower() if isinstance(value, bool) else repr(value)
