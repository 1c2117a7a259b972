"""What the runs say of a hypothesis. No model, no torch; this module alone decides the words.

First an experiment is screened, on a few pairs that may share baselines and train for a part of the budget, or on one
where that tells enough (agents/screening.py). That claims nothing: it is promising, or it is not. What is promising is
registered and confirmed on new pairs (agents/confirmation.py), judged after each of them by agents/evidence.py: an
e-value and an interval that hold however often one looks.

    improved          the evidence that it is better suffices for a claim: of all that a campaign claims to be
    worse             improved, at most 5 % is false on average, and likewise of worse and of
    equivalent        equivalent (within one noise floor, the deviation of single runs over seeds)
    no evidence yet   anything else, with the reason why it went no further

A guard metric with a margin is weighed from its own pairs: a gain counts only when the whole interval of what the guard
lost lies within the margin. A whole interval beyond it is called worse too, at 95 % for that experiment alone: it is no
claim of the campaign. Nothing drops out: a pair whose treatment diverged or ran out of time counts at the worst
bound. A model that looks at later tokens, and says so, has a word of its own: improved but not causal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

from agents.class_noise import noise_here
from agents.confirmation import (
    CLAIMS,
    add_confirming_pairs,
    at_first_look,
    hoped_level,
    needed,
    new_claims,
    noise_known,
    register,
)
from agents.continuing import evidence_elsewhere
from agents.effects import expected_effect
from agents.effort import noise_ahead, pairs_for, quote
from agents.evidence import bounded
from agents.gates import disturbed, pair_problem, probe_problem, seed_problem
from agents.noise import Noise
from agents.pace import pace
from agents.pairs import add_pairs, configs_of
from agents.prospects import is_futile
from agents.screening import outlook
from agents.sides import has_ended, is_lost, is_scored, mean_of, value_of, why_lost
from agents.unknown import unknown_problem, unknown_remark
from agents.weighing import ALPHA, Weighed, e_values, floor_of, glance, weigh
from agents.wording import Found, method_of, sentence_of, together
from db.cards import experiment_kwh
from db.comparisons import Pair, paired_seconds, pairs
from db.experiments import add_verdict, get_experiment, latest_verdict, mark_judged, move_experiment
from db.hypotheses import get_hypothesis, note_evidence
from db.lab import Lab
from db.queries import experiment_seconds, probe_runs
from db.queue import cancel_experiment_runs
from db.records import (
    ENDED_EXPERIMENT,
    Experiment,
    ExperimentStatus,
    Hypothesis,
    Screening,
    Stage,
    Verdict,
    Word,
)
from moe.accounting import account
from moe.post.stages import as_served


def judge_experiment(lab: Lab, experiment: Experiment) -> Verdict | None:
    """Weighs what has ended of an experiment, in one transaction; the verdict written, if there was cause for one.

    A promising one is registered, and gets new pairs as long as the evidence is open.
    """
    with lab.store.transaction():
        mark_judged(lab.store, experiment.id)
        experiment = get_experiment(lab.store, experiment.id)
        if experiment.status in ENDED_EXPERIMENT:  # cancelled since it was found due
            return None

        probes = probe_runs(lab.store, experiment.id)
        if reason := probe_problem(probes):
            cancel_experiment_runs(lab.store, experiment.id)
            undone = probes[-1].status == "failed"
            return _Judgement(lab, experiment, "screen", []).invalid(reason, failed=undone)

        hypothesis = get_hypothesis(lab.store, experiment.id)
        stage: Stage = "screen" if hypothesis is None else "confirm"
        found = pairs(lab.store, experiment.id, stage)
        if not found or not all(map(has_ended, found)):
            return None

        judgement = _Judgement(lab, experiment, stage, found)
        reason = pair_problem(experiment, found, stage) or unknown_problem(lab.store, experiment, found)
        if reason is None and hypothesis is not None:
            reason = seed_problem(hypothesis, found)

        if reason is not None:
            if hypothesis is not None:
                note_evidence(lab.store, hypothesis, dict.fromkeys(CLAIMS, 0.0))

            return judgement.invalid(reason, failed=True)

        return judgement.screen() if hypothesis is None else judgement.confirm(hypothesis)


class _Judgement:
    """One look at one experiment's pairs of one stage, all of which have ended."""

    def __init__(self, lab: Lab, experiment: Experiment, stage: Stage, found: Sequence[Pair]) -> None:
        self.lab = lab
        self.experiment = experiment
        self.stage = stage
        self.share = experiment.share_in(stage)
        self.found = found
        self.scored = [pair for pair in found if is_scored(pair)]
        self.lost = [pair for pair in found if is_lost(pair)]
        self.noise: Noise | None = None
        self.guard_noise: Noise | None = None

    def invalid(self, reason: str, *, failed: bool = False) -> Verdict:
        """Concludes that nothing can be said."""
        return self._write("invalid", reason=reason, final=True, failed=failed)

    def screen(self) -> Verdict:
        """Promising or not; and if it is, on to its confirmation."""
        self._see_noise()
        if self.lost:
            return self._after_screening("not promising", None, why_lost(self.lost[0]))

        weighed = glance(self._differences(self.experiment.metric), self.noise) if self.noise is not None else None
        word, reason = self._outlook(weighed)
        return self._after_screening(word, weighed, reason)

    def confirm(self, hypothesis: Hypothesis) -> Verdict:
        """Improved, worse, equivalent, or another pair."""
        previous = latest_verdict(self.lab.store, self.experiment.id)
        if previous is None or previous.stage != "confirm":
            self._see_noise()
            hypothesis = at_first_look(self.lab, hypothesis, self.noise, self.guard_noise)
        else:
            self.noise, self.guard_noise = noise_known(hypothesis)

        differences = self._differences(self.experiment.metric)
        guard = self._guard()
        values = e_values(
            differences,
            self.noise,
            self.experiment.direction,
            guarded=guard is None or guard.high <= (self.experiment.guard_margin or 0.0),
            lost=bool(self.lost),
        )
        note_evidence(self.lab.store, hypothesis, values)
        others = [item for item in new_claims(self.lab, hypothesis) if item.id != hypothesis.id]
        verdict = self._decide(_again(self.lab, hypothesis), differences, guard)
        for other in others:
            _claim_late(self.lab, other)

        return verdict

    def _decide(self, hypothesis: Hypothesis, differences: Sequence[float], guard: Weighed | None) -> Verdict:
        word: Word = hypothesis.claim or "no evidence yet"
        reason = None
        margin = self.experiment.guard_margin or 0.0
        if guard is not None and guard.low > margin:
            word = "worse"
        elif word == "improved" and not all(config.causal for config in configs_of(self.experiment)):
            word = "improved but not causal"
        elif word == "no evidence yet":
            reason = self._why_no_more(hypothesis, differences)
            if reason is None:
                add_confirming_pairs(self.lab, self.experiment, 1)

        return self._write(
            word,
            weighed=weigh(self._differences(self.experiment.metric), self.noise),
            guard=guard,
            reason=reason,
            hypothesis=hypothesis,
            final=word != "no evidence yet" or reason is not None,
        )

    def late(self, hypothesis: Hypothesis) -> Verdict:
        """The verdict of an experiment that could be claimed only after it was concluded."""
        self.noise, self.guard_noise = noise_known(hypothesis)
        return self._decide(hypothesis, self._differences(self.experiment.metric), self._guard())

    def _see_noise(self) -> None:
        self.noise = noise_here(self.lab, self.experiment, self.experiment.metric, self.stage)
        if self.experiment.guard_metric is not None:
            self.guard_noise = noise_here(self.lab, self.experiment, self.experiment.guard_metric, self.stage)

    def _outlook(self, weighed: Weighed | None) -> tuple[Screening | None, str | None]:
        """What the screening promises, or None where it needs another pair; and why."""
        guard = self._guard()
        margin = self.experiment.guard_margin or 0.0
        if weighed is None or self.noise is None:
            return "not promising", "the pairs are too few to compare"

        if guard is not None and guard.low > margin:
            return "not promising", f"{self.experiment.guard_metric} loses more than the margin of {margin:g}"

        gain = -weighed.effect if self.experiment.direction == "lower" else weighed.effect
        word = outlook(gain, len(self.scored), self.noise)
        if word is None:
            return None, "it is better, but not by so much that one pair tells: a second one follows"

        if word == "not promising":
            return word, None

        most = self.lab.settings.max_pairs
        noise = noise_ahead(self.lab, self.experiment, self.noise)
        count = pairs_for(self.lab, gain / noise.sd, noise) if noise.sd > 0.0 else 2
        quoted = f"to confirm a gain of this size takes {quote(self.lab, self.experiment, count)}"
        if count > most:
            return "not promising", f"{quoted}, more than {most} pairs (max_pairs)"

        return "promising", quoted

    def _after_screening(self, said: Screening | None, weighed: Weighed | None, reason: str | None) -> Verdict:
        goes_on = said == "promising" or self.experiment.confirm == "always"
        final = said is not None and not goes_on
        verdict = self._write(
            "no evidence yet", screening=said, weighed=weighed, reason=reason, guard=self._guard(), final=final
        )
        if goes_on:
            register(self.lab, self.experiment)
        elif not final:
            add_pairs(self.lab, self.experiment, range(1, len(self.found) + 2))

        return verdict

    def _why_no_more(self, hypothesis: Hypothesis, differences: Sequence[float]) -> str | None:
        """Why no further pair is asked for; None where one is."""
        if elsewhere := evidence_elsewhere(self.lab.store, self.experiment.id, self.experiment.hardware_class):
            return elsewhere

        most = hypothesis.max_pairs
        if len(self.found) >= most:
            return f"{len(self.found)} pairs were to decide (max_pairs), and did not; enqueue it again to go on"

        if self.experiment.confirm == "always":
            return None  # who asked for it whatever screening says wants to know also how bad it is

        level = hoped_level(self.lab, hypothesis)
        if is_futile(differences, self.noise, better=self.experiment.direction, level=level, max_pairs=most):
            return f"that it is ever claimed within {most} pairs (max_pairs) has become improbable"

        return None

    def _guard(self) -> Weighed | None:
        if self.experiment.guard_metric is None:
            return None

        differences = self._differences(self.experiment.guard_metric)
        if self.stage == "screen":
            return glance(differences, self.guard_noise) if self.guard_noise is not None else None

        return weigh(differences, self.guard_noise)

    def _differences(self, metric: str) -> list[float]:
        """Of all pairs; one whose treatment was lost counts as if it were as bad as twice the baseline, or nothing."""
        known = [
            value_of(pair.treatment, metric) - value_of(pair.baseline, metric) if pair in self.scored else None
            for pair in self.found
        ]
        size = fmean(abs(value_of(pair.baseline, metric)) for pair in self.found)
        return bounded(known, worst=size if _lower_is_better(self.experiment, metric) else -size)

    def _expected(self, weighed: Weighed) -> float | None:
        if self.share < 1.0:
            return None  # of the whole budget a shorter training says no size

        if self.lost:
            return weighed.effect

        return expected_effect(self.lab, self.experiment, weighed.effect, len(self.scored))

    def _beside(self, weighed: Weighed | None) -> str | None:
        combined = self.experiment.combines_id
        if combined is None or weighed is None or self.stage == "screen":
            return None

        return together(combined, latest_verdict(self.lab.store, combined), weighed.low, weighed.high)

    def _write(
        self,
        word: Word,
        *,
        final: bool,
        reason: str | None = None,
        screening: Screening | None = None,
        weighed: Weighed | None = None,
        guard: Weighed | None = None,
        hypothesis: Hypothesis | None = None,
        failed: bool = False,
    ) -> Verdict:
        experiment, store = self.experiment, self.lab.store
        baseline, treatment = configs_of(experiment, self.stage)
        ours, theirs = account(treatment), account(baseline)
        our_model, their_model = account(as_served(treatment)), account(as_served(baseline))
        scored = self.scored if weighed else []
        seconds = paired_seconds(store, scored)
        found = Found(
            word=word,
            stage=self.stage,
            share=self.share,
            screening=screening,
            reason=reason,
            effect=weighed.effect if weighed else None,
            interval=(weighed.low, weighed.high) if weighed else None,
            guard=(guard.effect, guard.low, guard.high) if guard else None,
            pairs=len(self.found),
            lost=len(self.lost),
            disturbed=sum(len(disturbed(pair)) for pair in self.found),
            deviation=self.noise.sd if self.noise else None,
            guard_deviation=self.guard_noise.sd if self.guard_noise else None,
            flops_ratio=ours.flops_per_token / theirs.flops_per_token,
            parameters_ratio=our_model.parameters / their_model.parameters,
            pace=pace(seconds) if self.stage == "confirm" else None,
            causal=(baseline.causal, treatment.causal),
            beside=self._beside(weighed),
            unknown=unknown_remark(store, experiment, scored),
        )
        previous = latest_verdict(store, experiment.id)
        verdict = add_verdict(
            store,
            {
                "experiment_id": experiment.id,
                "verdict": word,
                "stage": self.stage,
                "screening": screening,
                "final": final,
                "sentence": sentence_of(experiment, found),
                "reason": reason,
                "method": method_of(experiment, self.stage, self.share),
                "metric": experiment.metric,
                "pairs": len(self.found),
                "share": self.share,
                "seeds": [pair.seed for pair in self.found],
                "baseline_mean": mean_of([pair.baseline for pair in scored], experiment.metric),
                "treatment_mean": mean_of([pair.treatment for pair in scored], experiment.metric),
                "effect": found.effect,
                "low": _finite(weighed.low) if weighed else None,
                "high": _finite(weighed.high) if weighed else None,
                "confidence": 1.0 - ALPHA if weighed else None,
                "noise": self.noise.sd if self.noise else None,
                "noise_df": self.noise.df if self.noise else None,
                "margin": floor_of(self.noise) if self.noise else None,
                "evidence": hypothesis.improved if hypothesis else None,
                "needed": needed(self.lab, hypothesis) if hypothesis else None,
                "expected": self._expected(weighed) if weighed else None,
                "guard_effect": guard.effect if guard else None,
                "guard_low": _finite(guard.low) if guard else None,
                "guard_high": _finite(guard.high) if guard else None,
                "baseline_parameters": their_model.parameters,
                "treatment_parameters": our_model.parameters,
                "baseline_active_parameters": their_model.active_parameters,
                "treatment_active_parameters": our_model.active_parameters,
                "baseline_flops": theirs.flops,
                "treatment_flops": ours.flops,
                "baseline_seconds": median(before for before, _ in seconds) if seconds else None,
                "treatment_seconds": median(after for _, after in seconds) if seconds else None,
                "cost_seconds": experiment_seconds(store, experiment.id),
                "cost_kwh": experiment_kwh(store, experiment.id),
            },
        )
        if final and experiment.status != "concluded":
            status: ExperimentStatus = "failed" if failed else "concluded"
            note = None if previous is None or previous.said == verdict.said else f"was {previous.said}"
            move_experiment(store, experiment.id, status, allowed=("queued", "running"), reason=reason or note)

        return verdict


def _claim_late(lab: Lab, hypothesis: Hypothesis) -> None:
    """Writes a new verdict of an experiment that was concluded, and may be claimed now that another one was."""
    experiment = get_experiment(lab.store, hypothesis.experiment_id)
    if experiment.status == "concluded":
        _Judgement(lab, experiment, "confirm", pairs(lab.store, experiment.id, "confirm")).late(hypothesis)


def _again(lab: Lab, hypothesis: Hypothesis) -> Hypothesis:
    return get_hypothesis(lab.store, hypothesis.experiment_id) or hypothesis


def _lower_is_better(experiment: Experiment, metric: str) -> bool:
    return metric != experiment.metric or experiment.direction == "lower"  # less is better of every guard


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
