"""Sections of Markdown pages that benchmarks write: the model zoo in README.md, scaling in docs/results.md."""
from pathlib import Path

from ls_vision.runtime.files import write_text


def replace_section(path: Path, name: str, text: str) -> None:
    """Replaces the text between the markers `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
        ValueError: The file has no such markers.
    """
    start, end = f'<!-- {name} -->\n', f'<!-- /{name} -->'
    content = path.read_text()
    if content.count(start) != 1 or content.count(end) != 1:
        raise ValueError(f'{path} has no section between {start.strip()} and {end}.')
    before, rest = content.split(start)
    write_text(path, before + start + text.strip('\n') + '\n' + end + rest.split(end)[1])
