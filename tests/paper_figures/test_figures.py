"""The figures, drawn from made-up results: what stands in them, and what is said of bad files."""

import itertools
import json

import pytest

import paper_figures.__main__ as figures
from paper_figures import (
    accuracy_vs_cr,
    accuracy_vs_reads,
    achieved_cr,
    decode_speed,
    pareto_fronts,
    retention,
    style,
    training_curves,
    window_ablation,
)
from paper_figures.rows import pareto


def estimate(mean):
    return {"mean": mean, "low": mean - 0.02, "high": mean + 0.02}


def row(policy, cr, chains, length, accuracy):
    reads = 1000.0 * length * chains / cr
    return {
        "config": f"{length / 1024:.2g}-{chains}-{cr:g}",
        "policy": policy,
        "cr": cr,
        "chains": chains,
        "problems": 500,
        "accuracy": estimate(accuracy),
        "kv_reads": reads,
        "prefill_reads": 10.0,
        "peak_tokens": reads / 100,
        "tokens": 300.0,
        "achieved_cr": 0.9 * cr,
        "finished": 1.0,
        "max_length": length,
    }


@pytest.fixture
def sweep():
    quality = {"dms": 0.02, "tova": 0.1, "random": 0.3}
    rows = [row("full", 1.0, chains, length, 0.6 + chains / 40) for chains in (1, 4) for length in (256, 448)]
    for (policy, loss), cr, chains, length in itertools.product(quality.items(), (2.0, 4.0), (1, 4), (256, 448)):
        rows.append(row(policy, cr, chains, length, 0.6 + chains / 40 - loss * cr / 4))
    return {"rows": rows}


@pytest.fixture
def ablation():
    cells = itertools.product((0, 4, 64), ("delayed", "immediate"), (2.0, 8.0))
    return {
        "rows": [
            {"window": w, "mode": m, "cr": cr, "accuracy": estimate(0.5 if m == "delayed" else 0.2),
             "achieved_cr": cr, "problems": 500, "base_accuracy": estimate(0.7)}
            for w, m, cr in cells
        ]
    }  # fmt: skip


@pytest.fixture
def kept():
    shares = {"edges": [0, 100, 200, 300], "live_share": [[0.9, 0.5, 0.1], [0.7, 0.3, 0.1]]}
    return {"policy": "dms", "cr": 4.0, "by_layer_head": [[0.1, 0.2], [0.3, 0.4]], "by_position": shares}


def lines(axes):
    """label -> x and y of each labelled line and error bar."""
    handles, labels = axes.get_legend_handles_labels()
    drawn = {}
    for handle, label in zip(handles, labels, strict=True):
        line = handle.lines[0] if hasattr(handle, "lines") else handle
        drawn[label] = ([float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()])
    return drawn


def test_pareto_fronts_hold_what_is_worth_its_cost(sweep):
    left, right = pareto_fronts.draw(sweep).axes[:2]
    assert list(lines(left)) == ["vanilla", "DMS", "TOVA", "random"] == list(lines(right))
    for axes, cost in ((left, "kv_reads"), (right, "peak_tokens")):
        for policy, (x, y) in zip(("full", "dms", "tova", "random"), lines(axes).values(), strict=True):
            front = pareto([r for r in sweep["rows"] if r["policy"] == policy], cost)
            assert x == pytest.approx([r[cost] for r in front]) and y == sorted(y)
            assert y == pytest.approx([100 * r["accuracy"]["mean"] for r in front])
    assert sum(len(points.get_offsets()) for points in left.collections if len(points.get_offsets()) > 1) >= len(
        sweep["rows"]
    ), "every row is a point"


def test_pareto_by_another_cost():
    rows = [{"a": 1, "b": 2, "accuracy": {"mean": 0.5}}, {"a": 2, "b": 1, "accuracy": {"mean": 0.5}}]
    assert [r["a"] for r in pareto(rows, "a")] == [1] and [r["a"] for r in pareto(rows, "b")] == [2]


def test_accuracy_against_cr_takes_one_chain_of_the_longest(sweep):
    (axes,) = accuracy_vs_cr.draw(sweep).axes
    drawn = lines(axes)
    assert list(drawn) == ["vanilla", "DMS", "TOVA", "random"]
    assert drawn["DMS"][0] == [2, 4] and drawn["DMS"][1] == pytest.approx([61.5, 60.5])
    assert drawn["vanilla"][1] == pytest.approx([62.5, 62.5])
    assert "one chain, at most 448 tokens" in axes.get_title("left")


def test_achieved_against_target(sweep):
    (axes,) = achieved_cr.draw(sweep).axes
    drawn = lines(axes)
    assert drawn["TOVA"] == ([2, 4], pytest.approx([1.8, 3.6]))
    assert drawn["achieved = target"][0] == drawn["achieved = target"][1]


def test_window_ablation(ablation):
    panels = window_ablation.draw(ablation).axes
    assert [axes.get_title("left") for axes in panels] == ["CR 2, 500 problems", "CR 8, 500 problems"]
    for axes in panels:
        drawn = lines(axes)
        assert list(drawn) == ["vanilla", "delayed", "immediate"]
        assert drawn["delayed"][1] == pytest.approx([50] * 3) and drawn["immediate"][1] == pytest.approx([20] * 3)
        assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "4", "64"]


