"""The report of a run of `ls-vision scale`: plots, a self-contained page, a summary in Markdown."""
import base64
import functools
import html
import io
import math
import string
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch

from ls_vision.analysis import pictures
from ls_vision.analysis.crossover import Curve, describe
from ls_vision.analysis.measure import slope
from ls_vision.analysis.scale import Results
from ls_vision.analysis.tables import Columns, markdown
from ls_vision.analysis.zoo import PUBLISHED, build, default_size, size_name
from ls_vision.layers import LongShortAttention2d
from ls_vision.runtime.errors import UserError
from ls_vision.runtime.files import atomic_write, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000', '#999999')  # Okabe and Ito
MARKERS = 'osD^vPX*'

Table = tuple[Sequence[Any], Columns]


class Quantity(NamedTuple):
    """Something that grows with the image."""
    name: str
    unit: str
    mode: Optional[str]
    """Mode of the points that it is read from; None where it does not depend on the mode."""
    read: Callable[[dict[str, Any]], float]
    less: str
    """Name of the quantity in 'needs less ...'."""


QUANTITIES = (
    Quantity('Multiply-adds', 'GMAC', None, lambda row: row['macs'] / 1e9, 'multiply-adds'),
    Quantity('Inference', 's', 'inference', lambda row: row['latency'], 'time for inference'),
    Quantity('Training step', 's', 'training', lambda row: row['latency'], 'time for a training step'),
    Quantity('Memory of inference', 'GiB', 'inference', lambda row: row['memory'] / 2 ** 30, 'memory for inference'),
    Quantity('Memory of a training step', 'GiB', 'training', lambda row: row['memory'] / 2 ** 30,
             'memory for a training step'),
)


class Report:
    """The rows of a run at its smallest batch size."""

    def __init__(self, results: Results):
        self.results = results
        self.batch_size = min(row['batch_size'] for row in results.rows)
        self.rows = [row for row in results.rows if row['status'] in ('ok', 'out of memory')]
        self.models = list(dict.fromkeys(sorted((row['model'] for row in self.rows), key=_long_short_first)))
        self.quantities = [q for q in QUANTITIES if any(self.curve(q, model) for model in self.models)]

    def curve(self, quantity: Quantity, model: str) -> dict[float, Optional[float]]:
        """The quantity by side of the (square of the same area as the) image."""
        curve: dict[float, Optional[float]] = {}
        for row in sorted(self.rows, key=_area):
            if (row['model'], row['batch_size']) == (model, self.batch_size) and quantity.mode in (None, row['mode']):
                ok = row['status'] == 'ok' or quantity.mode is None
                curve[math.sqrt(_area(row))] = quantity.read(row) if ok else None
        return curve

    def exponent(self, quantity: Quantity, model: str) -> Optional[float]:
        """p of the power law quantity ~ pixels ** p, fitted to what was measured."""
        known = {side: value for side, value in self.curve(quantity, model).items() if value is not None}
        return slope([side ** 2 for side in known], list(known.values())) if len(known) > 1 else None

    def pairs(self) -> list[tuple[str, str]]:
        """Each model with long-short attention, paired with each model without."""
        long_short = [model for model in self.models if has_long_short_attention(model)]
        return [(ours, theirs) for ours in long_short for theirs in self.models if theirs not in long_short]


def write(results: Results, folder: Path) -> Path:
    """Writes report.html, scaling.png and summary.md; returns the path of the latter.

    Raises:
        UserError: Nothing was measured.
    """
    if not any(row['status'] != 'failed' for row in results.rows):
        reasons = '; '.join(sorted({f'{row["model"]}: {row["message"]}' for row in results.rows}))
        raise UserError(f'{results.path}: nothing was measured. {reasons}')
    report = Report(results)
    with atomic_write(folder / 'scaling.png') as file:
        draw_overview(report).savefig(file, format='png')
    write_text(folder / 'report.html', page(report))
    write_text(folder / 'summary.md', summary(report))
    return folder / 'summary.md'


