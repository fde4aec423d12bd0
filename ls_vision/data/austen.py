"""The six novels of Jane Austen as bytes, from Debian's `r-cran-janeaustenr` (texts in the public domain).

    python -m ls_vision.data.austen --data-dir data/austen

The package's file of R objects is read with zlib alone. Each novel becomes a text file, 4.0 MB together. Needs
`apt-get` and `dpkg-deb`.
"""
import hashlib
import os
import re
import subprocess
import zlib
from pathlib import Path

from .fetching import FetchError, fetch, fetch_package, run_command

PACKAGE = 'r-cran-janeaustenr'
RDB = 'usr/lib/R/site-library/janeaustenr/data/Rdata.rdb'
RDB_SHA256 = '8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21'
NOVELS = {  # where the zlib stream of each begins
    'emma': 4, 'mansfield_park': 352047, 'northanger_abbey': 703420, 'persuasion': 878616,
    'pride_and_prejudice': 1063746, 'sense_and_sensibility': 1334783,
}
NUM_BYTES = 4_025_023
# of a character string in R's serialisation; a line of text follows its length in four bytes
_STRING = re.compile(rb'\x00[\x00\x04][\x00\x20\x40\x80]\x09')


def fetch_austen(data_dir: str | os.PathLike[str]) -> Path:
    """Fetch the novels into a folder, unless they are already there.

    Raises:
        FetchError: The folder holds something else, or the package could not be fetched or is another one.
    """
    return fetch(data_dir, 'the six novels', is_complete, make_folder, f'{len(NOVELS)} novels, {NUM_BYTES:,} bytes')


def is_complete(folder: Path) -> bool:
    """Whether a folder holds all novels."""
    files = [folder / f'{name}.txt' for name in NOVELS]
    return all(f.is_file() for f in files) and sum(f.stat().st_size for f in files) == NUM_BYTES


def make_folder(work_dir: Path) -> Path:
    """Fetches the package and writes the novels to a folder in `work_dir`."""
    package = fetch_package(['apt-get', 'download', PACKAGE], work_dir, f'{PACKAGE}_*.deb', 'E:')
    unpacked = work_dir / 'unpacked'
    subprocess.run(['dpkg-deb', '--extract', str(package), str(unpacked)], check=True)
    data = (unpacked / RDB).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != RDB_SHA256:
        raise FetchError(f'{package.name} holds other texts: SHA-256 {found}, expected {RDB_SHA256}.')
    out = work_dir / 'novels'
    out.mkdir()
    for name, start in NOVELS.items():
        (out / f'{name}.txt').write_bytes(read_novel(data, start))
    return out


def read_novel(data: bytes, start: int) -> bytes:
    """The lines of one novel of the package's file."""
    objects = zlib.decompressobj().decompress(data[start:])
    lines, position = [], 0
    while (match := _STRING.search(objects, position)) is not None:
        begin = match.end() + 4
        position = begin + int.from_bytes(objects[match.end():begin], 'big')
        lines.append(objects[begin:position])
    return b'\n'.join(lines)


def read_bytes(data_dir: str | os.PathLike[str]) -> bytes:
    """All novels one after the other.

    Raises:
        FetchError: The folder does not hold them.
    """
    folder = Path(data_dir)
    if not is_complete(folder):
        raise FetchError(f'{folder} does not hold the novels: python -m ls_vision.data.austen --data-dir {folder}')
    return b'\n\n'.join((folder / f'{name}.txt').read_bytes() for name in NOVELS)


def main(argv: list[str] | None = None) -> None:
    run_command('Fetch six novels of Jane Austen.', 'data/austen', fetch_austen, argv)


if __name__ == '__main__':
    main()
