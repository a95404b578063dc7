"""What tests/cifar10.md and README say of CIFAR-10 follows from the CSV of the runs."""
import pytest

import cifar10
from conftest import ROOT

# as evaluate.py prints it
EVALUATION = """5000 images, short side to 73, bicubic, center 64 x 64, ...
runs/teacher/best.pth: regnet_y_400mf, scored among 10 of its 10 classes, matched by name
runs/teacher/best.pth mean: Acc@1 57.000 Acc@5 94.000 loss 1.200, agreement with each 100.000 {}
runs/plain-3/last.pth mean: Acc@1 33.000 Acc@5 84.000 loss 1.800, agreement with each 1.0 100.000 {}
runs/hard-3/last.pth class: Acc@1 37.000 Acc@5 86.000 loss 1.700, agreement with each 2.0 5.0 {}
runs/hard-3/last.pth distillation: Acc@1 38.000 Acc@5 87.000 loss 1.700, agreement with each 3.0 {}
runs/hard-3/last.pth mean: Acc@1 39.000 Acc@5 88.000 loss 1.600, agreement with each 4.0 7.0 9.0 {}
* Acc@1 39.000 Acc@5 88.000 loss 1.600
""".format("1.0 2.0 3.0 4.0", "5.0 6.0 7.0", "100.000 8.0 9.0", "6.0 8.0 100.000 10.0",
           "10.0 100.000")


def test_a_run_is_read_from_what_evaluate_prints_once_all_its_models_are_trained(tmp_path):
    for name in ("teacher", "plain-3", "hard-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.json").write_text('{"epochs": 2}')
        (tmp_path / name / "log.jsonl").write_text("{}\n{}\n")
    (tmp_path / "hard-3/evaluation.txt").write_text(EVALUATION)
    row = cifar10.read_run(tmp_path / "hard-3")
    assert list(row.values()) == ["hard", 3, 57, 33, 37, 38, 39, *range(1, 11)]
    assert row["teacher~plain"] == 1 and row["class~both"] == 9 and row["distillation~both"] == 10

    (tmp_path / "plain-3/log.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="plain-3 has not all of its 2 epochs"):
        cifar10.read_run(tmp_path / "hard-3")


def test_a_difference_is_paired_by_seed_and_compared_with_its_standard_error(capsys):
    zero = dict.fromkeys(cifar10.COLUMNS, 0.0)
    # hard - plain is 1, 2, 3: mean 2, deviation 1, standard error 1 / 3 ** 0.5
    rows = [{**zero, "run": "hard", "seed": seed, "plain": 30.0 + 9 * seed,
             "both": 31.0 + 10 * seed} for seed in range(3)]
    cifar10.print_tables(rows)
    claim = "| hard distillation over plain training | {} | {} | 2.3 | {} |"
    assert claim.format("2.00", "0.58", "no") in capsys.readouterr().out    # 3.46 < 4.30

    rows[0]["both"] += 0.5                                   # 1.5, 2, 3: 4.91 standard errors
    cifar10.print_tables(rows)
    assert claim.format("2.17", "0.44", "as in the paper") in capsys.readouterr().out


@pytest.mark.parametrize("file", ["README.md", "tests/cifar10.md"])
def test_the_tables_follow_from_the_runs(file, capsys):
    cifar10.print_tables(cifar10.read_csv(cifar10.PUBLISHED))
    printed = capsys.readouterr().out.splitlines()
    rows = [line for line in (ROOT / file).read_text().splitlines()
            if line.startswith(("| plain", "| soft", "| hard", "| agreement", "| teacher:"))]
    assert len(rows) > 5 and set(rows) <= set(printed)
