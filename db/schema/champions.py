"""The lineage of confirmed gains: a tree for each preset and hardware class, its edges the experiments."""

from __future__ import annotations

CHAMPIONS = """
CREATE TABLE champions (
    id INTEGER PRIMARY KEY,
    parent_id INTEGER REFERENCES champions (id),
    experiment_id INTEGER UNIQUE REFERENCES experiments (id),
    preset TEXT NOT NULL,
    hardware_class TEXT NOT NULL,
    config TEXT NOT NULL,
    gain REAL NOT NULL,
    created_at TEXT NOT NULL
);

CREATE INDEX champions_kind ON champions (preset, hardware_class, id);

ALTER TABLE experiments ADD COLUMN on_champion_id INTEGER REFERENCES champions (id);

ALTER TABLE experiments ADD COLUMN combines_id INTEGER REFERENCES experiments (id);

CREATE INDEX experiments_combining ON experiments (on_champion_id, combines_id) WHERE on_champion_id IS NOT NULL;

"""
