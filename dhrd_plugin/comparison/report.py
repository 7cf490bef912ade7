"""A whole report, in the order in which it is read."""

from collections.abc import Sequence
from dataclasses import dataclass

from dhrd_plugin.comparison import content, facts
from dhrd_plugin.comparison.charts import draw_differences, draw_scores
from dhrd_plugin.comparison.content import Section
from dhrd_plugin.comparison.curves import draw_curves
from dhrd_plugin.comparison.results import Results
from dhrd_plugin.comparison.statistics import analyse

__all__ = ['Report', 'build_report']


@dataclass(frozen=True)
class Report:
    """What is said.

    Attributes:
        name: of the comparison.
        answer: does it help, in a sentence.
        state: what is missing or too much.
        sections: the rest.
    """

    name: str
    answer: str
    state: Sequence[str]
    sections: Sequence[Section]


def build_report(results: Results) -> Report:
    """Everything that is to be said of results; only how they were to be made where there are none."""
    statistics = analyse(results)
    sections = []
    if statistics.scores:
        sections.append(content.scores(results, statistics))
    if statistics.differences:
        sections.append(content.differences(results, statistics, draw_differences(results, statistics)))
    if statistics.common:
        sections.append(Section('In one picture', charts=[draw_scores(results, statistics)]))
    if statistics.tests:
        sections.append(content.tests(results, statistics))
    if statistics.scores:
        sections.append(facts.cost(results))
    if curves := draw_curves(results):
        text = 'Means over seeds, and thin lines for each seed. A point of a long series is the mean of some steps.'
        sections.append(Section('While it trained', [text], charts=curves))
    sections += facts.from_paper(results, statistics)
    sections.append(facts.making(results))
    return Report(results.name, content.answer(results, statistics), content.state(results), sections)
