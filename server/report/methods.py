"""How what a report says came about: the method, the control of false discoveries, the versions it was made with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version

from agents.discoveries import ALPHA
from agents.wording import screened
from db.records import Run
from db.reporting import Family
from moe.config import Config
from moe.fingerprint import EVALUATOR_VERSION, code_hash, corpus_identity, split_pin
from moe.texts import CorpusError
from server.report.document import Paragraph, Table

METHODS = (
    "Each experiment compares a treatment with a baseline in pairs of runs: equal seed, equal data order, equal budget "
    f"unless it says otherwise, one hardware class. {screened('screen')} What is promising is registered, in an order "
    f"that is never changed, and put to the test. {screened('confirm')} An e-value is evidence that keeps its meaning "
    "however often one looks and whenever one stops; it is claimed when it reaches what the hypothesis needs, given "
    "its place in the order and the claims before it (Fischer, Xu and Ramdas 2024, arXiv:2407.20683). A pair whose "
    "treatment diverged counts at the worst bound; none is dropped. The expected effect is the observed one, drawn "
    "toward what effects have been in its class, since what is picked for being large is on average smaller."
)


def error_control(families: Sequence[Family]) -> Paragraph:
    """What was registered and claimed, in campaigns and in the lab's life, and how much of it may be false."""
    *campaigns, life = families
    if len(campaigns) == 1 and campaigns[0].registered == life.registered:
        sentences = [_family(life, f"In campaign {campaigns[0].name}, which is the lab's whole life")]
    else:
        sentences = [_family(item, f"In campaign {item.name}") for item in campaigns]
        sentences.append(_family(life, "In the lab's whole life"))

    return Paragraph(
        text=f"{' '.join(sentences)} Of all that is claimed, at most {100 * ALPHA:.0f} % is false on average, for each "
        "of the three words by itself."
    )


def made_with(runs: Iterable[Run], config: Config) -> Table:
    """Versions: what the runs were made with, from their own rows, and what writes this."""
    known = list(runs)
    return Table(
        columns=("made with", ""),
        rows=[
            ("Blueberry", f"{version('blueberry-lab')}, code of moe/ {code_hash()[:12]} now"),
            ("code of moe/ at the runs", _several(run.code[:12] for run in known)),
            ("hardware class, with torch", _several(run.hardware_class for run in known)),
            ("evaluator", f"{_scored(known, 'evaluator')} (now {EVALUATOR_VERSION})"),
            ("text", f"{split_pin(config.corpus)[0]}, {_corpus(config)}"),
            ("text as read, SHA-256", _scored(known, "corpus_sha256")),
            ("split that was scored", _scored(known, "split")),
        ],
    )


def _family(family: Family, where: str) -> str:
    claims = ", ".join(f"{count} {word}" for word, count in family.claims.items() if count) or "nothing"
    were = "hypothesis was" if family.registered == 1 else "hypotheses were"
    return f"{where}, {family.registered} {were} registered; claimed: {claims}."


def _scored(runs: Sequence[Run], name: str) -> str:
    return _several(str(run.score[name])[:16] for run in runs if run.score and name in run.score)


def _several(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values)) or "–"


def _corpus(config: Config) -> str:
    try:
        return f"known by {corpus_identity(config)[:40]}"
    except CorpusError:
        return "not pinned"
