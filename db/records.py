"""The rows of the lab as frozen, typed records, and the words for their states."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict

ExperimentStatus = Literal[
    "suggested",
    "approved",
    "needs_work",
    "rejected",
    "superseded",
    "queued",
    "running",
    "concluded",
    "failed",
    "cancelled",
]
RunStatus = Literal["queued", "running", "completed", "pruned", "failed", "cancelled"]
RunKind = Literal["probe", "train", "post", "ablate"]
Arm = Literal["probe", "checkpoint", "baseline", "treatment", "ablation"]
Proposer = Literal["llm", "optimizer", "assistant", "catalog"]
Reviewer = Literal["llm", "assistant", "rubric"]
Decision = Literal["approve", "refine", "rewrite", "reject"]
Direction = Literal["lower", "higher"]
Word = Literal["improved", "improved but not causal", "worse", "equivalent", "no evidence yet", "invalid"]
RunnerMode = Literal["open", "paused", "draining"]
Stage = Literal["screen", "confirm"]
Screening = Literal["promising", "not promising"]
Claim = Literal["improved", "worse", "equivalent"]
Value = bool | int | float | str | None

JOULES_PER_KWH = 3.6e6

READS_CHECKPOINT: frozenset[RunKind] = frozenset({"post", "ablate"})
"""Kinds that start from the trained weights of the run that they need."""

OUT_OF_TIME = "out of time"
"""How the error of a run begins that took longer than runner.max_run_seconds at every try."""

ENDED_RUN: frozenset[RunStatus] = frozenset({"completed", "pruned", "failed", "cancelled"})
ENDED_EXPERIMENT: frozenset[ExperimentStatus] = frozenset(
    {"rejected", "superseded", "concluded", "failed", "cancelled"}
)


class Record(BaseModel):
    """One row. Columns that hold JSON arrive as Python values."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """The record of a row as the database returns it."""
        values = dict(row)
        for name, field in cls.model_fields.items():
            if isinstance(values.get(name), str) and _is_json(field.annotation):
                values[name] = json.loads(values[name])

        return cls.model_validate(values)


def _is_json(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return any(_is_json(part) for part in get_args(annotation))

    return get_origin(annotation) in (dict, list)


class Experiment(Record):
    """One question. `baseline` is a whole config, `treatment` the overrides compared with it.

    screen_share: the part of the budget that its screening trains for; None before it was queued.
    """

    id: int
    title: str
    hypothesis: str
    method: str
    domain: str
    focus_area: str | None
    preset: str
    baseline: dict[str, Value]
    treatment: dict[str, Value]
    metric: str
    direction: Direction
    guard_metric: str | None
    guard_margin: float | None
    metric_text: str | None
    proposer: Proposer
    source: str | None
    parent_id: int | None
    revision: int
    cycle_id: int | None
    status: ExperimentStatus
    reason: str | None
    priority: int
    seeds: int
    confirm: Literal["promising", "always"]
    equal_flops: bool
    screen_share: float | None
    on_champion_id: int | None
    combines_id: int | None
    hardware_class: str | None
    created_at: str
    updated_at: str

    def share_in(self, stage: Stage) -> float:
        """The part of the budget that the runs of a stage train for; a confirmation's all of it."""
        return 1.0 if stage == "confirm" else self.screen_share or 1.0


class Review(Record):
    """Scores from 1 to 10 on the five criteria, their weighted mean, and where it leads."""

    id: int
    experiment_id: int
    reviewer: Reviewer
    novelty: float
    feasibility: float
    impact: float
    clarity: float
    efficiency: float
    score: float
    decision: Decision
    feedback: str
    success_probability: float | None
    facts: dict[str, Any]
    interaction_id: int | None
    created_at: str


class Runner(Record):
    """One card, the cards that train together, or the CPU of one host, and the daemon that drives it.

    `memory_bytes` is that of each card, or of the host; `threads` those of each of the `processes` that train a run.
    """

    id: int
    hostname: str
    device: Literal["cpu", "cuda"]
    device_name: str
    device_key: str
    precision: Literal["fp32", "bf16", "fp16"]
    torch: str
    hardware_class: str
    memory_bytes: int
    threads: int
    cards: int
    processes: int
    status: Literal["registered", "running", "stopped"]
    pid: int | None
    boot_id: str | None
    message: str | None
    mode: RunnerMode
    started_at: str
    heartbeat_at: str

    @property
    def memory_share(self) -> float:
        """The part of `memory_bytes` that each training process may have: a card is its own, a host is shared."""
        return self.cards / self.processes


class Run(Record):
    """One child process on one config and seed; its progress, and its score when it is done. `code` is the hash of
    moe/ that its fingerprint was made of, `disturbance` what made it a worse measurement, as a throttled card does;
    `beaten_by` the baseline run whose curve it could not catch up with, where that is why it was pruned."""

    id: int
    kind: RunKind
    fingerprint: str
    seed: int
    hardware_class: str
    code: str
    config: dict[str, Value]
    baseline: dict[str, Value] | None
    purpose: Stage
    needs_run_id: int | None
    priority: int
    status: RunStatus
    cancel_requested: bool
    step: int | None
    steps: int | None
    tokens: int | None
    seconds: float | None
    train_loss: float | None
    val_bpb: float | None
    score: dict[str, Any] | None
    passed: bool | None
    error: str | None
    log_tail: str | None
    failures: int
    lost: int
    disturbance: str | None
    beaten_by: int | None
    created_at: str
    started_at: str | None
    ended_at: str | None

    @property
    def ran_out(self) -> bool:
        """Whether it failed because it took longer than a run may: a treatment's own fault, unlike a crash."""
        return self.status == "failed" and (self.error or "").startswith(OUT_OF_TIME)


