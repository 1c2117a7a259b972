"""Lists the benchmarks: what each measures, and the command that runs it (`make bench`)."""

from __future__ import annotations

import ast
from pathlib import Path


def main() -> None:
    """Prints one paragraph a benchmark."""
    folder = Path(__file__).parent
    scripts = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    for script in scripts:
        purpose = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "(no description)").splitlines()
        print(f"{script.stem}: {purpose[0]}\n    .venv/bin/python -m benchmarks.{script.stem}\n")

    if not scripts:
        print("There are no benchmarks yet; benchmarks/README.md says how to add one.")


if __name__ == "__main__":
    main()
