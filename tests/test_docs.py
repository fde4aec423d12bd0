"""Everything that README, CONTRIBUTING and docs tell a reader to run, follow or import is valid.

Python blocks of a page run in order, in one namespace. A block marked `needs=...` (data, weights) is compiled, and its
imports, attributes and arguments are resolved. Shell commands go through the real argument parsers.
"""
import argparse
import ast
import builtins
import importlib
import importlib.util
import inspect
import json
import re
import runpy
import shlex
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import timm

import ls_vision  # noqa: F401  registers the models

pytestmark = pytest.mark.usefixtures('one_thread')
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
FENCED = re.compile(r'^ *```(\w*)([^\n`]*)\n(.*?)^ *```$', re.MULTILINE | re.DOTALL)  # language, info, text
TARGETS = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
PLACEHOLDER = re.compile(r'NAME|DATE')
# Commands of the pages that other tests run in full, by the name of the test.
RUN_ELSEWHERE = {
    'python train_imagenet.py': 'test_end_to_end',
    'python train_detection.py': 'test_run_leaves_everything',
    'python eval_imagenet.py': 'test_known_accuracy',
    'torchrun eval_imagenet.py': 'test_two_processes_give_the_figures_of_one',
    'python -m ls_vision.data.cifar10': 'test_complete_folder_is_recognised_and_left_alone',
    'python -m ls_vision.data.deepforest': 'test_fetch_and_fetch_again',
    'python -m ls_vision.run': 'test_single_process',
    'torchrun -m ls_vision.run': 'test_torchrun_registers_in_every_rank',
    'ls-vision flops': 'test_flops_as_json',
    'ls-vision models': 'test_models',
    'ls-vision choose': 'test_fastest_first_and_the_rest_with_reasons',
    'ls-vision scale': 'test_killed_and_resumed',
    'ls-vision attention': 'test_sheet_of_a_photograph',
    'ls-vision export': 'test_command',
    'ls-vision doctor': 'test_right_backend',
    'python benchmarks/detection_memory.py': 'test_step_and_out_of_memory',
    'python examples/torchvision_detector.py': 'test_command_line',
}


class Block(NamedTuple):
    """A fenced block of a page."""
    page: str
    line: int
    info: str
    text: str


def read_blocks(page, language):
    """Blocks of one language, from the fence's first word."""
    text = page.read_text()
    for match in FENCED.finditer(text):
        assert match[1] in ('python', 'sh', ''), f'{page.name}: no check for blocks of {match[1]}'
        if match[1] == language:
            line = text.count('\n', 0, match.start()) + 1
            yield Block(str(page.relative_to(ROOT)), line, match[2].strip(), textwrap.dedent(match[3]))


def read_commands():
    """(place, command) of every shell block; continued lines are joined, comments dropped."""
    for page in PAGES:
        for block in read_blocks(page, 'sh'):
            for line in block.text.replace('\\\n', ' ').splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield f'{block.page}:{block.line}', words


# ---- Python ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('page', [p for p in PAGES if any(read_blocks(p, 'python'))], ids=lambda p: p.name)
def test_python_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in read_blocks(page, 'python'):
        place = f'{block.page}:{block.line}'
        if block.info.startswith('needs='):
            check_names(block.text, place, set(namespace))
        else:
            exec(compile(block.text, place, 'exec'), namespace)


def check_names(text, place, known):
    """Resolves imports, attributes of imported modules, keyword arguments and model names without running the calls."""
    tree = ast.parse(text, place)
    imports = ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
    namespace = {}
    exec(compile(imports, place, 'exec'), namespace)
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    known = known | stored | {'timm'} | set(dir(builtins))
    namespace.setdefault('timm', timm)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            assert node.id in known or node.id in namespace, f'{place}: {node.id} is not defined'
        if isinstance(node, ast.Call):
            function = resolve(node.func, namespace)
            if function is not None and not inspect.isbuiltin(function):  # PyTorch's built-in ones have no signature
                inspect.signature(function).bind_partial(*node.args, **{k.arg: k.value for k in node.keywords if k.arg})
            if function is timm.create_model:
                assert timm.is_model(node.args[0].value), f'{place}: {node.args[0].value} is no model'


def resolve(node, namespace):
    """The imported object that an expression such as `timm.create_model` names, or None; fails if it is missing."""
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value, namespace)
        return None if owner is None else getattr(owner, node.attr)
    return namespace.get(node.id) if isinstance(node, ast.Name) else None


# ---- shell -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('place, words', [
    pytest.param(place, words, id=f'{place} {" ".join(words)[:60]}') for place, words in read_commands()])
def test_shell_command(place, words, monkeypatch):
    while re.fullmatch(r'[A-Z_]+=\S*', words[0]):  # environment
        words = words[1:]
    program, *args = words
    for word in args:
        assert not re.match(r'(vil|cvt|swin|vit)_\w+$', word) or timm.is_model(word), f'{place}: {word} is no model'
    if program == 'make':
        assert set(args) <= TARGETS
    elif program == 'pip':
        check_extras(args)
    elif program == 'ls-vision':
        parses('ls_vision', args, monkeypatch)
    elif program in ('python', 'torchrun'):
        while program == 'torchrun' and args[0].startswith('--'):
            args = args[2:]
        is_module = args[0] == '-m'
        check_python(args[is_module:], is_module, monkeypatch)
    else:
        pytest.fail(f'{place}: no check for the program {program}')