@functools.cache
def has_long_short_attention(name: str) -> bool:
    """Whether a registered model has a layer of long-short attention."""
    model = build(name, default_size(name), torch.device('meta'))
    return any(isinstance(module, LongShortAttention2d) for module in model.modules())


def _long_short_first(name: str) -> bool:
    return not has_long_short_attention(name)


def _area(row: dict[str, Any]) -> int:
    return row['img_size'][0] * row['img_size'][1]


# ---- plots -----------------------------------------------------------------------------------------------------------

def draw_overview(report: Report) -> 'Figure':
    """The quantities side by side, for a README."""
    columns = 2 if len(report.quantities) > 1 else 1
    rows = math.ceil(len(report.quantities) / columns)
    figure = pictures.new_figure(5.4 * columns, 5 * rows)
    for axes, quantity in zip(figure.subplots(rows, columns, squeeze=False).flat, report.quantities):
        draw_growth(axes, report, quantity)
    for axes in figure.axes[len(report.quantities):]:
        axes.set_axis_off()
    return figure


def draw_growth(axes: 'Axes', report: Report, quantity: Quantity) -> None:
    """A quantity against the side of the image, on logarithmic axes; a cross where a model ran out of memory."""
    from matplotlib.ticker import LogLocator, NullFormatter

    out_of_memory = []
    for number, model in enumerate(report.models):
        curve = report.curve(quantity, model)
        known = {side: value for side, value in curve.items() if value is not None}
        exponent = report.exponent(quantity, model)
        label = model if exponent is None else f'{model}  ~ pixels$^{{{exponent:.2f}}}$'
        axes.plot(
            list(known), list(known.values()), label=label, color=COLORS[number % len(COLORS)], markersize=4.5,
            marker=MARKERS[number % len(MARKERS)], linestyle='-' if has_long_short_attention(model) else '--')
        out_of_memory += [(side, number) for side, value in curve.items() if value is None]
    axes.set(xscale='log', yscale='log')
    axes.set_title(f'{quantity.name}, {quantity.unit}', loc='left', fontsize=11, fontweight='bold', color=pictures.INK)
    for side, number in out_of_memory:
        axes.plot(
            side, 1.03 + 0.05 * sum(s == side and n < number for s, n in out_of_memory), marker='x', markersize=6,
            color=COLORS[number % len(COLORS)], transform=axes.get_xaxis_transform(), clip_on=False)
    sides = sorted({math.sqrt(_area(row)) for row in report.rows})
    axes.set_xticks(sides, _labels(sides))
    axes.set_xticks([], minor=True)
    axes.set_xlabel('side of the image, pixels' + ('; x: out of memory' if out_of_memory else ''), color=pictures.GREY)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=9, frameon=False, loc='upper left', bbox_to_anchor=(0, -0.14))
    _style(axes)


def _labels(sides: list[float]) -> list[str]:
    """Tick labels; those that would touch the next larger one are empty."""
    labels: list[str] = []
    labelled = math.inf
    for side in reversed(sides):
        has_room = math.log(labelled / side) > 0.1 * math.log(sides[-1] / sides[0])
        labels.insert(0, f'{side:.0f}' if has_room else '')
        labelled = side if has_room else labelled
    return labels


def draw_accuracy(axes: 'Axes', report: Report) -> bool:
    """Published top-1 against measured throughput at the published size; False where there is no such model."""
    found = False
    for number, model in enumerate(report.models):
        best = max((
            row['throughput'] for row in report.rows if row['model'] == model and row['mode'] == 'inference'
            and row['status'] == 'ok' and tuple(row['img_size']) == default_size(model)), default=None)
        if best is None or model not in PUBLISHED:
            continue
        found = True
        top1 = PUBLISHED[model].top1
        axes.plot(best, top1, color=COLORS[number % len(COLORS)], marker=MARKERS[number % len(MARKERS)])
        axes.annotate(model, (best, top1), xytext=(6, 4), textcoords='offset points', fontsize=8)
    axes.margins(x=0.35, y=0.25)
    axes.set_title('Published ImageNet top-1, %', loc='left', fontsize=11, fontweight='bold', color=pictures.INK)
    axes.set_xlabel('inference, images/s', color=pictures.GREY)
    _style(axes)
    return found


