"""The columns that say which queued run is next; db/order.py gives them their meaning and fills them.

A run may be claimed when it is `ready`: it needs no other run, or that one has completed and passed. Before this step a
priority was a hundred times the user's, plus up to 30 for the kind of run, plus what `run(experiment_id)` had added.
"""

from __future__ import annotations

COLUMNS = """
ALTER TABLE runs ADD COLUMN ticket INTEGER NOT NULL DEFAULT 0;

ALTER TABLE runs ADD COLUMN expected_seconds REAL;

ALTER TABLE runs ADD COLUMN gains REAL;

ALTER TABLE runs ADD COLUMN turn INTEGER NOT NULL DEFAULT 0;

ALTER TABLE runs ADD COLUMN ready INTEGER NOT NULL DEFAULT 1;

DROP INDEX runs_queue;

UPDATE runs SET ticket = id, turn = id, priority = (priority + 100069) / 100 - 1000,
                ready = needs_run_id IS NULL OR EXISTS (SELECT 1 FROM runs AS need WHERE need.id = runs.needs_run_id
                                                        AND need.status = 'completed' AND need.passed = 1)
WHERE status = 'queued';

CREATE INDEX runs_queue ON runs (hardware_class, priority DESC, turn, id) WHERE status = 'queued' AND ready = 1;

CREATE INDEX runs_ticket ON runs (ticket);

CREATE VIEW queue_order AS
SELECT hardware_class, row_number() OVER (PARTITION BY hardware_class ORDER BY priority DESC, turn, id) AS position,
       id AS run_id, kind, seed, priority, turn, ticket, turn - ticket AS set_back, gains, expected_seconds
FROM runs WHERE status = 'queued' AND ready = 1;

"""
