"""The runs that an experiment compares, paired by seed, and those of its class, from which its noise is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from db.records import Experiment, Run, RunKind, Stage
from db.store import Store, to_column

CLASS_FIELDS = (
    "d_model",
    "n_layers",
    "num_experts",
    "vocab_size",
    "corpus",
    "corpus_documents",
    "budget_tokens",
    "budget_seconds",
    "eval_tokens",
)
"""Fields of the baseline that, with the hardware class, make up the class over which the noise of a metric is pooled:
model size, text, budget, evaluation."""

NEWEST = 1000
"""Experiments of a class that are looked at: enough to know the noise to 2 %."""


class Pair(BaseModel):
    """The runs of one seed on both sides of a comparison."""

    model_config = ConfigDict(frozen=True)

    seed: int
    stage: Stage
    baseline: Run | None
    treatment: Run | None

    def difference(self, metric: str) -> float | None:
        """treatment - baseline; None while a side has no score by that metric."""
        base, treated = score_of(self.baseline, metric), score_of(self.treatment, metric)
        return None if base is None or treated is None else treated - base


def score_of(run: Run | None, metric: str) -> float | None:
    """What a run has scored by a metric; None without."""
    return run.score.get(metric) if run is not None and run.score else None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What results were made with: the version of moe/, and the kind of hardware."""

    code: str
    hardware_class: str


@dataclass(frozen=True, kw_only=True)
class ScoredPair:
    """Both scores of a pair somewhere in the class. Runs of one fingerprint are of one config; of equal seed and stage,
    they are the same run. extended: its experiment had further screening pairs because of what the first one said."""

    experiment_id: int
    stage: Stage
    seed: int
    baseline_fingerprint: str
    treatment_fingerprint: str
    extended: bool
    baseline: float
    treatment: float


def pairs(store: Store, experiment_id: int, stage: Stage | None = None) -> list[Pair]:
    """What an experiment compares: training runs, or post runs of their checkpoints; of one stage or of both.

    Where a side of a seed was queued again with another moe/ or another card, the newest run is meant that has not
    failed and was not cancelled.
    """
    by_seed: dict[tuple[Stage, int], dict[str, Run]] = {}
    for row in store.rows(
        """
        SELECT runs.*, experiment_runs.arm FROM experiment_runs JOIN runs ON runs.id = experiment_runs.run_id
        WHERE experiment_runs.experiment_id = :id AND experiment_runs.arm IN ('baseline', 'treatment')
          AND (:stage IS NULL OR runs.purpose = :stage)
        ORDER BY runs.purpose DESC, runs.seed, runs.status NOT IN ('failed', 'cancelled'), runs.id
        """,
        {"id": experiment_id, "stage": stage},
    ):
        by_seed.setdefault((row["purpose"], row["seed"]), {})[row["arm"]] = Run.of(row)

    return [
        Pair(seed=seed, stage=purpose, baseline=arms.get("baseline"), treatment=arms.get("treatment"))
        for (purpose, seed), arms in by_seed.items()
    ]


def paired_seconds(store: Store, found: Sequence[Pair]) -> list[tuple[float, float]]:
    """Of each pair, how long both sides trained, or the runs whose checkpoints they start from: baseline, treatment.

    Without pairs of which a card was disturbed, or which nobody timed.
    """
    runs = [run.id for pair in found for run in (pair.baseline, pair.treatment) if run is not None]
    rows = store.rows(
        """
        SELECT runs.id, json_extract(trained.score, '$.train_seconds') AS train_seconds FROM json_each(?) AS chosen
        CROSS JOIN runs ON runs.id = chosen.value
        CROSS JOIN runs AS trained ON trained.id = CASE runs.kind WHEN 'post' THEN runs.needs_run_id ELSE runs.id END
        WHERE trained.disturbance IS NULL AND json_extract(trained.score, '$.train_seconds') IS NOT NULL
        """,
        (to_column(runs),),
    )
    seconds = {row["id"]: float(row["train_seconds"]) for row in rows}
    sides = [(pair.baseline.id, pair.treatment.id) for pair in found if pair.baseline and pair.treatment]
    return [(seconds[before], seconds[after]) for before, after in sides if {before, after} <= seconds.keys()]


