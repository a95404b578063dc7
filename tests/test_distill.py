"""The objectives against hand calculation."""
import math

import pytest
import torch
import torch.nn.functional as F

import distill


def logits(*probabilities):
    return torch.tensor(probabilities).log()


def test_hard_distillation_is_cross_entropy_with_the_teachers_labels():
    student = logits([0.2, 0.8], [0.7, 0.3])
    hard = distill.hard_distillation(student, torch.tensor([0, 1]))
    assert hard.item() == pytest.approx((-math.log(0.2) - math.log(0.3)) / 2)


def test_soft_distillation_is_the_papers_equation():
    student, teacher = logits([0.5, 0.5], [0.25, 0.75]), logits([0.2, 0.8], [0.25, 0.75])
    # at temperature 2 the first teacher's softmax is (1/3, 2/3); the second image's term is 0
    kl = math.log((1 / 3) / 0.5) / 3 + 2 * math.log((2 / 3) / 0.5) / 3
    assert distill.soft_distillation(student, teacher, 2.0).item() == pytest.approx(4 * kl / 2)


def test_the_loss_weighs_a_mixed_target_and_one_teacher_label_per_image():
    heads = logits([0.75, 0.25]), logits([0.9, 0.1])
    loss, class_term, distillation_term = distill.distillation_loss(
        *heads, torch.tensor([[0.6, 0.4]]), torch.tensor([1]), alpha=0.3)
    assert class_term.item() == pytest.approx(-0.6 * math.log(0.75) - 0.4 * math.log(0.25))
    assert distillation_term.item() == pytest.approx(-math.log(0.1))
    assert loss.item() == pytest.approx(0.7 * class_term.item() + 0.3 * distillation_term.item())


def test_only_the_labels_are_smoothed():
    heads = logits([0.75, 0.25]), logits([0.9, 0.1])
    _, class_term, distillation_term = distill.distillation_loss(
        *heads, torch.tensor([0]), torch.tensor([1]), label_smoothing=0.1)
    assert class_term.item() == pytest.approx(-0.95 * math.log(0.75) - 0.05 * math.log(0.25))
    assert distillation_term.item() == pytest.approx(-math.log(0.1))


def test_the_official_codes_soft_loss_comes_from_the_alpha_in_the_docstring():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 8, dtype=torch.float64)
    student.requires_grad_()
    labels, k, a = torch.tensor([1, 4, 7]), 8, 0.5

    kl = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum()
    official = (1 - a) * F.cross_entropy(student, labels) + a * kl / student.numel()
    alpha = (a / k) / (1 - a + a / k)
    ours, _, _ = distill.distillation_loss(student, student, labels, teacher, kind="soft",
                                           alpha=alpha, temperature=1.0)

    official, = torch.autograd.grad(official, student)
    ours, = torch.autograd.grad(ours, student)
    assert torch.allclose(ours / ours.norm(), official / official.norm())


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="choose hard or soft"):
        distill.distillation_loss(*torch.zeros(3, 1, 2), torch.zeros(1, 2), kind="warm")


def test_the_example_in_the_docstring_is_right():
    heads = logits([0.5, 0.5]), logits([0.5, 0.5])
    teacher = logits([0.2, 0.8])
    _, _, hard = distill.distillation_loss(*heads, torch.tensor([0]), teacher.argmax(dim=1))
    soft = distill.soft_distillation(heads[1], teacher, 1.0)
    assert f"= {hard.item():.4f}" in distill.__doc__ and f"= {soft.item():.4f}" in distill.__doc__
