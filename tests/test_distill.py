"""The objectives against hand calculation."""
import math

import pytest
import torch

import distill
from conftest import run_main


def logits(*probabilities):
    return torch.tensor(probabilities).log()


def test_hard_distillation_is_cross_entropy_with_the_teachers_decision():
    student, teacher = logits([0.2, 0.8], [0.5, 0.5]), torch.tensor([[3.0, 1.0], [0.0, 9.0]])
    assert distill.hard_distillation(student, teacher).item() == pytest.approx((-math.log(0.2) - math.log(0.5)) / 2)


def test_soft_distillation_is_the_papers_equation():
    student, teacher = logits([0.5, 0.5], [0.25, 0.75]), logits([0.2, 0.8], [0.25, 0.75])
    kl = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)           # the second image's is 0
    assert distill.soft_distillation(student, teacher, 1.0).item() == pytest.approx(kl / 2)


def test_soft_distillation_scales_with_the_temperature_squared():
    student, teacher = logits([0.5, 0.5]), logits([0.2, 0.8])            # at temperature 2 the teacher is (1/3, 2/3)
    kl = math.log((1 / 3) / 0.5) / 3 + 2 * math.log((2 / 3) / 0.5) / 3
    assert distill.soft_distillation(student, teacher, 2.0).item() == pytest.approx(4 * kl)


def test_the_loss_weighs_its_two_terms():
    class_logits, distillation_logits, teacher = logits([0.75, 0.25]), logits([0.5, 0.5]), logits([0.2, 0.8])
    loss, class_term, distillation_term = distill.distillation_loss(
        class_logits, distillation_logits, torch.tensor([[1.0, 0.0]]), teacher, alpha=0.3)
    assert class_term.item() == pytest.approx(-math.log(0.75))
    assert distillation_term.item() == pytest.approx(-math.log(0.5))
    assert loss.item() == pytest.approx(0.7 * -math.log(0.75) + 0.3 * -math.log(0.5))


def test_only_the_labels_are_smoothed():
    class_logits, distillation_logits, teacher = logits([0.75, 0.25]), logits([0.5, 0.5]), logits([0.2, 0.8])
    _, class_term, distillation_term = distill.distillation_loss(
        class_logits, distillation_logits, torch.tensor([0]), teacher, label_smoothing=0.1)
    assert class_term.item() == pytest.approx(-0.95 * math.log(0.75) - 0.05 * math.log(0.25))
    assert distillation_term.item() == pytest.approx(-math.log(0.5))


def test_mixed_targets_keep_one_teacher_label_per_image():
    targets, teacher = torch.tensor([[0.6, 0.4]]), logits([0.45, 0.55])
    _, class_term, distillation_term = distill.distillation_loss(
        logits([0.5, 0.5]), logits([0.9, 0.1]), targets, teacher)
    assert class_term.item() == pytest.approx(-math.log(0.5))
    assert distillation_term.item() == pytest.approx(-math.log(0.1))


def test_the_official_codes_soft_loss_comes_from_the_alpha_in_the_docstring():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 8, dtype=torch.float64).unbind()
    labels, k, a = torch.tensor([1, 4, 7]), 8, 0.5

    def gradient(loss, z):
        return torch.autograd.grad(loss, z)[0]

    z = student.clone().requires_grad_()
    kl_sum = (teacher.softmax(1) * (teacher.log_softmax(1) - z.log_softmax(1))).sum()
    official = gradient((1 - a) * torch.nn.functional.cross_entropy(z, labels) + a * kl_sum / z.numel(), z)
    alpha = (a / k) / (1 - a + a / k)
    ours = gradient(distill.distillation_loss(z, z, labels, teacher, kind="soft", alpha=alpha, temperature=1.0)[0], z)
    assert torch.allclose(ours / ours.norm(), official / official.norm())


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="choose hard or soft"):
        distill.distillation_loss(*torch.zeros(2, 1, 2), torch.tensor([0]), torch.zeros(1, 2), kind="warm")


def test_the_command_prints_what_it_works_out(capsys):
    assert run_main(distill) == 0
    results = [float(line.split("= ")[1].split()[0]) for line in capsys.readouterr().out.splitlines() if "= " in line]
    class_term, hard = math.log(4 / 3), math.log(2)
    soft = math.log(2 / 5) / 5 + 4 * math.log(8 / 5) / 5
    assert results == pytest.approx([class_term, hard, (class_term + hard) / 2, soft, 0.9 * class_term + 0.1 * soft,
                                     4 * (math.log(2 / 3) / 3 + 2 * math.log(4 / 3) / 3)], abs=1e-4)


def test_a_mistake_on_the_command_line_is_one_line(capsys):
    assert run_main(distill, "--alpha", 1) == 2
    assert capsys.readouterr().err == "distill.py: unrecognized arguments: --alpha 1\n"
