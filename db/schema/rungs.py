"""Which part of the budget a screening trains for, and a verdict rests on. Until now it was all of it.

`experiments.screen_share` is fixed when an experiment is first queued, so that a changed setting never mixes runs of
two lengths; NULL before.
"""

from __future__ import annotations

RUNGS = """
ALTER TABLE experiments ADD COLUMN screen_share REAL CHECK (screen_share > 0.0 AND screen_share <= 1.0);

UPDATE experiments SET screen_share = 1.0 WHERE id IN (SELECT experiment_id FROM experiment_runs);

ALTER TABLE verdicts ADD COLUMN share REAL NOT NULL DEFAULT 1.0;

"""