def _style(axes: 'Axes') -> None:
    axes.grid(color=pictures.LIGHT, linewidth=0.7)
    axes.tick_params(colors=pictures.GREY, which='both', labelsize=9)
    for name, spine in axes.spines.items():
        spine.set(visible=name in ('left', 'bottom'), color=pictures.LIGHT)


# ---- tables ----------------------------------------------------------------------------------------------------------

def growth_table(report: Report, quantity: Quantity) -> Table:
    """A row per model, a column per size, and the fitted exponent."""
    curves = {model: report.curve(quantity, model) for model in report.models}
    sizes = {math.sqrt(_area(row)): size_name(tuple(row['img_size'])) for row in sorted(report.rows, key=_area)}
    columns: dict[str, Callable[[str], Any]] = {'model': lambda model: model}
    for side, name in sizes.items():
        columns[f'{name} px'] = functools.partial(_cell, curves, side)
    columns['~ pixels^'] = functools.partial(_exponent_cell, report, quantity)
    return report.models, columns


def crossover_table(report: Report) -> Table:
    """For each pair of models with and without long-short attention, the size from which the first needs less."""
    columns: dict[str, Callable[[tuple[str, str]], Any]] = {'model': lambda pair: pair[0], 'than': lambda pair: pair[1]}
    for quantity in report.quantities:
        columns[quantity.less] = functools.partial(_crossover_cell, report, quantity)
    return report.pairs(), columns


def _crossover_cell(report: Report, quantity: Quantity, pair: tuple[str, str]) -> str:
    return describe(*(report.curve(quantity, model) for model in pair))


def points_table(report: Report) -> Table:
    """All measured points."""
    def measured(read: Callable[[dict[str, Any]], float], digits: int) -> Callable[[dict[str, Any]], str]:
        return lambda row: f'{read(row):.{digits}f}' if row['status'] == 'ok' else ''

    return report.results.rows, {
        'model': lambda row: row['model'],
        'img size': lambda row: size_name(tuple(row['img_size'])),
        'batch': lambda row: row['batch_size'],
        'mode': lambda row: row['mode'],
        'GMAC': lambda row: f'{row["macs"] / 1e9:.2f}',
        'ms': measured(lambda row: row['latency'] * 1e3, 1),
        'lower quartile': measured(lambda row: row['latency_quartiles'][0] * 1e3, 1),
        'upper quartile': measured(lambda row: row['latency_quartiles'][1] * 1e3, 1),
        'images/s': measured(lambda row: row['throughput'], 2),
        'memory, MiB': measured(lambda row: row['memory'] / 2 ** 20, 0),
        'calls': lambda row: sum(len(visit['seconds']) for visit in row['visits']) or '',
        'status': lambda row: row.get('message', row['status']) if row['status'] == 'failed' else row['status'],
    }


def _cell(curves: Mapping[str, Curve], side: float, model: str) -> str:
    curve = curves[model]
    if side not in curve:
        return ''
    value = curve[side]
    return 'out of memory' if value is None else _number(value)


def _exponent_cell(report: Report, quantity: Quantity, model: str) -> str:
    value = report.exponent(quantity, model)
    return '' if value is None else f'{value:.2f}'


def _number(value: Optional[float]) -> str:
    """A number with at least three digits."""
    if value is None:
        return ''
    return f'{value:,.{max(0, 2 - math.floor(math.log10(abs(value) or 1)))}f}'


def summary(report: Report) -> str:
    """All tables in Markdown."""
    machine = report.results.machine
    parts = [
        '# Growth with the image', _describe_run(report), f'`{machine["command"]}`',
        '## Where long-short attention needs less', markdown(*crossover_table(report))]
    for quantity in report.quantities:
        parts += [f'## {quantity.name}, {quantity.unit}', markdown(*growth_table(report, quantity))]
    return '\n\n'.join(parts) + '\n'