def origins(store: Store, experiment_id: int, stage: Stage | None = None) -> list[Origin]:
    """What the results on both sides of an experiment were made with, of one stage or of both; oldest first."""
    rows = store.rows(
        """
        SELECT runs.code, runs.hardware_class FROM experiment_runs JOIN runs ON runs.id = experiment_runs.run_id
        WHERE experiment_runs.experiment_id = :id AND experiment_runs.arm IN ('baseline', 'treatment')
          AND runs.status IN ('completed', 'pruned') AND (:stage IS NULL OR runs.purpose = :stage)
        GROUP BY runs.code, runs.hardware_class ORDER BY min(runs.id)
        """,
        {"id": experiment_id, "stage": stage},
    )
    return [Origin(**row) for row in rows]


def is_ever_scored(store: Store, code: str, kind: RunKind, keys: Sequence[str]) -> bool:
    """Whether any score of that kind which a version of moe/ has made says what stands under these keys."""
    found = store.value(
        """
        SELECT EXISTS (SELECT 1 FROM runs WHERE code = ? AND kind = ? AND status = 'completed'
                         AND json_extract(score, ?) IS NOT NULL)
        """,
        (code, kind, "$" + "".join(f'."{key}"' for key in keys)),
    )
    return bool(found)


def scored_pairs(
    store: Store, experiment: Experiment, metric: str, *, same_checkpoint: bool, share: float = 1.0
) -> list[ScoredPair]:
    """All complete pairs in the experiment's class that were scored by `metric`, its own among them, oldest first.

    Pairs made of one checkpoint, which differ far less, and pairs of which each side was trained for itself are two
    classes; so are those trained for a `share` of the budget and those trained for all of it. Of a large class, the
    NEWEST experiments that have a verdict.
    """
    fields = " AND ".join(
        f"json_extract(baselines.config, '$.{name}') IS json_extract(:baseline, '$.{name}')" for name in CLASS_FIELDS
    )
    rows = store.rows(
        f"""
        SELECT mine.experiment_id, treated.purpose AS stage, treated.seed,
               base.fingerprint AS baseline_fingerprint, treated.fingerprint AS treatment_fingerprint,
               EXISTS (SELECT 1 FROM verdicts AS first WHERE first.experiment_id = class.id
                         AND first.stage = 'screen' AND first.pairs = 1) AS extended,
               json_extract(base.score, :path) AS baseline, json_extract(treated.score, :path) AS treatment
        FROM (SELECT * FROM (
                  SELECT experiments.id, experiments.screen_share
                  FROM verdicts CROSS JOIN experiments ON experiments.id = verdicts.experiment_id
                  CROSS JOIN baselines ON baselines.id = experiments.baseline_id
                  WHERE verdicts.current = 1 AND experiments.hardware_class = :class AND {fields}
                  ORDER BY verdicts.experiment_id DESC LIMIT {NEWEST})
              UNION SELECT id, screen_share FROM experiments WHERE id = :id) AS class
        CROSS JOIN experiment_runs AS mine ON mine.experiment_id = class.id AND mine.arm = 'treatment'
        CROSS JOIN runs AS treated ON treated.id = mine.run_id AND treated.status = 'completed'
        CROSS JOIN experiment_runs AS theirs ON theirs.experiment_id = class.id AND theirs.arm = 'baseline'
        CROSS JOIN runs AS base ON base.id = theirs.run_id AND base.status = 'completed' AND base.seed = treated.seed
                         AND base.purpose = treated.purpose AND base.code = treated.code
                         AND base.hardware_class = treated.hardware_class
        WHERE (treated.kind = 'post' AND treated.needs_run_id = base.needs_run_id) = :same
          AND CASE treated.purpose WHEN 'screen' THEN coalesce(class.screen_share, 1.0) ELSE 1.0 END = :share
        ORDER BY mine.experiment_id, treated.purpose DESC, treated.seed
        """,
        {
            "path": f'$."{metric}"',
            "baseline": to_column(experiment.baseline),
            "class": experiment.hardware_class,
            "id": experiment.id,
            "same": same_checkpoint,
            "share": share,
        },
    )
    return [
        ScoredPair(**row | {"extended": bool(row["extended"])})
        for row in rows
        if row["baseline"] is not None and row["treatment"] is not None
    ]
