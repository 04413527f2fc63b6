"""The tables of the README and of docs/ are those of the recorded results."""

import json

import pytest

from paper_figures import decode_speed, offload_table, readme_tables, style


def test_tables_are_drawn_from_the_results():
    pages = [page.read_text() for page in readme_tables.PAGES]
    assert sum(text.count("<!-- table ") for text in pages) == len(readme_tables.TABLES)
    for text in pages:
        assert readme_tables.render(text) == text, "run `make figures`"


@pytest.mark.parametrize("name", readme_tables.TABLES)
def test_a_wrong_number_is_seen(name):
    text = f"<!-- table {name} -->\n| 99.9 |\n<!-- end -->"
    assert "99.9 |\n" not in readme_tables.render(text)


def test_decode_rows_of_peers_and_of_cells_that_do_not_fit(tmp_path, monkeypatch):
    about = {"device": "1 x gpu NVIDIA X", "jax": "1", "transformers": "5", "torch": "2"}
    run = {"settings": {"model": "m", "dtype": "bfloat16", "rounds": 3, "steps": 16}, "environment": about}
    cell = {
        "cell": "64x8192x8",
        "batch": 64,
        "context": 8192,
        "largest_batch": False,
        "fits": True,
        "bytes_needed": 2.5e10,
    }
    timed = {"seconds_per_step": 0.01, "tokens_per_second": 6400.0}
    ours = [{**cell, "cr": 8.0, **timed, "over_floor": 1.5}, {**cell, "cr": 1.0, "fits": False}]
    theirs = [{**cell, "mode": "eager", **timed}, {**cell, "mode": "compiled", "error": "x"}, {**cell, "fits": False}]
    (tmp_path / "x").mkdir()
    for name, rows in (("decode_m", ours), ("decode_peers_m", theirs)):
        record = {"runs": [run | ({"copy_bytes_per_second": 3e12} if rows is ours else {})], "rows": rows}
        (tmp_path / "x" / f"{name}.json").write_text(json.dumps(record))
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    lines = readme_tables.gpu_decode().splitlines()
    assert lines[2:7] == [
        "| 8,192 | vanilla | 64 | 25.0 | does not fit |  |  |",
        "| 8,192 | DMS CR8 | 64 | 25.0 | 10.0 | 1.50 | 6,400 |",
        "| 8,192 | transformers, eager | 64 | 25.0 | 10.0 |  | 6,400 |",
        "| 8,192 | transformers, compiled | 64 | 25.0 | failed |  |  |",
        "| 8,192 | transformers | 64 | 25.0 | does not fit |  |  |",
    ]
    assert "Over 1.35 times the floor from 8 sequences on: 64x8192x8 (1.500)." in lines[-1]
    assert "m's shape: NVIDIA X" in lines[-1] and "transformers 5 (torch 2): NVIDIA X" in lines[-1]


def test_the_headline_is_against_vanilla_at_its_context(tmp_path, monkeypatch):
    run = {"settings": {"dtype": "bfloat16"}, "environment": {"device": "1 x gpu NVIDIA X"}}
    cells = [(8192, 1.0, 5, 50.0), (32768, 1.0, 2, 10.0), (32768, 8.0, 9, 75.0), (8192, 8.0, 30, 100.0)]
    rows = [
        {"batch": batch, "context": context, "cr": cr, "largest_batch": True, "seconds_per_step": 1, "over_floor": 1}
        | {"tokens_per_second": tokens}
        for context, cr, batch, tokens in cells
    ]
    rows.append({**rows[0], "largest_batch": False, "tokens_per_second": 1.0})
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "decode_phi.json").write_text(json.dumps({"runs": [run], "rows": rows}))
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    assert readme_tables.gpu_headline().splitlines()[2:] == [
        "| phi | 8,192 | vanilla | 5 | 50 | 1.00x |",
        "| phi | 8,192 | DMS CR8 | 30 | 100 | 2.00x |",
        "| phi | 32,768 | vanilla | 2 | 10 | 1.00x |",
        "| phi | 32,768 | DMS CR8 | 9 | 75 | 7.50x |",
        "",
        "NVIDIA X, bfloat16, random weights.",
    ]


def test_offload_rows(tmp_path, monkeypatch):
    run = {"settings": {"model": "m", "dtype": "bfloat16", "page_size": 64, "rounds": 3, "steps": 8}}
    run |= {"environment": {"device": "1 x gpu NVIDIA X", "jax": "1"}}
    run |= {"copy_bytes_per_second": 3e12, "link_bytes_per_second": 5e10}
    row = {"batch": 8, "context": 8192, "cr": 8.0, "fits": True}
    timed = {"seconds_per_step": 0.0425, "over_floor": 1.25, "tokens_per_second": 188.0}
    rows = [
        {**row, "mode": "device", "fits": False},
        {**row, "mode": "dms", **timed, "seconds_per_step": 0.0016},
        {**row, "mode": "streamed", **timed, "crossing_bytes": 2.1e9},
        {**row, "mode": "quest", "error": "x"},
    ]
    monkeypatch.setattr(style, "RESULTS", tmp_path)
    assert offload_table.offload() == ""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "offload_m.json").write_text(json.dumps({"runs": [run], "rows": rows}))
    *lines, _, note = offload_table.offload().splitlines()
    assert lines[2:] == [
        "| 8,192 | 8 | vanilla, GPU memory | does not fit |  |  |  |",
        "| 8,192 | 8 | DMS CR8, GPU memory | 1.60 | 1.25 | 188 |  |",
        "| 8,192 | 8 | vanilla, streamed | 42.5 | 1.25 | 188 | 2.10 |",
        "| 8,192 | 8 | Quest, reads 1/8 | failed |  |  |  |",
    ]
    assert "from pinned memory 50 GB/s, on the device 3.00 TB/s. NVIDIA X" in note


def test_rows_of_fastdms_are_named():
    names = {mode: decode_speed.series_of({"cr": 8.0, "mode": mode}) for mode in ("fastdms", "fastdms_each_step")}
    assert names == {"fastdms": "FastDMS CR8", "fastdms_each_step": "FastDMS CR8 each step"}
