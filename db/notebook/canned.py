"""The canned queries of a lab: questions that one asks often, as SQL that one can open, change and link to."""

from __future__ import annotations

VERDICTS = """
SELECT current_verdicts.experiment_id, experiments.title, experiments.treatment, current_verdicts.said AS verdict,
       current_verdicts.effect, current_verdicts.low, current_verdicts.high, current_verdicts.noise,
       current_verdicts.metric, current_verdicts.pairs, current_verdicts.share, current_verdicts.final,
       current_verdicts.sentence,
       current_verdicts.baseline_seconds, current_verdicts.treatment_seconds, current_verdicts.cost_seconds,
       experiments.domain, experiments.proposer
FROM current_verdicts CROSS JOIN experiments ON experiments.id = current_verdicts.experiment_id
ORDER BY CASE current_verdicts.said WHEN 'improved' THEN 0 WHEN 'worse' THEN 1 WHEN 'equivalent' THEN 2
                                    WHEN 'promising' THEN 3 WHEN 'no evidence yet' THEN 4 WHEN 'not promising' THEN 5
                                    ELSE 6 END, current_verdicts.gain DESC
"""

RUNNING = """
SELECT runs.id AS run_id, experiments.id AS experiment_id, experiments.title, experiment_runs.arm, runs.seed,
       runs.kind, runs.step, runs.steps, round(100.0 * runs.step / runs.steps) AS percent, runs.train_loss,
       runs.val_bpb, runs.seconds, round(runs.seconds / runs.step * (runs.steps - runs.step), 1) AS seconds_left,
       runners.hostname, runners.device_name, attempts.started_at
FROM runs LEFT JOIN attempts ON attempts.run_id = runs.id AND attempts.status = 'live'
LEFT JOIN runners ON runners.id = attempts.runner_id
LEFT JOIN experiment_runs ON experiment_runs.run_id = runs.id
LEFT JOIN experiments ON experiments.id = experiment_runs.experiment_id
WHERE runs.status = 'running' ORDER BY runs.id, experiments.id
"""

NEXT = """
SELECT queue_order.*, (SELECT min(experiment_id) FROM experiment_runs WHERE experiment_runs.run_id = queue_order.run_id)
    AS experiment_id FROM queue_order ORDER BY hardware_class, position
"""

INSIGHTS = """
SELECT insights.id AS insight_id, insights.statement, insights.knob, insights.direction,
       verdicts.experiment_id, experiments.title, verdicts.said AS verdict, verdicts.effect, verdicts.low,
       verdicts.high, verdicts.sentence
FROM insights JOIN insight_verdicts ON insight_verdicts.insight_id = insights.id
JOIN verdicts ON verdicts.id = insight_verdicts.verdict_id
JOIN experiments ON experiments.id = verdicts.experiment_id
ORDER BY insights.verdict_count DESC, insights.id, verdicts.effect
"""

CURVE = """
WITH series AS (
    SELECT metric_names.name AS metric, metrics.step, metrics.value,
           row_number() OVER each AS place, count(*) OVER (PARTITION BY metrics.name_id) AS total
    FROM metrics JOIN metric_names ON metric_names.id = metrics.name_id
    WHERE metrics.attempt_id = (SELECT max(id) FROM attempts WHERE run_id = :run_id)
    WINDOW each AS (PARTITION BY metrics.name_id ORDER BY metrics.step))
SELECT metric, step, value FROM series
WHERE place = 1 OR place = total OR place % max(1, total / 200) = 0
ORDER BY metric, step
"""

COSTS = """
SELECT experiments.id AS experiment_id, experiments.title, experiments.status, experiments.proposer,
       count(DISTINCT experiment_runs.run_id) AS runs,
       round(coalesce(sum((julianday(attempts.ended_at) - julianday(attempts.started_at)) * 86400.0
                          * runners.cards), 0.0), 1) AS machine_seconds,
       (SELECT round(coalesce(sum(interactions.usd), 0.0), 4) FROM interactions
        WHERE interactions.experiment_id = experiments.id) AS usd
FROM experiments LEFT JOIN experiment_runs ON experiment_runs.experiment_id = experiments.id
LEFT JOIN attempts ON attempts.run_id = experiment_runs.run_id
LEFT JOIN runners ON runners.id = attempts.runner_id
GROUP BY experiments.id ORDER BY machine_seconds DESC, experiments.id
"""

FAILURES = """
SELECT runs.id AS run_id, runs.kind, runs.seed, runs.status, min(experiments.id) AS experiment_id, experiments.title,
       runs.error, runs.log_tail, runs.failures, runs.lost, runs.ended_at
FROM runs LEFT JOIN experiment_runs ON experiment_runs.run_id = runs.id
LEFT JOIN experiments ON experiments.id = experiment_runs.experiment_id
WHERE runs.status IN ('failed', 'pruned') OR runs.failures > 0 OR runs.lost > 0
GROUP BY runs.id ORDER BY runs.ended_at DESC
"""

MONEY = """
SELECT substr(created_at, 1, 10) AS day, model, count(*) AS calls, sum(status = 'answered') AS answered,
       sum(status IN ('failed', 'invalid')) AS failed, sum(prompt_tokens) AS prompt_tokens,
       sum(completion_tokens) AS completion_tokens, round(sum(usd), 4) AS usd
FROM interactions GROUP BY day, model ORDER BY day DESC, usd DESC
"""

QUERIES: dict[str, dict[str, object]] = {
    "verdict-table": {
        "title": "What the lab knows",
        "description": "Every experiment's current verdict, the best gain first. Effect is treatment minus baseline.",
        "sql": VERDICTS,
        "hide_sql": True,
    },
    "running-now": {
        "title": "What runs now",
        "description": "Runs in progress, once for each experiment that waits for them.",
        "sql": RUNNING,
        "hide_sql": True,
    },
    "next-in-line": {
        "title": "What runs next",
        "description": "Queued runs that could start now, in the order in which they will: by priority, then by turn. "
        "The turn is the ticket that a run took when it was queued, and the places that it is set back: the fewer "
        "improvements are expected for its seconds, the more, up to 512.",
        "sql": NEXT,
        "hide_sql": True,
    },
    "insights-with-verdicts": {
        "title": "Insights and the verdicts they rest on",
        "description": "One row a cited verdict.",
        "sql": INSIGHTS,
        "hide_sql": True,
    },
    "run-curve": {
        "title": "Curves of one run",
        "description": "All metrics of a run's newest attempt, thinned to about 200 points each. "
        "Give run_id, the number of a row in runs.",
        "sql": CURVE,
        "params": ["run_id"],
        "hide_sql": True,
    },
    "cost-per-experiment": {
        "title": "Cost per experiment",
        "description": "Seconds of a machine, all attempts included, and dollars. A run shared by several experiments "
        "counts in full for each.",
        "sql": COSTS,
        "hide_sql": True,
    },
    "failures-with-logs": {
        "title": "Failures, with the end of their logs",
        "description": "Runs that failed, diverged (pruned), or needed more than one attempt; the newest first.",
        "sql": FAILURES,
        "hide_sql": True,
    },
    "money-per-day": {
        "title": "Money spent a day",
        "description": "Calls to language models by UTC day and model. An unanswered call counts at its worst case.",
        "sql": MONEY,
        "hide_sql": True,
    },
}
