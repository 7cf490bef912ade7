"""``report.html``, one self-contained page, and ``report.md`` with its PNGs beside it."""

import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dhrd_plugin import pictures
from dhrd_plugin.comparison.results import read_results
from dhrd_plugin.files import write_bytes

if TYPE_CHECKING:  # these need the extra
    from dhrd_plugin.comparison.charts import Chart
    from dhrd_plugin.comparison.sections import Report


def write_report(folder: Path) -> list[Path]:
    """Report on a comparison, or on as much of it as is there; needs the extra ``report``.

    Args:
        folder: where ``dhrd compare`` left ``comparison.yaml`` and ``results.jsonl``; the report goes there too.

    Returns:
        ``report.html``, ``report.md`` and the PNGs.
    """
    check_extra()
    from dhrd_plugin.comparison.sections import build_report

    folder = Path(folder)
    report = build_report(read_results(folder))
    pngs = {f'{chart.name}.png': chart.png for section in report.sections for chart in section.charts}
    files = {'report.html': html(report).encode(), 'report.md': markdown(report).encode(), **pngs}
    for name in reversed(files):  # the pictures first: the pages show them
        write_bytes(folder / name, files[name])
    return [folder / name for name in files]


def check_extra() -> None:
    """Refuse to go on without the extra ``report``."""
    pictures.check_extra('report', 'jinja2', 'matplotlib', 'scipy', 'sklearn')


def html(report: 'Report') -> str:
    """The page; everything from the data is escaped."""
    from markupsafe import Markup

    def svg(chart: 'Chart') -> str:
        """With its text alternative; matplotlib has escaped what it holds."""
        return Markup(chart.svg.replace('<svg', f'<svg role="img" aria-label="{escape(chart.alt)}"', 1))

    return _render('report.html.j2', report, autoescape=True, svg=svg)


def markdown(report: 'Report') -> str:
    """The same for places that show Markdown, such as a repository; its pictures are files beside it."""
    from markupsafe import Markup

    def fenced(text: str) -> str:
        fence = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
        return Markup(f'{fence}yaml\n{text.rstrip()}\n{fence}')

    def shown(value: str) -> str:
        return value if isinstance(value, Markup) else plain(value)

    return _render('report.md.j2', report, finalize=shown, fenced=fenced)


def _render(name: str, report: 'Report', autoescape: bool = False, finalize: Any = None, **functions: Any) -> str:
    from jinja2 import Environment, FileSystemLoader

    templates = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=templates, autoescape=autoescape, finalize=finalize, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name).render(**vars(report), **functions)


def plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    text = re.sub(r'([\\`*|~])|(?<!\w)_|_(?!\w)|\[(?=[^]]*\]\()', lambda found: f'\\{found[0]}', ' '.join(text.split()))
    return text.replace('&', '&amp;').replace('<', '&lt;')
