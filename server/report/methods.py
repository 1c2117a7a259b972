"""How what a report says came about: the method, the control of false discoveries, the versions it was made with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version

from agents.discoveries import ALPHA
from agents.wording import screened
from db.formats import count, plain
from db.records import Experiment, Run, Value
from db.reporting import Family, Line, ReportedLab
from moe.config import KNOBS, Config
from moe.fingerprint import EVALUATOR_VERSION, code_hash, corpus_identity, split_pin
from moe.presets import PRESETS
from moe.texts import CorpusError
from server.report.document import Block, Paragraph, Table

METHODS = (
    "Each experiment compares a treatment with a baseline in pairs of runs: equal seed, equal data order, equal budget "
    f"unless it says otherwise, one hardware class. {screened('screen')} What is promising, or was asked to be "
    "confirmed in any case, is registered, in an order that is never changed, and put to the test. "
    f"{screened('confirm')} An e-value is evidence that keeps its meaning however often one looks and whenever one "
    "stops; it is claimed when it reaches what the hypothesis needs, given its place in the order and the claims "
    "before it (Fischer, Xu and Ramdas 2024, arXiv:2407.20683). A loss of the guard metric beyond its margin makes a "
    "verdict worse by a 95 % interval of its own, and is no such claim. A pair whose treatment diverged or ran out "
    "of time counts at the worst bound; none is dropped. The expected effect is that of all pairs, screening and "
    "confirming, drawn toward what effects have been in its class, since what is picked for being large is on average "
    "smaller."
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


def baseline_of(experiment: Experiment) -> str:
    """The config that its treatment changes: the preset, and what is not as in it."""
    preset = PRESETS.get(experiment.preset)
    known = {} if preset is None else preset.model_dump()
    machine = {name for name, knob in KNOBS.items() if knob.role == "machine"}
    others = [
        f"{name} {plain(value)}"
        for name, value in experiment.baseline.items()
        if name not in machine and known.get(name) != value
    ]
    return " with ".join([f"preset {experiment.preset}", *([", ".join(others)] if others else [])])


def baselines(lines: Sequence[Line]) -> Table:
    """What the experiments were compared with, and how large its runs were."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for line in sorted(lines, key=lambda line: line.experiment.id):
        verdict, experiment = line.verdict, line.experiment
        sizes = (verdict.baseline_parameters, verdict.baseline_active_parameters, verdict.baseline_flops)
        text = split_pin(str(experiment.baseline.get("corpus", "–")))[0]
        key = (baseline_of(experiment), text, tokens_of(experiment.baseline), *map(count, sizes))
        groups.setdefault(key, []).append(str(experiment.id))

    return Table(
        columns=("baseline", "text", "of experiments", "tokens a run", "parameters", "active", "FLOPs a run"),
        rows=[(key[0], key[1], ", ".join(experiments), *key[2:]) for key, experiments in groups.items()],
        numbers=4,
    )


def tokens_of(config: Mapping[str, Value]) -> str:
    """How much text a run of this config is trained on."""
    tokens, seconds = config.get("budget_tokens"), config.get("budget_seconds")
    return count(float(tokens)) if tokens is not None else "–" if seconds is None else f"as in {seconds} s"


def versions(found: ReportedLab) -> Iterator[Block]:
    """What the lab's runs were made with, and what writes this."""
    yield Table(
        columns=("hardware class, with torch", "code of moe/", "evaluator", "text as read, SHA-256", "runs"),
        rows=[
            (item["hardware_class"], item["code"][:12], *(str(item[name]) for name in ("evaluator", "text", "runs")))
            for item in found.made_with
        ],
        numbers=1,
    )
    yield Paragraph(
        text=f"Written by Blueberry {version('blueberry-lab')}, whose code of moe/ is {code_hash()[:12]} and whose "
        f"evaluator is {EVALUATOR_VERSION}.",
        quiet=True,
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