class Attempt(Record):
    """One try of a run by one runner, under a lease (seconds since boot) with a fencing token.

    `bytes` is what its directory holds on disk, `weights_bytes` the part that is trained weights: None before that was
    measured, 0 when there are none (any more).
    """

    id: int
    run_id: int
    runner_id: int
    token: int
    status: Literal["live", "completed", "failed", "lost", "cancelled"]
    directory: str
    pid: int | None
    boot_id: str
    lease_until: float
    metrics_offset: int
    exit_code: int | None
    error: str | None
    joules: float | None
    micro_batch_size: int | None
    started_at: str
    heartbeat_at: str
    ended_at: str | None
    bytes: int | None
    weights_bytes: int | None

    @property
    def kwh(self) -> float | None:
        """Energy that the card used for it; None where nothing measured it."""
        return None if self.joules is None else self.joules / JOULES_PER_KWH


class Verdict(Record):
    """What the runs say of a hypothesis. Effects are treatment - baseline, of the metric and of its guard.

    said: the word to show, since a screening claims nothing and has words of its own (screening). evidence: the e-value
    that the treatment is better; needed: the one at which it is claimed. expected: the true effect to expect, shrunk
    toward what effects have been so far. share: the part of the budget that its runs were trained for; below 1
    its effect is not that of the whole budget. noise: standard deviation of one pair's difference, known as well as
    from noise_df degrees of freedom. baseline_seconds, treatment_seconds: how long a run trained, the median over the
    pairs.
    """

    id: int
    experiment_id: int
    verdict: Word
    stage: Stage | None
    screening: Screening | None
    said: str
    final: bool
    sentence: str
    reason: str | None
    method: str
    metric: str
    pairs: int
    share: float
    seeds: list[int]
    baseline_mean: float | None
    treatment_mean: float | None
    effect: float | None
    low: float | None
    high: float | None
    confidence: float | None
    noise: float | None
    noise_df: float | None
    margin: float | None
    evidence: float | None
    needed: float | None
    expected: float | None
    guard_effect: float | None
    guard_low: float | None
    guard_high: float | None
    baseline_parameters: int | None
    treatment_parameters: int | None
    baseline_active_parameters: int | None
    treatment_active_parameters: int | None
    baseline_flops: float | None
    treatment_flops: float | None
    baseline_seconds: float | None
    treatment_seconds: float | None
    cost_seconds: float
    cost_kwh: float | None
    created_at: str


class Hypothesis(Record):
    """A promising experiment that is put to the test on new pairs, and how far the evidence has come.

    `seeds` were drawn by the lab, one a pair. noise_sd and noise_df are what was known of the class at the first look
    at its pairs, guard_sd and guard_df the same of its guard metric: the evidence needs them fixed. improved, worse and
    equivalent are e-values; a claim, over its campaign and over the lab's whole life, is never taken back.
    """

    id: int
    experiment_id: int
    campaign: str
    seeds: list[int]
    max_pairs: int
    noise_sd: float | None
    noise_df: float | None
    guard_sd: float | None
    guard_df: float | None
    improved: float
    worse: float
    equivalent: float
    claim: Claim | None
    lab_claim: Claim | None
    registered_at: str
    updated_at: str


class Champion(Record):
    """A config that confirmed gains have led to; `gain` is what to expect of all of them together, in val_bpb.

    `experiment_id` confirmed it against its parent; the root of a lineage, a baseline, has neither.
    """

    id: int
    parent_id: int | None
    experiment_id: int | None
    preset: str
    hardware_class: str
    config: dict[str, Value]
    gain: float
    created_at: str


class Insight(Record):
    """A pattern over verdicts: what one knob, moved one way, has done so far to one metric on one preset."""

    id: int
    knob: str
    direction: str
    preset: str
    metric: str
    statement: str
    verdict: str
    effect: float | None
    verdict_count: int
    created_at: str
    updated_at: str


class Task(Record):
    """A call that an agent answers: in the call itself, or later in the mind process."""

    id: int
    kind: str
    arguments: dict[str, Any]
    idempotency_key: str | None
    status: Literal["queued", "running", "done", "failed"]
    result: dict[str, Any] | None
    error: str | None
    created_at: str
    started_at: str | None
    ended_at: str | None


class Cycle(Record):
    """One automatic research campaign: rounds of suggest, review, improve, enqueue, wait, learn."""

    id: int
    domain: str | None
    focus_area: str | None
    count: int
    max_cycles: int
    round: int
    step: Literal["suggest", "review", "improve", "enqueue", "wait", "learn", "end"]
    start_runner: bool
    status: Literal["running", "done", "failed", "cancelled"]
    error: str | None
    created_at: str
    updated_at: str


class Event(Record):
    """One line of the lab's journal."""

    id: int
    at: str
    kind: str
    message: str
    experiment_id: int | None
    run_id: int | None
