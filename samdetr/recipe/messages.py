"""Sentences for pydantic's errors about a recipe: one for each mistake, with a suggestion."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time
from types import UnionType
from typing import Any, get_args

from pydantic import BaseModel

Keys = tuple[str | int, ...]  # a place in a recipe, with an index for an element of an array
Names = tuple[str, ...]

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "an array",
    "model_type": "a section",
    "model_attributes_type": "a section",
}
_OTHER_WORDS = {"gpu": "cuda"}
_LIMITS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}


def explain(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Return ``optim.lrr: unknown key. Did you mean optim.lr?`` for one entry of ``ValidationError.errors()``."""
    path = place_of(error)
    return f"{dotted(path)}: {_sentence(error, path, model)}"


def place_of(error: Mapping[str, Any]) -> Keys:
    """Return the keys of an error as they stand in a recipe: pydantic puts the chosen system behind "model"."""
    path: Keys = tuple(error["loc"])
    if error["type"].startswith("union_tag_"):
        return (*path, "system")
    return path[:1] + path[2:] if path[:1] == ("model",) else path


def dotted(path: Keys) -> str:
    """Return ``augment.train_sizes[1]`` for ``("augment", "train_sizes", 1)``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def keys_of(model: type[BaseModel], system: str = "", parent: Names = ()) -> Iterator[tuple[Names, Any]]:
    """Yield the path of every section and key of a recipe, sections before their keys, with its annotation.

    system: only its model keys; "": all systems', with repeats.
    """
    for name, field in model.model_fields.items():
        yield (*parent, name), field.annotation
        for section in _sections_in(field.annotation):
            if not system or _system_of(section) in ("", system):
                yield from keys_of(section, system, (*parent, name))


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the section of a field, all those of a union, or none."""
    members = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]


def _system_of(section: type[BaseModel]) -> str:
    """Return the system that a section of a detector belongs to, and "" for any other section."""
    return section.model_fields["system"].default if "system" in section.model_fields else ""


def _sentence(error: Mapping[str, Any], path: Keys, model: type[BaseModel]) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    system = error["loc"][1] if error["loc"][0] == "model" and len(error["loc"]) > 1 else ""
    if kind == "extra_forbidden":
        return _unknown(path, value, model, system)
    if kind == "union_tag_invalid":
        return _choice(value["system"], tuple(map(_system_of, _sections_in(model.model_fields["model"].annotation))))
    if kind in _EXPECTED:
        hint = " (put it in quotes)" if kind == "string_type" and isinstance(value, int | float) else ""
        return f"expected {_EXPECTED[kind]}, got {_shown(value)}{hint}"
    if kind in _LIMITS:
        sign, name = _LIMITS[kind]
        return f"must be {sign} {context[name]:g} (got {value})"
    if kind == "multiple_of":
        return f"must be a multiple of {context['multiple_of']:g} (got {value})"
    if kind == "finite_number":
        return f"must be a finite number (got {value})"
    if kind == "too_short":
        return "must not be empty"
    if kind == "literal_error":
        return _choice(value, get_args(dict(keys_of(model, system))[_names(path)]))
    if kind == "value_error":
        return str(context["error"])
    return f"{error['msg'].lower()} (got {_shown(value)})"


def _unknown(path: Keys, value: object, model: type[BaseModel], system: str) -> str:
    what = "section" if isinstance(value, dict) else "key"
    names, own, known = _names(path), list(dict(keys_of(model, system))), list(dict(keys_of(model)))
    if system and names in known:
        return f"unknown {what}. It belongs to {_owners(names, model)}; the system of this recipe is {system}."
    best = _closest(names, own) or _closest(names, known)
    if best:
        other = "" if best in own else f", which belongs to {_owners(best, model)}"
        return f"unknown {what}. Did you mean {dotted(best)}{other}?"
    beside = ", ".join(key[-1] for key in own if key[:-1] == path[:-1])
    return f"unknown {what}. " + (f"{dotted(path[:-1])} has {beside}." if path[:-1] else f"The sections are {beside}.")


def _owners(path: Names, model: type[BaseModel]) -> str:
    """Return the systems that have a key of the model's section: ``system detr``, ``systems a, b``."""
    sections = _sections_in(model.model_fields["model"].annotation)
    names = [_system_of(section) for section in sections if path in dict(keys_of(model, _system_of(section)))]
    return f"system{'s' * (len(names) > 1)} {', '.join(names)}"


def keys_named(name: str, model: type[BaseModel]) -> list[str]:
    """Return the whole names of the keys whose last part is ``name``: ``["train.epochs"]`` for "epochs"."""
    return [dotted(key) for key in dict(keys_of(model)) if key[-1] == name and len(key) > 1]


def _closest(path: Names, known: list[Names]) -> Names | None:
    """Return the best guess: same name elsewhere, then similar sibling, then similar name elsewhere."""
    name = path[-1]
    beside = {key[-1]: key for key in known if key[:-1] == path[:-1]}
    elsewhere: dict[str, Names] = {}
    for key in sorted(known, key=lambda key: -len(set(key) & set(path))):
        elsewhere.setdefault(key[-1], key)
    if name in elsewhere:
        return elsewhere[name]
    near = difflib.get_close_matches(name, beside, n=1, cutoff=0.7)
    near = near or [longer for longer in beside if name in longer.split("_")]
    if near:
        return beside[near[0]]
    far = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8)
    return elsewhere[far[0]] if far else None


def _choice(value: object, choices: tuple[str, ...]) -> str:
    quoted = [f'"{choice}"' for choice in choices]
    listed = " or ".join(part for part in (", ".join(quoted[:-1]), quoted[-1]) if part)
    word = str(value).lower()
    near = difflib.get_close_matches(_OTHER_WORDS.get(word, word), choices, n=1)
    hint = f'. Did you mean "{near[0]}"?' if near else ""
    return f"expected {listed}, got {_shown(value)}{hint}"


def _names(path: Keys) -> Names:
    return tuple(part for part in path if isinstance(part, str))


def _shown(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return f"the whole number {value}"
        case float():
            return f"the number {value}"
        case str():
            return f"the string {json.dumps(value, ensure_ascii=False)}"
        case list() | tuple():
            return "an array"
        case dict():
            return "a section"
        case datetime() | date() | time():
            return f"the date or time {value}"
        case _:
            return repr(value)
