"""Draws again every figure that has recorded results, and the README's tables: what `make figures` runs."""

from paper_figures import (
    accuracy_vs_cr,
    accuracy_vs_reads,
    achieved_cr,
    decode_speed,
    pareto_fronts,
    readme_tables,
    retention,
    style,
    training_curves,
    window_ablation,
)

# Script -> the results that it reads; it writes a figure of its own name beside itself.
FIGURES = {
    accuracy_vs_reads: "mini/aime.json",
    pareto_fronts: "sweep.json",
    accuracy_vs_cr: "sweep.json",
    achieved_cr: "sweep.json",
    window_ablation: "ablate_window.json",
    retention: "retention.json",
}
# More results that pareto_fronts draws -> the figure.
FRONTS = {
    "mini_baselines.json": "baselines",
    "real_model/gsm8k_512.json": "gsm8k",
    "real_model/gsm8k_512_1.5b.json": "gsm8k_1.5b",
    "real_model/math500_512_1.5b.json": "math500_1.5b",
    "real_model/humaneval_512.json": "humaneval",
    "real_model/humaneval_512_1.5b.json": "humaneval_1.5b",
}


def main() -> None:
    for script, results in FIGURES.items():
        path = style.RESULTS / results
        if path.exists():
            script.main([str(path), str(style.RESULTS.parent / script.__name__.rsplit(".", 1)[1])])
    for results, figure in FRONTS.items():
        if (style.RESULTS / results).exists():
            pareto_fronts.main([str(style.RESULTS / results), str(style.RESULTS.parent / figure)])
    training_curves.main([])
    if (style.RESULTS / "h200").exists():
        decode_speed.main([str(style.RESULTS / "h200"), str(style.RESULTS.parent / "decode_speed")])
    readme_tables.main()


if __name__ == "__main__":
    main()
