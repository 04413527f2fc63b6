"""One JSON file of benchmark rows, to which several runs may add: a row says which run measured it.

{"runs": [{"settings": ..., "environment": ...}], "rows": [{"cell": "8x8192x8", ..., "run": 0}]}
"""

import json
from pathlib import Path

from experiments.run import write_json

VARYING = ("cells", "modes", "fastdms_modes", "out")  # settings in which the runs of one file may differ


class Record:
    """Rows as they come; the file, if there is one, is complete after each.

    A row takes the place of earlier ones of the same cell and mode, or of the same cell where one of the two has no
    mode; but no row without a time takes the place of one with a time. What else an earlier run left stays.

    Raises:
      SystemExit: a file that is no such record, or one of other settings or another device; no folder to write to.
    """

    def __init__(self, out: Path | None, run: dict):
        self.out, self.runs, self.rows = out, [], []
        if out and not out.parent.is_dir():
            raise SystemExit(f"out={out}: the folder does not exist")
        if out and out.exists():
            try:
                earlier = json.loads(out.read_text())
                self.runs, self.rows = list(earlier["runs"]), list(earlier["rows"])
                kinds = {_kind(old) for old in self.runs} | {_kind(run)}
                _ = [(row["cell"], self.runs[row["run"]]) for row in self.rows]
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise SystemExit(f"out={out}: is not a record of this benchmark ({error!r})") from None
            if len(kinds) > 1:
                raise SystemExit(f"out={out}: holds runs of other settings or another device: {sorted(kinds)}")
        self.runs = [*self.runs, run]

    def add(self, row: dict) -> None:
        """Keeps a row, prints it and writes the file."""
        same = [old for old in self.rows if _replaces(row, old)]
        if "seconds_per_step" in row or not any("seconds_per_step" in old for old in same):
            kept = [old for old in self.rows if old not in same]
            self.rows = [*kept, {**row, "run": len(self.runs) - 1}]
        print(json.dumps({k: v for k, v in row.items() if k != "rounds"}), flush=True)
        if self.out:
            used = sorted({row["run"] for row in self.rows})
            rows = [{**row, "run": used.index(row["run"])} for row in self.rows]
            write_json(self.out, {"runs": [self.runs[n] for n in used], "rows": rows})


def _kind(run: dict) -> str:
    settings = {key: value for key, value in run["settings"].items() if key not in VARYING}
    return json.dumps([settings, run["environment"]["device"]], sort_keys=True)


def _replaces(new: dict, old: dict) -> bool:
    modes = {row["mode"] for row in (new, old) if "mode" in row}
    return new["cell"] == old["cell"] and len(modes) < 2
