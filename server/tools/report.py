"""report: one experiment or the whole lab, written down for people: Markdown, one HTML page, and plots."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from db.formats import cut
from db.lab import Lab
from server.report.write import write_report
from server.views import Illustrated


class ReportView(Illustrated):
    """A report that was written into the lab's folder, and what it says in short."""

    title: str
    summary: list[str]
    """its main sentences; every number in them is one of the lab's rows"""
    html: str
    """one file that needs nothing else: open it in a browser, print it, send it"""
    markdown: str
    """the same as Markdown, with its pictures as files beside it"""
    note: str | None
    """why no image came, where none did"""
    next: str
    """what to call next"""


def report(
    lab: Lab,
    *,
    experiment_id: Annotated[int | None, Field(ge=1, description="one experiment; without it the whole lab")] = None,
) -> ReportView:
    """Writes a report of one experiment, or of the whole lab, and shows its plots.

    It holds the verdicts with their intervals, the effect to expect beside the one observed, forest plot and curves,
    every pair, seeds, e-values, what was registered and not claimed, what diverged, costs, versions, and the sources of
    the knobs. The answer has the main sentences, where the files are, and the plots as images. Quote the sentences as
    they are: they never say more than the evidence. It changes nothing in the lab's data; call it again at any time.
    """
    written = write_report(lab, experiment_id)
    return ReportView(
        title=cut(written.title, 120),
        summary=[cut(sentence, 600) for sentence in written.sentences],
        html=str(written.html),
        markdown=str(written.markdown),
        images=[str(path) for path in written.images],
        note=written.missing,
        next="report(experiment_id) for one of them" if experiment_id is None else "report() for the whole lab",
    )
