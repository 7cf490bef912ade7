"""``report.html``, one self-contained page, and ``report.md`` with its PNGs beside it."""

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from dhrd_plugin.comparison.results import read_results
from dhrd_plugin.errors import UserError
from dhrd_plugin.files import write_bytes

if TYPE_CHECKING:  # these need the extra
    from dhrd_plugin.comparison.charts import Chart
    from dhrd_plugin.comparison.content import Section, Table
    from dhrd_plugin.comparison.report import Report

__all__ = ['html', 'markdown', 'write_report']

TEMPLATE = Path(__file__).with_name('report.html.j2')


def write_report(folder: Path) -> list[Path]:
    """Report on a comparison, or on as much of it as is there; needs the extra ``report``.

    Args:
        folder: where ``compare.py`` left ``comparison.yaml`` and ``results.jsonl``; the report goes there too.

    Returns:
        ``report.html``, ``report.md`` and the PNGs.

    Raises:
        UserError: a broken file, or the extra is not installed.
    """
    try:
        import jinja2  # noqa: F401
        import scipy  # noqa: F401

        from dhrd_plugin.comparison.report import build_report
    except ImportError as error:
        raise UserError(f"report: {error.name} is not installed; pip install 'dhrd-plugin[report]'") from None
    folder = Path(folder)
    report = build_report(read_results(folder))
    pictures = {f'{chart.name}.png': chart.png for section in report.sections for chart in section.charts}
    files = {'report.html': html(report).encode(), 'report.md': markdown(report).encode(), **pictures}
    for name in reversed(files):  # the pictures first: the pages show them
        write_bytes(folder / name, files[name])
    return [folder / name for name in files]


# ---------------------------------------------------------------------------------------- HTML


def html(report: 'Report') -> str:
    """The page; everything from the data is escaped."""
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding='utf-8'))
    return template.render(
        name=report.name,
        answer=report.answer,
        state=report.state,
        sections=report.sections,
        svg=lambda chart: Markup(_described(chart)),
    )


def _described(chart: 'Chart') -> str:
    """The SVG with its text alternative; matplotlib has escaped what it holds."""
    return chart.svg.replace('<svg', f'<svg role="img" aria-label="{escape(chart.alt)}"', 1)


# ------------------------------------------------------------------------------------ Markdown


def markdown(report: 'Report') -> str:
    """The same for places that show Markdown, such as a repository; its pictures are files beside it."""
    lines = [f'# Comparison: {plain(report.name)}', f'**{plain(report.answer)}**', *map(plain, report.state)]
    for section in report.sections:
        lines += _section(section)
    return '\n\n'.join(lines) + '\n'


def _section(section: 'Section') -> Iterator[str]:
    yield f'## {plain(section.title)}'
    yield from map(plain, section.texts)
    for chart in section.charts:
        yield plain(chart.title)
        yield f'![{plain(chart.alt)}]({chart.name}.png)'
    for table in section.tables:
        yield plain(table.caption)
        yield _table(table)
    if section.code:
        summary, text = section.code
        fence = '`' * max(3, 1 + max((len(run) for run in re.findall('`+', text)), default=0))
        yield f'<details><summary>{plain(summary)}</summary>'
        yield f'{fence}yaml\n{text.rstrip()}\n{fence}'
        yield '</details>'


def _table(table: 'Table') -> str:
    rows: list[Sequence[str]] = [table.header, ['---'] * len(table.header)]
    cells = [[plain(cell) for cell in row] for row in table.rows]
    cells = [[*(f'**{cell}**' for cell in row[: table.names]), *row[table.names :]] for row in cells]
    return '\n'.join(f'| {" | ".join(row)} |' for row in [[plain(c) for c in rows[0]], rows[1], *cells])


def plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    text = re.sub(r'([\\`*|~])|(?<!\w)_|_(?!\w)|\[(?=[^]]*\]\()', lambda found: f'\\{found[0]}', ' '.join(text.split()))
    return text.replace('&', '&amp;').replace('<', '&lt;')