def test_retention(kept):
    left, right = retention.draw(kept).axes[:2]
    assert sorted(text.get_text() for text in left.texts) == ["10", "20", "30", "40"]
    assert left.get_title("left") == "DMS CR4: tokens live at the end (%)"
    drawn = lines(right)
    assert drawn["mean of layers"] == ([50, 150, 250], pytest.approx([80, 40, 10]))
    assert drawn["layer 1"][1] == pytest.approx([70, 30, 10])
    kept["by_position"]["live_share"] = [0.5, 0.4, 0.3]
    assert list(lines(retention.draw(kept).axes[1])) == ["mean of layers"]


def test_policies_are_told_apart_without_colour():
    looks = [style.policy_look(policy) for policy in (*style.POLICIES, "another")]
    for field in ("color", "marker", "linestyle"):
        assert len({str(getattr(look, field)) for look in looks}) == len(looks), field
    assert set(style.LABELS) == set(style.POLICIES)


@pytest.mark.parametrize("script", figures.FIGURES)
def test_scripts_write_both_files_and_the_same_ones_again(script, request, tmp_path):
    fixture = {window_ablation: "ablation", retention: "kept"}.get(script, "sweep")
    path = tmp_path / "results.json"
    path.write_text(json.dumps(request.getfixturevalue(fixture)))
    script.main([str(path)])
    name = script.__name__.rsplit(".", 1)[1]
    script.main([str(path), str(tmp_path / "again.png")])
    for suffix, magic in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        content = (tmp_path / f"{name}{suffix}").read_bytes()
        assert content.startswith(magic) and content == (tmp_path / f"again{suffix}").read_bytes()


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[]", "has no 'rows'"),
        ('{"rows": []}', "has no 'rows'"),
        ('{"rows": {"a": 1}}', "its 'rows' are no list of objects"),
        ('{"rows": [{"kv_reads": 1, "accuracy": {"mean": 0.5}}]}', "a part of it has no 'policy'"),
    ],
)
def test_bad_results_are_named(tmp_path, capsys, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(SystemExit):
        accuracy_vs_reads.main([str(path)])
    assert f"{path}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no line of the log has 'kl'"),
        ("loss", "not JSON Lines"),
        ("[1]", "its lines are not all objects"),
        ('{"step": 1, "loss": 1.0}', "no line of the log has 'kl'"),
        ('{"kl": 1.0}', "a part of it has no 'step'"),
    ],
)
def test_bad_logs_are_named(tmp_path, capsys, content, message):
    path = tmp_path / "log.jsonl"
    path.write_text(content)
    with pytest.raises(SystemExit):
        training_curves.main([str(path), "--out", str(tmp_path / "curves")])
    assert message in capsys.readouterr().err


def test_a_sweep_without_ratios(sweep, tmp_path, capsys):
    for one in sweep["rows"]:
        one["cr"] = None
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    with pytest.raises(SystemExit):
        achieved_cr.main([str(tmp_path / "sweep.json")])
    assert "no row has a compression ratio" in capsys.readouterr().err


def test_all_figures_that_have_results_are_drawn(sweep, tmp_path, monkeypatch):
    results = tmp_path / "results"
    (results / "mini").mkdir(parents=True)
    (results / "sweep.json").write_text(json.dumps(sweep))
    monkeypatch.setattr(style, "RESULTS", results)
    called = []
    monkeypatch.setattr(training_curves, "main", lambda arguments: called.append("curves"))
    monkeypatch.setattr(figures.readme_tables, "main", lambda: called.append("tables"))
    figures.main()
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "accuracy_vs_cr.png",
        "achieved_cr.png",
        "pareto_fronts.png",
    ]
    assert called == ["curves", "tables"]


def test_decode_speed_tells_the_series_apart(tmp_path):
    cell = {"batch": 8, "context": 8192, "seconds_per_step": 0.01, "tokens_per_second": 800.0}
    ours = [{**cell, "cr": 1.0}, {**cell, "cr": 8.0, "batch": 64}, {**cell, "cr": 8.0}]
    missing = {"batch": 64, "context": 8192, "cr": 1.0, "fits": False}
    for name, rows in (("m", [*ours, missing]), ("peers_m", [{**cell, "mode": "eager"}, cell])):
        (tmp_path / f"decode_{name}.json").write_text(json.dumps({"rows": rows}))
    (axes,) = decode_speed.draw(decode_speed.read(tmp_path)).axes
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert lines == {"vanilla": [8], "DMS CR8": [8, 64], "transformers": [8], "transformers, eager": [8]}
    decode_speed.main([str(tmp_path), str(tmp_path / "drawn")])
    assert (tmp_path / "drawn.png").exists() and (tmp_path / "drawn.pdf").exists()
    with pytest.raises(ValueError, match="no decode_"):
        decode_speed.read(tmp_path / "empty")