@pytest.mark.parametrize('command', [
    'python train_imagenet.py --config configs/cifar10.yaml --epohcs 3',
    'python train_imagenet.py --config configs/missing.yaml',
    'torchrun --nproc_per_node 8 eval_imagenet.py --variant q --pretrained',
    'python benchmarks/missing.py',
    'python -m ls_vision.data.missing',
    'python -m pytest tests/missing',
    'ls-vision flops vil_ls_tiny --missing',
    'ls-vision flops vil_ls_tinny',
    'make demmo',
    'pip install ".[missing]"',
])
def test_wrong_shell_commands_are_noticed(command, monkeypatch):
    with pytest.raises((AssertionError, SystemExit)):
        test_shell_command('', shlex.split(command), monkeypatch)


def check_python(args, is_module, monkeypatch):
    target, *args = args
    if is_module:
        assert importlib.util.find_spec(target), f'no module {target}'
        if target == 'ls_vision.run':  # timm's own script is not installed
            model = args[args.index('--model') + 1]
            assert timm.is_model(model)
        elif target == 'pytest':
            check_pytest(args)
        elif target.startswith('ls_vision'):
            parses(target, args, monkeypatch)
        return
    path = ROOT / target
    assert path.is_file(), f'no script {target}'
    source = path.read_text()
    if 'ArgumentParser' in source or 'parse_args' in source:
        parses(path, args, monkeypatch)
    else:
        assert all(arg in source for arg in args if arg.startswith('-')), f'{target} does not read {args}'


def check_pytest(args):
    for arg in args:
        if '/' in arg:
            path, _, name = arg.partition('::')
            assert (ROOT / path).exists() and name in (ROOT / path).read_text() if name else (ROOT / path).exists()


def check_extras(args):
    defined = set(re.findall(r'^(\w+) = \[', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE))
    for arg in args:
        for extras in re.findall(r'\[([\w,]+)\]', arg):
            assert set(extras.split(',')) <= defined, f'no extra {extras}'


class Parsed(BaseException):
    """A command line was accepted."""


def parses(target, args, monkeypatch):
    """Starts a script or module and stops it as soon as its parser has accepted the arguments."""
    original = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, *args, **kwargs):
        namespace, unknown = original(self, *args, **kwargs)
        if self.add_help and not unknown:  # parsers without help only read --config or are parents
            raise Parsed
        return namespace, unknown

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_known_args', parse_known_args)
    monkeypatch.setattr(sys, 'argv', [str(target), *args])
    with pytest.raises(Parsed):
        if isinstance(target, Path):
            monkeypatch.syspath_prepend(str(target.parent))
            runpy.run_path(str(target), run_name='__main__')
        else:
            runpy.run_module(target, run_name='__main__')


@pytest.mark.parametrize('command, test', RUN_ELSEWHERE.items())
def test_commands_that_are_run_elsewhere(command, test):
    starts = [re.sub(r'--\w+ \d+ ', '', ' '.join(words)) for _, words in read_commands()]
    assert any(start.startswith(command) for start in starts), f'no page has {command}'
    others = [path for path in (ROOT / 'tests').rglob('test_*.py') if path != Path(__file__)]
    assert any(f'def {test}(' in path.read_text() for path in others)


# ---- links and tables ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('page', [*PAGES, ROOT / 'CHANGELOG.md'], ids=lambda p: p.name)
def test_links(page):
    text = FENCED.sub('', page.read_text())
    missing = []
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        path, _, anchor = link.partition('#')
        if path.startswith('http'):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing, missing


def anchors(page):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r'^#+ (.+)$', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_paths_in_code_spans(page):
    top = r'ls_vision|tests|benchmarks|configs|examples|docs'
    spans = re.findall(rf'`((?:{top})/[\w./-]+)`', page.read_text())
    missing = [span for span in spans if not PLACEHOLDER.search(span) and not (ROOT / span).exists()]
    assert not missing, missing


@pytest.mark.parametrize('name, page, pattern', [
    ('zoo', 'README.md', 'zoo_cpu_*.json'),
    ('scaling', 'docs/results.md', 'scaling_vil_cpu_*/results.json'),
    ('study', 'docs/study.md', 'study_*.json'),
])
def test_published_tables_are_those_of_the_results(name, page, pattern, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    from ls_vision.analysis import report
    from ls_vision.analysis.scale import Results

    section = (ROOT / page).read_text().split(f'<!-- {name} -->')[1].split(f'<!-- /{name} -->')[0]
    path = sorted((ROOT / 'benchmarks/results').glob(pattern))[-1]
    expected = dict(
        zoo=lambda: importlib.import_module('zoo').table(Results.load(path)),
        scaling=lambda: report.digest(report.Report(Results.load(path))),
        study=lambda: importlib.import_module('study').tables(json.loads(path.read_text())['rows']),
    )[name]()
    assert expected.strip() in section
