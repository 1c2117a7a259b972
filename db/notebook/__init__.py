"""The Datasette face of a lab: `python -m db.notebook LAB`. Reads lab.db and nothing else; imported by nobody."""
