"""Rows of results as Markdown, CSV or JSON."""
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

FORMATS = ('markdown', 'csv', 'json')

Columns = Mapping[str, Callable[[Any], Any]]
"""The function that makes the cell of a row, by column."""


def markdown(rows: Sequence[Any], columns: Columns) -> str:
    """A table with padded cells, readable as plain text; columns of numbers are right-aligned."""
    cells = [[_text(cell(row)) for cell in columns.values()] for row in rows]
    numeric = [all(text[:1].isdigit() or not text for text in column) for column in zip(*cells)]
    widths = [max(3, *(len(line[i]) for line in [list(columns), *cells])) for i in range(len(columns))]

    def line(texts: Sequence[str]) -> str:
        padded = (t.rjust(w) if n else t.ljust(w) for t, w, n in zip(texts, widths, numeric))
        return f'| {" | ".join(padded)} |'

    rule = ['-' * (w - 1) + ':' if n else '-' * w for w, n in zip(widths, numeric)]
    return '\n'.join(line(texts) for texts in (list(columns), rule, *cells))


def comma_separated(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a header; entries of dicts get columns of their own, named `outer.inner`."""
    flat = [_flatten(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator='\n')
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue().rstrip('\n')


def json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """One JSON object per line."""
    return '\n'.join(json.dumps(row) for row in rows)


def render(kind: str, rows: Sequence[Mapping[str, Any]], columns: Columns) -> str:
    """The rows in one of `FORMATS`: all of their entries, or only the columns in Markdown."""
    if kind == 'json':
        return json_lines(rows)
    return comma_separated(rows) if kind == 'csv' else markdown(rows, columns)


def giga(value: Any) -> str:
    """A number of multiply-adds in GMAC."""
    return f'{value / 1e9:.2f}'


def _text(cell: Any) -> str:
    return '' if cell is None else str(cell)


def _flatten(row: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f'{prefix}{name}.'))
        else:
            flat[prefix + name] = ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return flat
