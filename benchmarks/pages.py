"""Sections of Markdown pages that benchmarks write: the model zoo in README.md, scaling in docs/results.md."""
from pathlib import Path


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
    new = path.with_name(f'{path.name}.new')
    new.write_text(before + start + text.strip('\n') + '\n' + end + rest.split(end)[1])
    new.replace(path)
