"""What keeps a large lab quick: counts kept as rows come and go, the current verdict marked, indices for what is asked.

Every count is exact: triggers change it in the transaction that changes the rows, whoever writes them.

- `tallies` counts experiments and runs by status, queued runs by kind, current verdicts by word, and calls to models.
- `experiments.ends` counts how often a run of an open experiment has ended: where `judged_runs` differs, judge it.
- `experiments.baseline_id` names equal baselines by a number, because a whole config is too long for an index.
- `verdicts.gain` is the effect, turned so that more is better.
"""

from __future__ import annotations

TALLIES = """
CREATE TABLE tallies (
    subject TEXT NOT NULL,
    word TEXT NOT NULL,
    n INTEGER NOT NULL,
    PRIMARY KEY (subject, word)
) WITHOUT ROWID;

INSERT INTO tallies SELECT 'experiments', status, count(*) FROM experiments GROUP BY status;

INSERT INTO tallies SELECT 'runs', status, count(*) FROM runs GROUP BY status;

INSERT INTO tallies SELECT 'queued', kind, count(*) FROM runs WHERE status = 'queued' GROUP BY kind;

INSERT INTO tallies SELECT 'verdicts', verdict, count(*) FROM current_verdicts GROUP BY verdict;

INSERT INTO tallies SELECT 'interactions', 'all', count(*) FROM interactions;

CREATE TRIGGER experiments_made AFTER INSERT ON experiments BEGIN
    INSERT INTO tallies VALUES ('experiments', NEW.status, 1) ON CONFLICT DO UPDATE SET n = n + 1;
END;

CREATE TRIGGER experiments_moved AFTER UPDATE OF status ON experiments WHEN OLD.status != NEW.status BEGIN
    UPDATE tallies SET n = n - 1 WHERE subject = 'experiments' AND word = OLD.status;
    INSERT INTO tallies VALUES ('experiments', NEW.status, 1) ON CONFLICT DO UPDATE SET n = n + 1;
END;

CREATE TRIGGER experiments_gone AFTER DELETE ON experiments BEGIN
    UPDATE tallies SET n = n - 1 WHERE subject = 'experiments' AND word = OLD.status;
END;

CREATE TRIGGER runs_made AFTER INSERT ON runs BEGIN
    INSERT INTO tallies VALUES ('runs', NEW.status, 1) ON CONFLICT DO UPDATE SET n = n + 1;
    INSERT INTO tallies SELECT 'queued', NEW.kind, 1 WHERE NEW.status = 'queued' ON CONFLICT DO UPDATE SET n = n + 1;
END;

CREATE TRIGGER runs_moved AFTER UPDATE OF status ON runs WHEN OLD.status != NEW.status BEGIN
    UPDATE tallies SET n = n - 1 WHERE subject = 'runs' AND word = OLD.status;
    INSERT INTO tallies VALUES ('runs', NEW.status, 1) ON CONFLICT DO UPDATE SET n = n + 1;
    UPDATE tallies SET n = n - 1 WHERE subject = 'queued' AND word = OLD.kind AND OLD.status = 'queued';
    INSERT INTO tallies SELECT 'queued', NEW.kind, 1 WHERE NEW.status = 'queued' ON CONFLICT DO UPDATE SET n = n + 1;
END;

CREATE TRIGGER runs_gone AFTER DELETE ON runs BEGIN
    UPDATE tallies SET n = n - 1 WHERE subject = 'runs' AND word = OLD.status;
    UPDATE tallies SET n = n - 1 WHERE subject = 'queued' AND word = OLD.kind AND OLD.status = 'queued';
END;

CREATE TRIGGER interactions_made AFTER INSERT ON interactions BEGIN
    INSERT INTO tallies VALUES ('interactions', 'all', 1) ON CONFLICT DO UPDATE SET n = n + 1;
END;

CREATE TRIGGER interactions_gone AFTER DELETE ON interactions BEGIN
    UPDATE tallies SET n = n - 1 WHERE subject = 'interactions';
END;

"""

