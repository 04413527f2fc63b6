"""The kernel benchmark: its comparisons, its clock, its record, and that FlexAttention is given the same mask."""

import json

import jax
import numpy as np
import pytest

from scripts.benchmarks import bench_kernels, kernel_cases, kernel_peers


# It is called without torch.compile, which is what it warns of: only the mask is looked at here.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_flex_attention_has_our_mask(monkeypatch, hard):
    import torch
    import torch.nn.attention.flex_attention

    monkeypatch.setattr(kernel_peers, "DEVICE", "cpu")
    monkeypatch.setattr(torch, "compile", lambda fn: fn)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    case = kernel_cases.Flash(T=50, H=4, K=2, D=16, window=5, hard=hard, dtype="float32")
    (q, k, v, log_keep_prob), weights = case.inputs()
    want = case.attend(q, k, v, log_keep_prob, implementation="reference")
    arrays = [np.asarray(x) for x in (q, k, v, weights, log_keep_prob)]
    forward, _ = kernel_peers.flex(*arrays, case.window, hard, "float32")
    np.testing.assert_allclose(forward().transpose(1, 2).numpy(), want, atol=1e-5)


@pytest.mark.parametrize("spread", [1, 8])
def test_spread_keeps_the_total(spread):
    lengths = kernel_cases.Decode(spread=spread).lengths()
    assert lengths.shape == (16, 8) and lengths.sum() == 128 * 8192
    assert lengths.max() / lengths.min() == pytest.approx(spread, rel=0.02)


def test_decode_inputs_fit_the_lengths():
    case = kernel_cases.Decode(B=2, K=2, G=1, D=4, mean_length=40, spread=8, page=16, pages="int8")
    _, pages = case.inputs()
    used = np.arange(pages.table.shape[2]) < -(-np.asarray(pages.lengths) // 16)[..., None]
    assert sorted(np.asarray(pages.table)[used]) == list(range(len(pages.k)))
    assert pages.k_scale.shape == pages.k.shape[:2]
    assert case.live_bytes() == 160 * 2 * (4 + 4)


@pytest.mark.parametrize("pages", [None, "int8"])
def test_a_latent_entry_is_counted_once(pages):
    case = kernel_cases.Decode(B=2, K=1, G=20, D=26, U=16, mean_length=40, page=16, dtype="bfloat16", pages=pages)
    _, inputs = case.inputs()
    stored = [x for x in (inputs.k, inputs.v, inputs.k_scale, inputs.v_scale) if x is not None]
    slots = inputs.k.shape[0] * inputs.k.shape[1]
    assert case.live_bytes() == 80 * sum(x.nbytes for x in stored) / slots and inputs.v.shape[2] == 16


def test_the_sweep_knows_every_kind_of_decoding(monkeypatch):
    """`--tune` on a machine without a GPU: each tiling of each case is asked for."""
    from dms_jax.kernels import triton_decode  # noqa: F401

    asked, record = [], bench_kernels.Record(None, {})
    monkeypatch.setattr(bench_kernels, "machine_rates", lambda *_: (1e12, 1e15))
    monkeypatch.setattr(bench_kernels, "decode_calls", lambda case, tiles: asked.append((case, tiles)) or ([], None))
    monkeypatch.setattr(bench_kernels, "median_time", lambda *_: 1e-3)
    bench_kernels.tune(record, bench_kernels.Settings(kernels=("latent",), quick=True, tune=True))
    assert len({tiles for _, tiles in asked}) == len(asked) == len(record.rows) - 1
    assert record.rows[0]["of_copy"] == pytest.approx(64 * 8192 * 576 * 2 / 1e-3 / 1e12)


def test_a_run_lasts_from_its_first_kernel_to_its_last():
    """Three runs of three kernels, out of order, with gaps in and between them; the second is the median."""
    runs = [(0, [(0, 5), (6, 8), (8, 9)]), (100, [(0, 5), (7, 8), (9, 11)]), (300, [(0, 9), (2, 20), (3, 4)])]
    events = [(start + a, start + b) for start, kernels in runs for a, b in kernels]
    assert bench_kernels.run_seconds(events[::-1], 3) == pytest.approx(11e-9)
    for wrong in (events[:-1], []):
        with pytest.raises(RuntimeError, match=f"{len(wrong)} events for 3"):
            bench_kernels.run_seconds(wrong, 3)


def test_the_profile_of_a_cpu_has_no_gpu_events():
    with pytest.raises(RuntimeError, match="0 events"):
        bench_kernels.median_time(lambda x: x + 1, [(jax.numpy.ones(3) * i,) for i in range(3)], repeats=2)


def test_record_survives_a_failing_peer(tmp_path, capsys):
    out = tmp_path / "record.json"
    record = bench_kernels.Record(out, {"device": "none"})
    record.attempt(lambda: 1 / 0, name="peer", case="x")
    record.attempt(lambda: {"seconds": 1.0}, name="ours")
    rows = json.loads(out.read_text())["rows"]
    assert rows == [
        {"name": "peer", "case": "x", "error": "ZeroDivisionError: division by zero"},
        {"name": "ours", "seconds": 1.0},
    ]
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_comparison_in_the_interpreter(tmp_path, monkeypatch):
    """The script on a machine without a GPU, on one shape; and one comparison of gradients."""
    from dms_jax.kernels import launch

    monkeypatch.setattr(launch, "xla_call", launch.xla_call)  # put back afterwards
    few = {"B": 1, "K": 1, "G": 2, "D": 8, "mean_length": 20, "page": 16}
    monkeypatch.setattr(kernel_cases, "tiny_decode", lambda: [kernel_cases.Decode(**few)])
    bench_kernels.main(bench_kernels.Settings(kernels=("decode",), out=tmp_path / "record.json"))
    record = json.loads((tmp_path / "record.json").read_text())
    checked = [(row["name"], row["dtype"], row["passed"]) for row in record["rows"]]
    assert checked == [("check decode", "float32", True), ("check decode", "bfloat16", True)]
    gradients = bench_kernels.Record(None, {})
    bench_kernels.check_flash(gradients, kernel_cases.Flash(T=20, H=2, K=1, D=8, window=4, dtype="float32"), "triton")
    assert gradients.rows[0]["passed"] and set(gradients.rows[0]["errors"]) == {"out", "q", "k", "v", "log_keep_prob"}
    assert record["versions"]["jax"] == jax.__version__ and record["device"] == "cpu"


def test_a_wrong_result_is_found(tmp_path):
    record = bench_kernels.Record(None, {})
    right = {"out": np.ones(3)}
    bench_kernels.check(record, "x", "float32", {"out": np.array([1, 1, 1.0001])}, right)
    bench_kernels.check(record, "x", "float32", {"out": np.array([1, 1, np.nan])}, right)
    bench_kernels.check(record, "x", "float32", right, right)
    assert [row["passed"] for row in record.rows] == [False, False, True]
