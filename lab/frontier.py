# SPDX-License-Identifier: Apache-2.0
"""What each setting costs and what it leaves of the motion, in a table and a picture.

python -m lab.frontier --out frontier/                  # 24 clips of the toy's large canvas, ten minutes on a GPU
python -m lab.frontier --out frontier/ --table-only     # of what is on disk

The error is lab.table1's, whose flags this takes, with its standard error over clips. The cost is that of as many
passes through Wan's 1.3B at 81 frames of 480x832, with the VAE. A run that was killed goes on where it stopped.
Drawn by matplotlib, as lab.figures is.
"""

import statistics
import sys

from lab import cost, figures, table1

ROWS = (
    "velocity_interval=3", "interval=10, velocity_interval=3", "interval=20, velocity_interval=3", "preset fast",
    "coarse=0.5, velocity_interval=3", "coarse=0.8, interval=5, velocity_interval=3",
    "coarse=1, velocity_interval=3", "guided_fraction=0.2, velocity_interval=3",
    "guided_fraction=0.2, interval=20, velocity_interval=3",
)  # fmt: skip
CLIPS = "--model toy --size 96x132 --seed 86000 --clips 24".split()
COLUMN = "motion error, px a frame"


def prices():
    """{phase: [FLOPs]} of the 1.3B's passes, and coarse ones, at its own size."""
    args, model = table1.parse_arguments("--model 1.3B --device cpu --dry-run --coarse 1".split())
    return cost.count(args, model)[0]


def measure(results, rows, args, flops):
    """(name, PFLOP, mean error, its standard error, clips) of rows with results, over the clips that these share."""
    errors = {}
    for name, row in rows.items():
        wanted = table1.settings_hash(row, args)
        found = {line["key"][1]: line["columns"][COLUMN] for line in results if line["key"][0] == wanted}
        if found:
            errors[name] = found
    clips, points = set.intersection(*map(set, errors.values() or [()])), []
    for name, found in errors.items() if clips else ():
        here = [found[clip] for clip in clips]
        spread = statistics.stdev(here) / len(here) ** 0.5 if len(here) > 1 else 0.0
        counts = cost.run_counts(rows[name]).items()
        pflop = sum(times * flops[phase][0] for phase, times in counts if "of it" not in phase) / 1e15
        points.append((name, pflop, statistics.mean(here), spread, len(here)))
    return points


def draw(points):
    """The picture: numbered points with error bars, orange where the motion is read coarsely, and their names."""
    figure, ((axes,),) = figures.new_figure(1, 1, 11.6, 5.6)
    for number, (name, pflop, error, spread, _) in enumerate(points, 1):
        color = "darkorange" if "coarse" in name or "fast" in name else "navy"
        label = f"{number}  {name}: {pflop:.1f} PFLOP, {error:.2f} ± {spread:.2f} px"
        axes.errorbar(pflop, error, spread, fmt="o", color=color, label=label)
        axes.annotate(str(number), (pflop, error), (5, 5), textcoords="offset points", color=color)
    axes.set(xlabel="PFLOP of a run", ylabel="error of the motion, px a frame")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", labelcolor="linecolor", handlelength=1, frameon=False)
    return figure


def show(results, rows, args):
    """Print the table of cost and error, and draw it."""
    points = measure(results, rows, args, prices())
    if not points:
        print("no clip has results of every setting yet")
        return
    print("\n| | PFLOP | error, px a frame | clips |\n|---|--:|--:|--:|")
    for name, pflop, error, spread, clips in points:
        print(f"| {name} | {pflop:.1f} | {error:.2f} ± {spread:.2f} | {clips} |")
    draw(points).savefig(args.out / "frontier.png")
    print(f"\ndrawn in {args.out / 'frontier.png'}")


def main(argv=None):
    argv = [*CLIPS, *(sys.argv[1:] if argv is None else argv)]
    if "--rows" not in argv:
        argv += ["--rows", *ROWS]
    return table1.main(argv, then=show)


if __name__ == "__main__":
    sys.exit(main())
