"""Curves of a training run, from its log.jsonl: the mini model's pretraining and retrofit by default.

usage: python -m paper_figures.training_curves [pretrain.jsonl retrofit.jsonl] [--out base]
       python -m paper_figures.training_curves RUN/log.jsonl --out base         (any run of scripts.retrofit)

Writes BASE.png and BASE.pdf. Never runs a model.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from paper_figures import style

RESULTS = style.RESULTS / "mini"


def read(path: Path) -> list[dict]:
    """The lines of a log.

    Raises:
      ValueError: one that is no JSON object, with the file.
    """
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: not JSON Lines ({error})") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: its lines are not all objects")
    return rows


def column(rows: list[dict], key: str) -> tuple[list, list]:
    """Steps and values of the rows that have `key`.

    Raises:
      ValueError: none has it.
    """
    have = [row for row in rows if key in row]
    if not have:
        raise ValueError(f"no line of the log has {key!r}")
    return [row["step"] for row in have], [row[key] for row in have]


def draw(pretrain: list[dict], retrofit: list[dict]) -> Figure:
    """Loss and accuracy of pretraining; KL and the achieved against the target share of the retrofit."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False}):
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _twin(left, pretrain, ("loss", "loss (nats a token)"), [("chains_right", "chains right, teacher-forced")])
        left.set_title("pretraining", loc="left", fontsize=9)
        steps, target = column(retrofit, "target_cr")
        shares = [{"step": s, "goal": 1 - 1 / cr} for s, cr in zip(steps, target, strict=True)]
        _twin(
            right,
            retrofit + shares,
            ("kl", "KL to the teacher (nats a token)"),
            [("alpha", "tokens evicted"), ("goal", "target")],
        )
        right.set_title("retrofit", loc="left", fontsize=9)
    return figure


def draw_run(rows: list[dict]) -> Figure:
    """A retrofit: the terms of its loss; achieved and target CR; the share evicted by layer, step after step."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.6, 3.0), layout="constrained")
        losses, ratios, layers = figure.subplots(1, 3)
        for (key, label), colour in zip(
            (("kl", "KL to the teacher"), ("compression", "compression loss"), ("loss", "their sum")),
            style.COLOURS,
            strict=False,
        ):
            losses.plot(*column(rows, key), color=colour, linewidth=0.9, label=label)
        losses.set(xlabel="step", ylabel="nats a token", ylim=(0, None))
        losses.legend(frameon=False)
        ratios.plot(*column(rows, "achieved_cr"), color=style.COLOURS[0], linewidth=1.2, label="achieved")
        ratios.plot(*column(rows, "target_cr"), color=style.COLOURS[1], linestyle="--", linewidth=1.2, label="target")
        ratios.set(xlabel="step", ylabel="compression ratio")
        ratios.legend(frameon=False)
        steps, shares = column(rows, "alpha_by_head")
        by_layer = np.array(shares).mean(axis=2).T  # [L, lines]
        edges = (steps[0], steps[-1], by_layer.shape[0] - 0.5, -0.5)
        image = layers.imshow(by_layer, aspect="auto", extent=edges, vmin=0, vmax=1, cmap="viridis")
        layers.set(xlabel="step", ylabel="layer")
        figure.colorbar(image, ax=layers, label="tokens evicted")
    return figure


def _twin(axes, rows: list[dict], loss: tuple[str, str], shares: list[tuple[str, str]]) -> None:
    """A loss on a log axis at the left, shares of 1 at the right."""
    axes.semilogy(*column(rows, loss[0]), color=style.COLOURS[0], linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel(loss[1])
    other = axes.twinx()
    for (key, label), colour, line in zip(shares, style.COLOURS[1:], ("-", "--"), strict=False):
        other.plot(*column(rows, key), color=colour, linestyle=line, linewidth=1.2, label=label)
    other.set_ylim(0, 1)
    other.set_ylabel("share")
    other.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("logs", type=Path, nargs="*", help="a retrofit's log, or a pretraining's and a retrofit's")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "training_curves")
    options = parser.parse_args(arguments)
    logs = options.logs or [RESULTS / "pretrain_log.jsonl", RESULTS / "retrofit_cr8_log.jsonl"]
    if len(logs) > 2:
        parser.error("give one log, or two, or none for the mini model's")
    with style.mistakes(parser, logs[-1]):
        figure = draw(*map(read, logs)) if len(logs) == 2 else draw_run(read(logs[0]))
        for path in style.save(figure, options.out):
            print(path)


if __name__ == "__main__":
    main()
