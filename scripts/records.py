"""One JSON file of benchmark rows, to which several runs may add: a row says which run measured it.

{"runs": [{"settings": ..., "environment": ...}], "rows": [{"cell": "8x8192x8", ..., "run": 0}]}
"""

import json
from pathlib import Path

from experiments.run import write_json


class Record:
    """Rows as they come; the file, if there is one, is complete after each.

    A row takes the place of an earlier one of the same cell and mode; what else an earlier run left stays.
    """

    def __init__(self, out: Path | None, run: dict):
        self.out, self.runs, self.rows = out, [], []
        if out and out.exists():
            try:
                earlier = json.loads(out.read_text())
                self.runs, self.rows = earlier["runs"], earlier["rows"]
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"out={out}: is not a record of this benchmark ({error!r})") from None
        self.runs = [*self.runs, run]

    def add(self, row: dict) -> None:
        """Keeps a row, prints it and writes the file."""
        kept = [old for old in self.rows if (old["cell"], old.get("mode")) != (row["cell"], row.get("mode"))]
        self.rows = [*kept, {**row, "run": len(self.runs) - 1}]
        print(json.dumps({k: v for k, v in row.items() if k != "rounds"}), flush=True)
        if self.out:
            used = sorted({row["run"] for row in self.rows})
            rows = [{**row, "run": used.index(row["run"])} for row in self.rows]
            write_json(self.out, {"runs": [self.runs[n] for n in used], "rows": rows})