VERDICTS = """
ALTER TABLE verdicts ADD COLUMN current INTEGER NOT NULL DEFAULT 1;

ALTER TABLE verdicts ADD COLUMN gain REAL;

UPDATE verdicts SET
    current = id = (SELECT max(id) FROM verdicts AS later WHERE later.experiment_id = verdicts.experiment_id),
    gain = (SELECT CASE direction WHEN 'lower' THEN -effect ELSE effect END FROM experiments
            WHERE experiments.id = verdicts.experiment_id);

DROP VIEW results;

DROP VIEW current_verdicts;

CREATE VIEW current_verdicts AS SELECT * FROM verdicts WHERE current = 1;

CREATE VIEW results AS
SELECT experiments.id AS experiment_id, experiments.title, experiments.status, current_verdicts.verdict,
       current_verdicts.final, current_verdicts.effect, current_verdicts.low, current_verdicts.high,
       current_verdicts.pairs, current_verdicts.sentence, experiments.domain, experiments.proposer
FROM experiments JOIN current_verdicts ON current_verdicts.experiment_id = experiments.id;

CREATE UNIQUE INDEX verdicts_current ON verdicts (experiment_id) WHERE current = 1;

CREATE INDEX verdicts_by_gain ON verdicts (
    CASE verdict WHEN 'improved' THEN 0 WHEN 'worse' THEN 1 WHEN 'equivalent' THEN 2 WHEN 'no evidence yet' THEN 3
                 ELSE 4 END, gain DESC) WHERE current = 1;

CREATE INDEX verdicts_final ON verdicts (id) WHERE current = 1 AND final = 1;

CREATE TRIGGER verdicts_retire BEFORE INSERT ON verdicts BEGIN
    UPDATE verdicts SET current = 0 WHERE experiment_id = NEW.experiment_id AND current = 1;
END;

CREATE TRIGGER verdicts_made AFTER INSERT ON verdicts BEGIN
    UPDATE verdicts SET gain = (SELECT CASE direction WHEN 'lower' THEN -NEW.effect ELSE NEW.effect END
                                FROM experiments WHERE experiments.id = NEW.experiment_id) WHERE id = NEW.id;
    INSERT INTO tallies VALUES ('verdicts', NEW.verdict, 1) ON CONFLICT DO UPDATE SET n = n + 1;
END;

CREATE TRIGGER verdicts_retired AFTER UPDATE OF current ON verdicts WHEN OLD.current > NEW.current BEGIN
    UPDATE tallies SET n = n - 1 WHERE subject = 'verdicts' AND word = OLD.verdict;
END;

"""

INDICES = """
ALTER TABLE experiments ADD COLUMN ends INTEGER NOT NULL DEFAULT 0;

ALTER TABLE experiments ADD COLUMN baseline_id INTEGER REFERENCES baselines (id);

CREATE TABLE baselines (
    id INTEGER PRIMARY KEY,
    config TEXT NOT NULL UNIQUE
);

INSERT OR IGNORE INTO baselines (config) SELECT baseline FROM experiments;

DROP TRIGGER experiments_au;

UPDATE experiments SET
    baseline_id = (SELECT baselines.id FROM baselines WHERE config = baseline),
    ends = CASE WHEN status NOT IN ('queued', 'running') THEN 0 ELSE (
        SELECT count(*) FROM experiment_runs JOIN runs ON runs.id = experiment_runs.run_id
        WHERE experiment_runs.experiment_id = experiments.id
          AND runs.status IN ('completed', 'pruned', 'failed', 'cancelled')) END;

CREATE TRIGGER experiments_au AFTER UPDATE OF title, hypothesis, method, treatment ON experiments BEGIN
    INSERT INTO experiments_fts (experiments_fts, rowid, title, hypothesis, method, treatment)
    VALUES ('delete', OLD.id, OLD.title, OLD.hypothesis, OLD.method, OLD.treatment);
    INSERT INTO experiments_fts (rowid, title, hypothesis, method, treatment)
    VALUES (NEW.id, NEW.title, NEW.hypothesis, NEW.method, NEW.treatment);
END;

CREATE TRIGGER experiments_based AFTER INSERT ON experiments BEGIN
    INSERT INTO baselines (config) VALUES (NEW.baseline) ON CONFLICT DO NOTHING;
    UPDATE experiments SET baseline_id = (SELECT id FROM baselines WHERE config = NEW.baseline) WHERE id = NEW.id;
END;

CREATE TRIGGER experiments_rebased AFTER UPDATE OF baseline ON experiments BEGIN
    INSERT INTO baselines (config) VALUES (NEW.baseline) ON CONFLICT DO NOTHING;
    UPDATE experiments SET baseline_id = (SELECT id FROM baselines WHERE config = NEW.baseline) WHERE id = NEW.id;
END;

CREATE TRIGGER runs_ended AFTER UPDATE OF status ON runs
WHEN NEW.status NOT IN ('queued', 'running') AND OLD.status IN ('queued', 'running') BEGIN
    UPDATE experiments SET ends = ends + 1
    WHERE status IN ('queued', 'running') AND id IN (SELECT experiment_id FROM experiment_runs WHERE run_id = NEW.id);
END;

CREATE TRIGGER experiment_runs_ended AFTER INSERT ON experiment_runs
WHEN (SELECT status NOT IN ('queued', 'running') FROM runs WHERE id = NEW.run_id) BEGIN
    UPDATE experiments SET ends = ends + 1 WHERE id = NEW.experiment_id;
END;

CREATE INDEX experiments_due ON experiments (id) WHERE status IN ('queued', 'running') AND judged_runs != ends;

CREATE INDEX experiments_open ON experiments (status, priority DESC, id);

CREATE INDEX experiments_comparable ON experiments (baseline_id, hardware_class, metric);

CREATE INDEX experiments_parent ON experiments (parent_id) WHERE parent_id IS NOT NULL;

CREATE INDEX runs_done ON runs (hardware_class, kind, id) WHERE status = 'completed';

DROP INDEX interactions_created;

CREATE INDEX interactions_spent ON interactions (created_at, usd);

"""
