"""Which tokens are still live at the end: by layer and KV head, and by position.

usage: python -m paper_figures.retention retention.json [out]

Reads {"policy", "cr", "by_layer_head": [L][K], "by_position": {"edges": [bins + 1], "live_share": [bins] or
[L][bins]}}, all shares of the tokens seen. Never runs a model.
"""

import numpy as np
from matplotlib.figure import Figure

from paper_figures import style

WRITTEN = 128  # heads; a map of more is drawn without its numbers
LAYERS_DRAWN = 4  # lines of single layers beside the mean: the first, the last and some between


def draw(results: dict) -> Figure:
    """The figure of a retention record."""
    with style.theme():
        figure = style.new_figure(9.6, 3.6)
        figure.get_layout_engine().set(w_pad=0.1)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
        _draw_heads(figure, left, np.asarray(results["by_layer_head"], float))
        _draw_positions(right, results["by_position"])
        policy = style.LABELS.get(results["policy"], results["policy"])
        cr = "" if results.get("cr") is None else f" CR{results['cr']:g}"
        left.set_title(f"{policy}{cr}: tokens live at the end (%)")
        right.set_title("by position, mean of KV heads")
    return figure


def _draw_heads(figure, axes, shares) -> None:
    image = axes.imshow(100 * shares, cmap=style.SEQUENTIAL, vmin=0, aspect="auto", origin="lower")
    axes.grid(False)
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    for axis, count in ((axes.xaxis, shares.shape[1]), (axes.yaxis, shares.shape[0])):
        axis.set_ticks(range(0, count, max(1, count // 8)))
    if shares.size <= WRITTEN:
        middle = 50 * shares.max()
        for (layer, head), share in np.ndenumerate(shares):
            colour = "white" if 100 * share < middle else "black"
            axes.text(head, layer, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, ax=axes, pad=0.02)


def _draw_positions(axes, by_position: dict) -> None:
    edges = np.asarray(by_position["edges"], float)
    shares = 100 * np.atleast_2d(np.asarray(by_position["live_share"], float))
    middles = (edges[1:] + edges[:-1]) / 2
    L = len(shares)
    drawn = sorted({*np.linspace(0, L - 1, LAYERS_DRAWN).round().astype(int)}) if L > 1 else ()
    for n, layer in enumerate(drawn, 1):
        look = style.look(n)._asdict()
        axes.plot(middles, shares[layer], label=f"layer {layer}", linewidth=1, markersize=4, **look)
    axes.plot(middles, shares.mean(axis=0), color=style.COLOURS[0], linewidth=2.2, label="mean of layers")
    axes.set_ylim(bottom=0)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("position of the token")
    axes.set_ylabel("still live at the end (%)")
    axes.legend(loc="best", ncols=2)


def main(arguments: list[str] | None = None) -> None:
    style.main("retention", draw, __doc__, ("by_layer_head", "by_position", "policy"), arguments)


if __name__ == "__main__":
    main()
