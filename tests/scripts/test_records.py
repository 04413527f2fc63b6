"""Benchmark records that several runs add to."""

import json

import pytest

from scripts.benchmarks.records import Record


def run(commit, **settings):
    return {"settings": {"model": "m", "cells": commit, **settings}, "environment": {"device": "x", "commit": commit}}


def timed(cell, seconds, **fields):
    return {"cell": cell, "seconds_per_step": seconds, **fields}


def read(out):
    record = json.loads(out.read_text())
    commits = [old["environment"]["commit"] for old in record["runs"]]
    return commits, [(row.get("mode"), row.get("seconds_per_step"), row["run"]) for row in record["rows"]]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "record.json"


def test_a_row_takes_the_place_of_an_earlier_one(out):
    first = Record(out, run("a"))
    first.add(timed("1x8", 1))
    first.add(timed("2x8", 2, mode="eager"))
    first.add(timed("2x8", 3, mode="graph"))
    second = Record(out, run("b"))
    assert read(out)[0] == ["a"]  # a run that measured nothing leaves no trace
    second.add(timed("2x8", 4, mode="graph"))
    assert read(out) == (["a", "b"], [(None, 1, 0), ("eager", 2, 0), ("graph", 4, 1)])
    third = Record(out, run("c"))
    third.add(timed("1x8", 5))
    third.add(timed("2x8", 6, mode="eager"))
    assert read(out) == (["b", "c"], [("graph", 4, 0), (None, 5, 1), ("eager", 6, 1)])  # nothing is left of a


def test_what_failed_gives_way_to_what_was_timed(out):
    record = Record(out, run("a"))
    record.add({"cell": "2x8", "fits": False})
    record.add(timed("2x8", 2, mode="eager"))
    record.add({"cell": "2x8", "mode": "graph", "error": "x"})
    record.add({"cell": "2x8", "mode": "eager", "error": "out of memory"})
    record.add({"cell": "2x8", "fits": False})
    assert read(out)[1] == [("eager", 2, 0), ("graph", None, 0)]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"rows": []}', '{"runs": [], "rows": null}', '{"runs": [], "rows": [{}]}']
)
def test_a_file_that_is_no_record(out, text):
    out.write_text(text)
    with pytest.raises(SystemExit, match="out=.*record.json: is not"):
        Record(out, run("a"))
    assert out.read_text() == text


def test_runs_that_do_not_go_together(out, tmp_path):
    Record(out, run("a")).add(timed("1x8", 1))
    with pytest.raises(SystemExit, match="other settings"):
        Record(out, run("b", model="another"))
    with pytest.raises(SystemExit, match="another device"):
        Record(out, run("b") | {"environment": {"device": "y"}})
    with pytest.raises(SystemExit, match="folder does not exist"):
        Record(tmp_path / "none" / "record.json", run("a"))