def digest(report: Report, side: float = 1024.) -> str:
    """The summary for a README: growth, crossovers, and training memory at one size."""
    columns: dict[str, Callable[[str], Any]] = {'grows ~ pixels^': lambda model: f'`{model}`'}
    for quantity in report.quantities:
        columns[quantity.name] = functools.partial(_exponent_cell, report, quantity)
    return '\n\n'.join([
        markdown(report.models, columns), 'Where long-short attention needs less:', markdown(*crossover_table(report)),
        compare_at(report, report.quantities[-1], side),
        f'{_describe_run(report)} `{report.results.machine["command"]}`'])


def compare_at(report: Report, quantity: Quantity, side: float) -> str:
    """A quantity of all models at one size, as multiples of the best long-short model."""
    curves = {model: report.curve(quantity, model) for model in report.models}
    values = {model: curve[side] for model, curve in curves.items() if side in curve}
    ours = [(value, model) for model, value in values.items() if value is not None and has_long_short_attention(model)]
    if not ours:
        return f'{quantity.name} at {side:.0f} px was not measured.'
    least, first = min(ours)
    texts = [f'`{first}` {_number(least)} {quantity.unit}']
    for model, value in values.items():
        if value is None:
            # rounded down, because the limit also covers what the process uses besides the model
            limit = report.results.settings.memory_limit / 2 ** 30
            on_cpu = quantity.unit == 'GiB' and report.results.settings.device == 'cpu'
            more = f' of {limit:.1f} GiB, more than {math.floor(limit / least)} times' if on_cpu else ''
            texts.append(f'`{model}` out of memory{more}')
        elif model != first:
            texts.append(f'`{model}` {_number(value)} ({value / least:.2f} times)')
    return f'{quantity.name} at {side:.0f} px: {", ".join(texts)}.'


def _describe_run(report: Report) -> str:
    machine = report.results.machine
    limit = report.results.settings.memory_limit / 2 ** 30
    memory = f', at most {limit:.1f} GiB for a process' if report.results.settings.device == 'cpu' else ''
    return (
        f'{machine["device"]}, {machine["threads"]} threads{memory}; {machine["dtype"]}, batch {report.batch_size}; '
        f'torch {machine["torch"]}, timm {machine["timm"]}, Python {machine["python"]}; {machine["date"]}. Medians; '
        f'memory is the peak of a fresh process minus its memory before the model was built.')


# ---- page ------------------------------------------------------------------------------------------------------------

def page(report: Report) -> str:
    """One HTML file that needs no other files."""
    figures = []
    for quantity in report.quantities:
        figure = pictures.new_figure(5.6, 5)
        draw_growth(figure.subplots(), report, quantity)
        figures.append(_figure_element(figure, f'{quantity.name} in {quantity.unit} against the side of the image'))
    figure = pictures.new_figure(5.6, 5)
    if draw_accuracy(figure.subplots(), report):
        figures.append(_figure_element(figure, 'Published top-1 against throughput'))
    tables = [('Where long-short attention needs less', crossover_table(report)), ('All points', points_table(report))]
    tables[1:1] = [(f'{q.name}, {q.unit}', growth_table(report, q)) for q in report.quantities]
    template = string.Template(resources.files(__package__).joinpath('report_template.html').read_text())
    return template.substitute(
        run=html.escape(_describe_run(report)),
        command=html.escape(report.results.machine['command']),
        figures='\n'.join(figures),
        tables='\n'.join(_table_element(title, *table) for title, table in tables))


def _figure_element(figure: 'Figure', text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='svg')
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="{html.escape(text)}" src="data:image/svg+xml;base64,{data}"></figure>'


def _table_element(title: str, rows: Sequence[Any], columns: Columns) -> str:
    head = ''.join(f'<th><button type="button">{html.escape(name)}</button></th>' for name in columns)
    lines = [''.join(f'<td>{html.escape(str(cell(row)))}</td>' for cell in columns.values()) for row in rows]
    body = '\n'.join(f'<tr>{line}</tr>' for line in lines)
    return (
        f'<section><h2>{html.escape(title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f'<tbody>{body}</tbody></table></div></section>')
