"""What tomllib lacks: the line of every key, changes from the command line, and writing values."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

Path = tuple[str | int, ...]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SCALAR = re.compile(r"[^,\]}#\n]*")


def key_lines(text: str) -> dict[Path, int]:
    """The line (from 1) of every table, key and array element of a valid TOML text.

    A path is the tuple of keys, with an index for an array element: ``("data", "shapes", "seed")``.
    Elements of ``[[arrays of tables]]`` are entered without their index. Where a path occurs twice (a table
    that is opened in two places) the first line is kept. The text must be one that tomllib accepts.
    """
    return _Scanner(text).document()


def syntax_mistake(text: str, message: str) -> str:
    """tomllib puts the place at the end of its message; a recipe error has it in front."""
    place = re.search(r" \(at line (\d+), column \d+\)$", message)
    line = place[1] if place else text.count("\n") + 1
    return f"{line}: not valid TOML: {re.sub(r' [(]at .*[)]$', '', message)}"


def apply_override(values: dict[str, Any], override: str) -> Path:
    """Applies one ``section.key=value`` to the values; returns the keys.

    Raises:
        ValueError: saying what is wrong with the override.
    """
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


def with_tuples(value: Any) -> Any:
    """The value with its arrays as tuples, which is what strict sections take."""
    if isinstance(value, dict):
        return {key: with_tuples(item) for key, item in value.items()}
    return tuple(with_tuples(item) for item in value) if isinstance(value, list) else value


def value_text(value: object) -> str:
    """A string, boolean, number or tuple of them as TOML."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(value_text(item) for item in value)}]"
    return str(value).lower() if isinstance(value, bool) else repr(value)


class _Scanner:
    """A cursor over a text that is known to be valid."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Path, int] = {}

    def document(self) -> dict[Path, int]:
        table: Path = ()
        while self.skip(_BLANK) < len(self.text):
            if self.peek() == "[":
                while self.peek() == "[":
                    self.at += 1
                table = self.key(())
                while self.peek() == "]":
                    self.at += 1
            else:
                self.pair(table)
        return self.lines

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def skip(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return self.at

    def mark(self, path: Path) -> None:
        self.lines.setdefault(path, self.text.count("\n", 0, self.at) + 1)

    def key(self, parent: Path) -> Path:
        """Reads ``a."b c".d``; marks every part of it."""
        path = parent
        while True:
            self.skip(_SPACE)
            start = self.at
            if self.peek() in ('"', "'"):
                self.string()
                part = str(tomllib.loads("key = " + self.text[start : self.at])["key"])
            else:
                part = self.text[start : self.skip(_BARE_KEY)]
            path = (*path, part)
            self.mark(path)
            self.skip(_SPACE)
            if self.peek() != ".":
                return path
            self.at += 1

    def pair(self, table: Path) -> None:
        path = self.key(table)
        self.at += 1  # the equals sign
        self.skip(_SPACE)
        self.value(path)

    def value(self, path: Path) -> None:
        first = self.peek()
        if first in ('"', "'"):
            self.string()
        elif first == "[":
            self.items(path, "]")
        elif first == "{":
            self.items(path, "}")
        else:
            self.skip(_SCALAR)

    def items(self, path: Path, closing: str) -> None:
        """Reads the rest of an array (``]``) or of an inline table (``}``)."""
        self.at += 1
        index = 0
        while self.skip(_BLANK) < len(self.text) and self.peek() != closing:
            if self.peek() == ",":
                self.at += 1
                index += 1
            elif closing == "}":
                self.pair(path)
            else:
                self.mark((*path, index))
                self.value((*path, index))
        self.at += 1

    def string(self) -> None:
        quote = self.peek()
        closing = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        self.at += len(closing)
        while not self.text.startswith(closing, self.at):
            self.at += 2 if quote == '"' and self.peek() == "\\" else 1
        self.at += len(closing)
        while len(closing) == 3 and self.peek() == quote:  # a multi-line string may end in up to five quotes
            self.at += 1
