"""Markers and the table of the conformance suite.

`@pytest.mark.item('words', 'package', ...)` names the row that a test makes in docs/conformance.md and the packages that
it is about. `--conformance-table FILE` writes the rows of a run to a JSON file, which `table.py` turns into Markdown. Tests of timm's
own scripts need a checkout of its repository, `--timm-scripts FOLDER`.
"""
import importlib.metadata
import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from families import MODELS


def version_of(package):
    """The version of an installed distribution, None without one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_addoption(parser):
    parser.addoption('--conformance-table', default=None, metavar='FILE', help='write what each item came to as JSON')
    parser.addoption('--timm-scripts', default=None, metavar='FOLDER',
                     help="timm's scripts (train.py, ...), from its repository: they are in no release file")


def pytest_configure(config):
    config.addinivalue_line('markers', 'item(words, *packages): row of the conformance table and what it is about')
    if config.getoption('--conformance-table'):
        config.pluginmanager.register(Recorder(config.getoption('--conformance-table')))


def pytest_runtest_setup(item):
    """Only what is slow may lack its packages; what CI runs has to be installed."""
    marker = item.get_closest_marker('item')
    missing = [p for p in marker.args[1:] if version_of(p) is None] if marker else []
    if missing and item.get_closest_marker('slow'):
        pytest.skip(f'not installed: {", ".join(missing)}')


class Recorder:
    """Gathers outcomes by item and model."""

    def __init__(self, path):
        self.path = Path(path)
        self.rows = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        marker = item.get_closest_marker('item')
        if marker is None or report.when == 'teardown' or (report.when == 'setup' and report.passed):
            return
        words, *packages = marker.args
        path = item.nodeid.split('::')[0]
        row = self.rows.setdefault(words, dict(
            versions={p: version_of(p) for p in packages}, command=f'{path}::{item.originalname}', path=path,
            slow=item.get_closest_marker('slow') is not None, outcomes=defaultdict(list)))
        name = getattr(item, 'callspec', None) and item.callspec.params.get('name')
        outcome, reason = report.outcome, ''
        if hasattr(report, 'wasxfail'):
            outcome, reason = 'cannot', report.wasxfail
        elif report.skipped:
            reason = report.longrepr[2].removeprefix('Skipped: ')
        elif report.failed:
            reason = (report.longrepr.reprcrash.message.split('\n')[0][:200]
                      if hasattr(report.longrepr, 'reprcrash') else str(report.longrepr)[-200:])
        for model in [name] if name else MODELS:
            row['outcomes'][model].append((outcome, reason))

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.rows, indent=1))
