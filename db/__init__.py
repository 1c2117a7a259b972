"""The memory: one SQLite file per lab, and everything that is true about it. Only this package speaks SQL."""
