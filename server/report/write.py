"""Writes a report into the lab's folder reports/: Markdown with its pictures, one HTML page, PNG for chat clients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from db.lab import Lab
from db.processes import write_atomically
from db.reporting import read_experiment, read_lab
from db.store import snapshot
from server.report.document import Document, Finding, Paragraph, Picture
from server.report.experiment import effects, experiment_document
from server.report.lab import forests, lab_document
from server.report.pages import as_html, as_markdown, as_svg
from server.report.plots import PlotsUnavailableError, plot_curves, plot_forest, plot_lineage

_MOST_SENTENCES = 12


@dataclass(frozen=True, kw_only=True)
class Written:
    """A report on disk. `sentences` are its findings; `missing` says why there are no PNG files."""

    title: str
    sentences: list[str]
    html: Path
    markdown: Path
    images: list[Path]
    missing: str | None


def write_report(lab: Lab, experiment_id: int | None, *, images: bool = True) -> Written:
    """The report of an experiment, or of the lab; one that is there is replaced.

    Raises:
        NotFoundError: there is no such experiment.
    """
    name = "lab" if experiment_id is None else f"experiment-{experiment_id}"
    folder = lab.folder / "reports" / name
    with snapshot(lab.store.path) as store:
        if experiment_id is None:
            of_lab = read_lab(store)
            document = lab_document(of_lab)
            plots = {forest.name: (forest.rows, forest.metric) for forest in forests(of_lab)}
            curves = []
            trees = [lineage.steps for lineage in of_lab.lineages]
        else:
            of_one = read_experiment(store, experiment_id)
            document = experiment_document(of_one)
            rows = effects(of_one)
            plots = {"forest": (rows, of_one.experiment.metric)} if rows else {}
            curves = [item for item in of_one.curves if any(item.seeds.values())]
            trees = []

    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("*.svg"), *folder.glob("*.png")):
        stale.unlink()

    for block in document.blocks:
        if isinstance(block, Picture):
            write_atomically(folder / f"{block.name}.svg", as_svg(block))

    write_atomically(folder / "report.md", as_markdown(document))
    write_atomically(folder / "report.html", as_html(document))
    made: list[Path] = []
    missing = None
    try:
        for plot, (rows, metric) in plots.items() if images else ():
            plot_forest(rows, f"treatment less baseline, {metric}", folder / f"{plot}.png")
            made.append(folder / f"{plot}.png")

        if images and curves:
            plot_curves(curves, folder / "curves.png")
            made.append(folder / "curves.png")

        for number, steps in enumerate(trees if images else (), start=1):
            plot_lineage(steps, folder / f"lineage-{number}.png")
            made.append(folder / f"lineage-{number}.png")
    except PlotsUnavailableError as error:
        missing = str(error)

    return Written(
        title=document.title,
        sentences=_sentences(document),
        html=folder / "report.html",
        markdown=folder / "report.md",
        images=made,
        missing=missing,
    )


def _sentences(document: Document) -> list[str]:
    findings = [f"{block.word}: {block.sentence}" for block in document.blocks if isinstance(block, Finding)]
    texts = [block.text for block in document.blocks if isinstance(block, Paragraph) and not block.quiet]
    more = [] if len(findings) <= _MOST_SENTENCES else [f"and {len(findings) - _MOST_SENTENCES} more"]
    return [*texts[:2], *findings[:_MOST_SENTENCES], *more] if "lab" in document.title else [*texts[:1], *findings]
