# SPDX-License-Identifier: Apache-2.0
"""What each setting costs and what it leaves of the motion, in a table and a picture.

python -m lab.frontier --out frontier/                  # 24 clips of the toy's large canvas, ten minutes on a GPU
python -m lab.frontier --out frontier/ --table-only     # of what is on disk

The error is lab.table1's, whose flags this takes, with its standard error over clips. The cost is that of as many
passes through Wan's 1.3B at 81 frames of 480x832, with the VAE. A run that was killed goes on where it stopped.
"""

import statistics
import sys

from PIL import Image, ImageDraw, ImageFont

from lab import cost, table1

ROWS = (
    "velocity_interval=3", "interval=10, velocity_interval=3", "interval=20, velocity_interval=3", "preset fast",
    "coarse=0.5, velocity_interval=3", "coarse=0.8, interval=5, velocity_interval=3",
    "coarse=1, velocity_interval=3", "guided_fraction=0.2, velocity_interval=3",
    "guided_fraction=0.2, interval=20, velocity_interval=3",
)  # fmt: skip
CLIPS = "--model toy --size 96x132 --seed 86000 --clips 24".split()
COLUMN = "motion error, px a frame"
SIZE, LEFT, BOTTOM, TOP, LEGEND = (1160, 560), 60, 500, 20, 640  # of the picture; of its axes


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


def axis_places(points):
    """Functions PFLOP -> column and px -> row of the picture, both axes from 0 on."""
    most = 1.08 * max(pflop for _, pflop, *_ in points)
    worst = 1.08 * max(error + spread for _, _, error, spread, _ in points)

    def column(pflop):
        return LEFT + (LEGEND - 40 - LEFT) * pflop / most

    def row(error):
        return BOTTOM - (BOTTOM - TOP) * error / worst

    return column, row


def draw(points):
    """The picture: numbered points with error bars, orange where the motion is read coarsely, and their names."""
    image = Image.new("RGB", SIZE, "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    column, row = axis_places(points)
    pen.line([(LEFT, TOP), (LEFT, BOTTOM), (LEGEND - 40, BOTTOM)], fill="black")
    for pflop in range(0, int(max(x for _, x, *_ in points)) + 1, 10):
        pen.line([(column(pflop), BOTTOM), (column(pflop), BOTTOM + 5)], fill="black")
        pen.text((column(pflop), BOTTOM + 8), str(pflop), fill="black", font=font, anchor="ma")
    for half in range(int(2 * max(error for _, _, error, *_ in points)) + 1):
        pen.line([(LEFT - 5, row(half / 2)), (LEFT, row(half / 2))], fill="black")
        pen.text((LEFT - 9, row(half / 2)), f"{half / 2:g}", fill="black", font=font, anchor="rm")
    pen.text((LEFT, BOTTOM + 30), "PFLOP of a run; upwards: error of the motion, px a frame", fill="black", font=font)
    for number, (name, pflop, error, spread, _) in enumerate(points, 1):
        x, y, color = column(pflop), row(error), "darkorange" if "coarse" in name or "fast" in name else "navy"
        pen.line([(x, row(error - spread)), (x, row(error + spread))], fill=color, width=2)
        pen.ellipse([(x - 4, y - 4), (x + 4, y + 4)], fill=color)
        pen.text((x + 7, y - 16), str(number), fill=color, font=font)
        text = f"{number:2}  {name}: {pflop:.1f} PFLOP, {error:.2f} ± {spread:.2f} px"
        pen.text((LEGEND, TOP + 30 * number), text, fill=color, font=font)
    return image


def show(results, rows, args):
    """Print the table of cost and error, and draw it."""
    points = measure(results, rows, args, prices())
    if not points:
        print("no clip has results of every setting yet")
        return
    print("\n| | PFLOP | error, px a frame | clips |\n|---|--:|--:|--:|")
    for name, pflop, error, spread, clips in points:
        print(f"| {name} | {pflop:.1f} | {error:.2f} ± {spread:.2f} | {clips} |")
    draw(points).save(args.out / "frontier.png")
    print(f"\ndrawn in {args.out / 'frontier.png'}")


def main(argv=None):
    argv = [*CLIPS, *(sys.argv[1:] if argv is None else argv)]
    if "--rows" not in argv:
        argv += ["--rows", *ROWS]
    return table1.main(argv, then=show)


if __name__ == "__main__":
    sys.exit(main())
