"""The report of a run, and its page as a reader sees it: in a browser without a network."""
import shutil

import pytest
from playwright.sync_api import sync_playwright

from ls_vision.analysis import report
from ls_vision.analysis.crossover import crossover, describe
from ls_vision.analysis.scale import Results
from ls_vision.analysis.worker import Point, Settings

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
SIZES = (224, 448, 896)
GIB = 2 ** 30


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """As if measured: a linear model, a quadratic one that runs out of memory in training at the last size."""
    settings = Settings('cpu', 'float32', 2, 1., 8 * GIB)
    results = Results.create(tmp_path_factory.mktemp('run') / 'results.json', settings, resume=False)
    for side in SIZES:
        pixels = (side / 224) ** 2
        for name, cost in (('vil_ls_medium', 2 * pixels), ('vil_full_medium', pixels ** 2)):
            for mode in ('inference', 'training'):
                if (name, side, mode) == ('vil_full_medium', 896, 'training'):
                    result = dict(status='out of memory')
                else:
                    result = dict(status='ok', seconds=[cost, cost], memory=int(cost * GIB))
                results.add(Point(name, (side, side), 1, mode), result, dict(params=10, macs=int(cost * 1e9)))
    report.write(results, results.path.parent)
    return results


@pytest.mark.parametrize('ours, theirs, expected, text', [
    ({1: 2, 2: 4, 4: 8}, {1: 1, 2: 4.1, 4: 16}, 1.97, 'from about 2 px on'),
    ({100: 1, 200: 2}, {100: 2, 200: 4}, 100, 'at every size, 100 to 200 px'),
    ({100: 2, 200: 4}, {100: 1, 200: 3}, None, 'at no size up to 200 px'),
    ({100: 2, 200: 4}, {100: 1, 200: None}, 200, 'from 200 px on'),  # the other ran out of memory
    ({100: 1, 200: 4, 400: 4}, {100: 2, 200: 3, 400: 8}, 245.1, 'from about 245 px on'),  # the last crossing counts
    ({100: 1, 200: None}, {100: 2, 200: None}, None, 'only at 100 px'),
    ({100: 1}, {200: 2}, None, 'not compared: no common size'),
])
def test_crossover(ours, theirs, expected, text):
    assert crossover(ours, theirs) == (expected if expected is None else pytest.approx(expected, rel=0.01))
    assert describe(ours, theirs) == text


def test_summary_states_crossover_and_slopes(results):
    path = results.path.with_name('summary.md')
    lines = path.read_text().splitlines()
    crossed = lines[next(i for i, line in enumerate(lines) if 'time for inference' in line) + 2]
    assert 'from about 317 px on' in crossed  # where 2 x = x ** 2
    slopes = {line.split('|')[1].strip(): line.split('|')[-2].strip() for line in lines if line.startswith('| vil_')}
    assert slopes['vil_ls_medium'] == '1.00' and slopes['vil_full_medium'] == '2.00'
    assert any('out of memory' in line for line in lines)
    assert (path.parent / 'scaling.png').read_bytes().startswith(b'\x89PNG')


def test_digest_compares_memory_at_a_size(results):
    text = report.digest(report.Report(results), side=448)
    assert '`vil_ls_medium` 8.00 GiB, `vil_full_medium` 16.0 (2.00 times)' in text
    assert '`vil_full_medium` out of memory' in report.digest(report.Report(results), side=896)


@pytest.fixture(scope='module')
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert path, 'no Chromium: `make browser` installs one'
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, results):
    """The page on a telephone without a network; its errors fail the test."""
    context = browser.new_context(offline=True, viewport=dict(width=375, height=812))
    page = context.new_page()
    problems = []
    page.on('console', lambda message: problems.append(message.text))
    page.on('pageerror', lambda error: problems.append(str(error)))
    page.on('request', lambda request: request.url.startswith('http') and problems.append(request.url))
    page.goto((results.path.parent / 'report.html').as_uri())
    yield page
    context.close()
    assert not problems


def test_all_plots_are_visible(page):
    images = page.locator('figure img')
    assert images.count() == 6  # five quantities, and accuracy against throughput
    for image in images.all():
        assert image.is_visible()
        assert image.evaluate('image => image.complete && image.naturalWidth > 100')
        assert image.bounding_box()['width'] > 300


def test_tables_are_sorted_by_a_click(page):
    table = page.locator('table').last
    column = table.locator('th').all_inner_texts().index('ms')

    def cells():
        texts = table.locator(f'tbody td:nth-child({column + 1})').all_inner_texts()
        return [float(text) if text else None for text in texts]

    head = table.locator('th').nth(column)
    head.locator('button').click()
    known = [value for value in cells() if value is not None]
    assert len(known) == 11 and known == sorted(known) and cells()[-1] is None
    assert head.get_attribute('aria-sort') == 'ascending'
    head.locator('button').click()
    assert [value for value in cells() if value is not None] == sorted(known, reverse=True)
    assert head.get_attribute('aria-sort') == 'descending'


def test_fits_a_telephone(page):
    assert page.evaluate('document.documentElement.scrollWidth') <= 375  # wide tables scroll within themselves
    assert page.locator('p').first.evaluate('p => parseFloat(getComputedStyle(p).fontSize)') >= 14
