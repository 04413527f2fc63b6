"""Benchmark records that several runs add to."""

import json

import pytest

from scripts.records import Record


def test_a_row_takes_the_place_of_an_earlier_one(tmp_path):
    out = tmp_path / "record.json"
    first = Record(out, {"commit": "a"})
    first.add({"cell": "1x8", "seconds": 1})
    first.add({"cell": "2x8", "mode": "eager", "seconds": 2})
    first.add({"cell": "2x8", "mode": "graph", "seconds": 3})
    second = Record(out, {"commit": "b"})
    assert json.loads(out.read_text())["runs"] == [{"commit": "a"}]  # a run that measured nothing leaves no trace
    second.add({"cell": "2x8", "mode": "graph", "seconds": 4})
    record = json.loads(out.read_text())
    assert record["runs"] == [{"commit": "a"}, {"commit": "b"}]
    assert [(row["seconds"], row["run"]) for row in record["rows"]] == [(1, 0), (2, 0), (4, 1)]
    third = Record(out, {"commit": "c"})
    third.add({"cell": "1x8", "seconds": 5})
    third.add({"cell": "2x8", "mode": "eager", "seconds": 6})
    record = json.loads(out.read_text())
    assert record["runs"] == [{"commit": "b"}, {"commit": "c"}]  # nothing is left of the first
    assert [(row["seconds"], row["run"]) for row in record["rows"]] == [(4, 0), (5, 1), (6, 1)]


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}'])
def test_a_file_that_is_no_record(tmp_path, text):
    out = tmp_path / "record.json"
    out.write_text(text)
    with pytest.raises(SystemExit, match="out=.*record.json"):
        Record(out, {})
    assert out.read_text() == text
