"""Plot of a training run."""

from __future__ import annotations

from pathlib import Path


def draw_curve(history: list[dict], file: Path) -> None:
    """Plot losses and training accuracy over the images, as a small PNG."""
    if len(history) < 2:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), dpi=90)
    x = [row["pictures"] for row in history]
    axes = {
        "dense": left,
        "answers": left,
        "tokens": right,
        "patch shape": right,
        "patch color": right,
        "patch character": right,
    }
    for name, axis in axes.items():
        points = [(p, row[name]) for p, row in zip(x, history, strict=True) if name in row]
        if points:
            axis.plot(
                *zip(*points, strict=True),
                label={"dense": "dense labels", "tokens": "answer tokens"}.get(name, name),
                linewidth=1,
            )
    left.set(title="loss", xlabel="images", ylim=(0, None))
    right.set(title="share right (training images)", xlabel="images", ylim=(0, 1))
    for axis in (left, right):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
