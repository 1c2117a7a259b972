"""Screening and confirmation told apart; what is registered to be confirmed, and what every verdict rests on.

`verdicts.said` is the word to show: that of a screening, which claims nothing, or the verdict.
"""

from __future__ import annotations

HYPOTHESES = """
ALTER TABLE runs ADD COLUMN purpose TEXT NOT NULL DEFAULT 'screen' CHECK (purpose IN ('screen', 'confirm'));

ALTER TABLE experiments ADD COLUMN confirm TEXT NOT NULL DEFAULT 'promising' CHECK (confirm IN ('promising', 'always'));

ALTER TABLE verdicts ADD COLUMN stage TEXT CHECK (stage IN ('screen', 'confirm'));

ALTER TABLE verdicts ADD COLUMN screening TEXT CHECK (screening IN ('promising', 'not promising'));

ALTER TABLE verdicts ADD COLUMN said TEXT GENERATED ALWAYS AS (
    CASE WHEN stage = 'screen' AND screening IS NOT NULL THEN screening ELSE verdict END) VIRTUAL;

ALTER TABLE verdicts ADD COLUMN evidence REAL;

ALTER TABLE verdicts ADD COLUMN needed REAL;

ALTER TABLE verdicts ADD COLUMN expected REAL;

ALTER TABLE verdicts ADD COLUMN margin REAL;

ALTER TABLE verdicts ADD COLUMN noise_df REAL;

CREATE TABLE hypotheses (
    id INTEGER PRIMARY KEY,
    experiment_id INTEGER NOT NULL UNIQUE REFERENCES experiments (id),
    campaign TEXT NOT NULL,
    seeds TEXT NOT NULL,
    max_pairs INTEGER NOT NULL,
    noise_sd REAL,
    noise_df REAL,
    guard_sd REAL,
    guard_df REAL,
    improved REAL NOT NULL DEFAULT 1.0,
    worse REAL NOT NULL DEFAULT 1.0,
    equivalent REAL NOT NULL DEFAULT 1.0,
    claim TEXT CHECK (claim IN ('improved', 'worse', 'equivalent')),
    lab_claim TEXT CHECK (lab_claim IN ('improved', 'worse', 'equivalent')),
    registered_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
);

CREATE INDEX hypotheses_campaign ON hypotheses (campaign, id);

DROP VIEW results;

CREATE VIEW results AS
SELECT experiments.id AS experiment_id, experiments.title, experiments.status, current_verdicts.said AS verdict,
       current_verdicts.final, current_verdicts.effect, current_verdicts.low, current_verdicts.high,
       current_verdicts.pairs, current_verdicts.sentence, experiments.domain, experiments.proposer
FROM experiments JOIN current_verdicts ON current_verdicts.experiment_id = experiments.id;

DROP INDEX verdicts_by_gain;

CREATE INDEX verdicts_by_gain ON verdicts (
    CASE said WHEN 'improved' THEN 0 WHEN 'worse' THEN 1 WHEN 'equivalent' THEN 2 WHEN 'promising' THEN 3
              WHEN 'no evidence yet' THEN 4 WHEN 'not promising' THEN 5 ELSE 6 END, gain DESC) WHERE current = 1;

DROP TRIGGER verdicts_made;

CREATE TRIGGER verdicts_made AFTER INSERT ON verdicts BEGIN
    UPDATE verdicts SET gain = (SELECT CASE direction WHEN 'lower' THEN -NEW.effect ELSE NEW.effect END
                                FROM experiments WHERE experiments.id = NEW.experiment_id) WHERE id = NEW.id;
    INSERT INTO tallies VALUES ('verdicts', NEW.said, 1) ON CONFLICT DO UPDATE SET n = n + 1;
END;

DROP TRIGGER verdicts_retired;

CREATE TRIGGER verdicts_retired AFTER UPDATE OF current ON verdicts WHEN OLD.current > NEW.current BEGIN
    UPDATE tallies SET n = n - 1 WHERE subject = 'verdicts' AND word = OLD.said;
END;

"""
