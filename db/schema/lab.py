"""The tables and views that a lab began with."""

from __future__ import annotations

TABLES = """
CREATE TABLE tasks (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    arguments TEXT NOT NULL,
    idempotency_key TEXT UNIQUE,
    status TEXT NOT NULL CHECK (status IN ('queued', 'running', 'done', 'failed')),
    result TEXT,
    error TEXT,
    created_at TEXT NOT NULL,
    started_at TEXT,
    ended_at TEXT
);

CREATE INDEX tasks_due ON tasks (status) WHERE status IN ('queued', 'running');

CREATE TABLE cycles (
    id INTEGER PRIMARY KEY,
    domain TEXT,
    focus_area TEXT,
    count INTEGER NOT NULL,
    max_cycles INTEGER NOT NULL,
    round INTEGER NOT NULL DEFAULT 0,
    step TEXT NOT NULL CHECK (step IN ('suggest', 'review', 'improve', 'enqueue', 'wait', 'learn', 'end')),
    start_runner INTEGER NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('running', 'done', 'failed', 'cancelled')),
    error TEXT,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
);

CREATE INDEX cycles_due ON cycles (status) WHERE status = 'running';

CREATE TABLE experiments (
    id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    hypothesis TEXT NOT NULL,
    method TEXT NOT NULL,
    domain TEXT NOT NULL,
    focus_area TEXT,
    preset TEXT NOT NULL,
    baseline TEXT NOT NULL,
    treatment TEXT NOT NULL,
    metric TEXT NOT NULL,
    direction TEXT NOT NULL CHECK (direction IN ('lower', 'higher')),
    guard_metric TEXT,
    guard_margin REAL,
    proposer TEXT NOT NULL CHECK (proposer IN ('llm', 'optimizer', 'assistant', 'catalog')),
    source TEXT,
    parent_id INTEGER REFERENCES experiments (id),
    revision INTEGER NOT NULL DEFAULT 0,
    cycle_id INTEGER REFERENCES cycles (id),
    status TEXT NOT NULL CHECK (status IN ('suggested', 'approved', 'needs_work', 'rejected', 'superseded', 'queued',
                                           'running', 'concluded', 'failed', 'cancelled')),
    reason TEXT,
    priority INTEGER NOT NULL DEFAULT 0,
    seeds INTEGER NOT NULL DEFAULT 0,
    judged_runs INTEGER NOT NULL DEFAULT 0,
    hardware_class TEXT,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
);

CREATE INDEX experiments_status ON experiments (status);

CREATE INDEX experiments_cycle ON experiments (cycle_id);

CREATE TABLE runners (
    id INTEGER PRIMARY KEY,
    hostname TEXT NOT NULL,
    device TEXT NOT NULL CHECK (device IN ('cpu', 'cuda')),
    device_name TEXT NOT NULL,
    device_key TEXT NOT NULL,
    precision TEXT NOT NULL,
    torch TEXT NOT NULL,
    hardware_class TEXT NOT NULL,
    memory_bytes INTEGER NOT NULL,
    threads INTEGER NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('registered', 'running', 'stopped')),
    pid INTEGER,
    boot_id TEXT,
    message TEXT,
    started_at TEXT NOT NULL,
    heartbeat_at TEXT NOT NULL,
    UNIQUE (hostname, device_key)
);

CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('probe', 'train', 'post', 'ablate')),
    fingerprint TEXT NOT NULL,
    seed INTEGER NOT NULL,
    hardware_class TEXT NOT NULL,
    code TEXT NOT NULL,
    config TEXT NOT NULL,
    baseline TEXT,
    needs_run_id INTEGER REFERENCES runs (id),
    priority INTEGER NOT NULL DEFAULT 0,
    status TEXT NOT NULL CHECK (status IN ('queued', 'running', 'completed', 'pruned', 'failed', 'cancelled')),
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    step INTEGER,
    steps INTEGER,
    tokens INTEGER,
    seconds REAL,
    train_loss REAL,
    val_bpb REAL,
    score TEXT,
    passed INTEGER,
    error TEXT,
    log_tail TEXT,
    failures INTEGER NOT NULL DEFAULT 0,
    lost INTEGER NOT NULL DEFAULT 0,
    token INTEGER NOT NULL DEFAULT 0,
    created_at TEXT NOT NULL,
    started_at TEXT,
    ended_at TEXT,
    UNIQUE (kind, fingerprint, seed)
);

CREATE INDEX runs_queue ON runs (hardware_class, priority DESC, id) WHERE status = 'queued';

CREATE INDEX runs_status ON runs (status);

CREATE TABLE experiment_runs (
    experiment_id INTEGER NOT NULL REFERENCES experiments (id),
    run_id INTEGER NOT NULL REFERENCES runs (id),
    arm TEXT NOT NULL CHECK (arm IN ('probe', 'checkpoint', 'baseline', 'treatment', 'ablation')),
    PRIMARY KEY (experiment_id, run_id)
) WITHOUT ROWID;

CREATE INDEX experiment_runs_run ON experiment_runs (run_id);

CREATE TABLE attempts (
    id INTEGER PRIMARY KEY,
    run_id INTEGER NOT NULL REFERENCES runs (id),
    runner_id INTEGER NOT NULL REFERENCES runners (id),
    token INTEGER NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('live', 'completed', 'failed', 'lost', 'cancelled')),
    directory TEXT NOT NULL,
    pid INTEGER,
    boot_id TEXT NOT NULL,
    lease_until REAL NOT NULL,
    metrics_offset INTEGER NOT NULL DEFAULT 0,
    exit_code INTEGER,
    error TEXT,
    started_at TEXT NOT NULL,
    heartbeat_at TEXT NOT NULL,
    ended_at TEXT
);

CREATE UNIQUE INDEX attempts_live ON attempts (run_id) WHERE status = 'live';

CREATE INDEX attempts_run ON attempts (run_id);

CREATE TABLE metric_names (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
);

CREATE TABLE metrics (
    attempt_id INTEGER NOT NULL REFERENCES attempts (id),
    name_id INTEGER NOT NULL REFERENCES metric_names (id),
    step INTEGER NOT NULL,
    value REAL,
    PRIMARY KEY (attempt_id, name_id, step)
) WITHOUT ROWID;

CREATE TABLE gpu_samples (
    id INTEGER PRIMARY KEY,
    runner_id INTEGER NOT NULL REFERENCES runners (id),
    attempt_id INTEGER REFERENCES attempts (id),
    at TEXT NOT NULL,
    utilization_percent REAL,
    memory_bytes INTEGER,
    temperature_celsius REAL,
    power_watts REAL
);

CREATE INDEX gpu_samples_attempt ON gpu_samples (attempt_id);

CREATE INDEX gpu_samples_runner ON gpu_samples (runner_id, id);

CREATE TABLE interactions (
    id INTEGER PRIMARY KEY,
    task_id INTEGER REFERENCES tasks (id),
    experiment_id INTEGER REFERENCES experiments (id),
    agent TEXT NOT NULL,
    model TEXT NOT NULL,
    prompt TEXT NOT NULL,
    answer TEXT,
    status TEXT NOT NULL CHECK (status IN ('sent', 'answered', 'invalid', 'failed')),
    error TEXT,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    usd REAL NOT NULL,
    latency_seconds REAL,
    created_at TEXT NOT NULL,
    answered_at TEXT
);

CREATE INDEX interactions_created ON interactions (created_at);

CREATE INDEX interactions_experiment ON interactions (experiment_id);

CREATE INDEX interactions_task ON interactions (task_id);

CREATE TABLE reviews (
    id INTEGER PRIMARY KEY,
    experiment_id INTEGER NOT NULL REFERENCES experiments (id),
    reviewer TEXT NOT NULL CHECK (reviewer IN ('llm', 'assistant', 'rubric')),
    novelty REAL NOT NULL,
    feasibility REAL NOT NULL,
    impact REAL NOT NULL,
    clarity REAL NOT NULL,
    efficiency REAL NOT NULL,
    score REAL NOT NULL,
    decision TEXT NOT NULL CHECK (decision IN ('approve', 'refine', 'rewrite', 'reject')),
    feedback TEXT NOT NULL,
    success_probability REAL,
    facts TEXT NOT NULL,
    interaction_id INTEGER REFERENCES interactions (id),
    created_at TEXT NOT NULL
);

CREATE INDEX reviews_experiment ON reviews (experiment_id);

CREATE TABLE verdicts (
    id INTEGER PRIMARY KEY,
    experiment_id INTEGER NOT NULL REFERENCES experiments (id),
    verdict TEXT NOT NULL CHECK (verdict IN ('improved', 'improved but not causal', 'worse', 'equivalent',
                                             'no evidence yet', 'invalid')),
    final INTEGER NOT NULL,
    sentence TEXT NOT NULL,
    reason TEXT,
    method TEXT NOT NULL,
    metric TEXT NOT NULL,
    pairs INTEGER NOT NULL,
    seeds TEXT NOT NULL,
    baseline_mean REAL,
    treatment_mean REAL,
    effect REAL,
    low REAL,
    high REAL,
    confidence REAL,
    noise REAL,
    guard_effect REAL,
    guard_low REAL,
    guard_high REAL,
    baseline_parameters INTEGER,
    treatment_parameters INTEGER,
    baseline_active_parameters INTEGER,
    treatment_active_parameters INTEGER,
    baseline_flops REAL,
    treatment_flops REAL,
    cost_seconds REAL NOT NULL,
    created_at TEXT NOT NULL
);

CREATE INDEX verdicts_experiment ON verdicts (experiment_id, id);

CREATE TABLE insights (
    id INTEGER PRIMARY KEY,
    knob TEXT NOT NULL,
    direction TEXT NOT NULL,
    preset TEXT NOT NULL,
    metric TEXT NOT NULL,
    statement TEXT NOT NULL,
    verdict TEXT NOT NULL,
    effect REAL,
    verdict_count INTEGER NOT NULL,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    UNIQUE (knob, direction, preset, metric)
);

CREATE TABLE insight_verdicts (
    insight_id INTEGER NOT NULL REFERENCES insights (id) ON DELETE CASCADE,
    verdict_id INTEGER NOT NULL REFERENCES verdicts (id),
    PRIMARY KEY (insight_id, verdict_id)
) WITHOUT ROWID;

CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    at TEXT NOT NULL,
    kind TEXT NOT NULL,
    message TEXT NOT NULL,
    experiment_id INTEGER REFERENCES experiments (id),
    run_id INTEGER REFERENCES runs (id)
);

CREATE INDEX events_experiment ON events (experiment_id);

CREATE INDEX events_run ON events (run_id);

"""

VIEWS = """
CREATE VIEW current_verdicts AS
SELECT verdicts.* FROM verdicts
WHERE verdicts.id = (SELECT max(later.id) FROM verdicts AS later WHERE later.experiment_id = verdicts.experiment_id);

CREATE VIEW metric_points AS
SELECT attempts.run_id, metrics.attempt_id, metric_names.name, metrics.step, metrics.value,
       metrics.value IS NULL AS non_finite
FROM metrics JOIN metric_names ON metric_names.id = metrics.name_id JOIN attempts ON attempts.id = metrics.attempt_id;

CREATE VIEW results AS
SELECT experiments.id AS experiment_id, experiments.title, experiments.status, current_verdicts.verdict,
       current_verdicts.final, current_verdicts.effect, current_verdicts.low, current_verdicts.high,
       current_verdicts.pairs, current_verdicts.sentence, experiments.domain, experiments.proposer
FROM experiments JOIN current_verdicts ON current_verdicts.experiment_id = experiments.id;

"""
