"""The distillation objectives of DeiT, as pure functions of logits.

Section 4 of "Training data-efficient image transformers & distillation through attention"
(https://arxiv.org/abs/2012.12877): a transformer learns from the labels through its class token and from
a convnet through its distillation token. With hard labels (equation 3) DeiT-Ti reaches 74.5 % top-1
instead of 72.2 %.

    python distill.py         works the objectives through on an example small enough for a pencil

Every function takes logits (B, K), B images and K classes, and returns scalar tensors: means over images.
"""
import argparse

import torch
import torch.nn.functional as F


def hard_distillation(logits, teacher_logits):
    """Cross-entropy with the teacher's decision as the label: second term of equation 3.

    The label is argmax(teacher_logits), one for each image even where two were mixed, and not smoothed.
    """
    return F.cross_entropy(logits, teacher_logits.argmax(dim=1))


def soft_distillation(logits, teacher_logits, temperature):
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)), averaged over images:
    second term of equation 2.

    The official code divides the sum by B K instead of B, so its term is K times smaller than
    the paper's. Writing a for its alpha, the same direction of the gradient comes from alpha
    = (a / K) / (1 - a + a / K) here.
    """
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    student = F.log_softmax(logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def distillation_loss(class_logits, distillation_logits, targets, teacher_logits, *, kind="hard", alpha=0.5,
                      temperature=3.0, label_smoothing=0.0):
    """(1 - alpha) cross_entropy(class head, targets) + alpha distillation(distillation head, teacher).

    `targets` are class indices (B,) or probabilities (B, K), smoothed here by `label_smoothing` and
    nowhere else; the teacher's labels are not smoothed. The paper uses alpha 1/2 for kind "hard" (equation
    3), and alpha 0.1 with temperature 3 for kind "soft" (equation 2). Returns (loss, class term,
    distillation term), the terms unweighted. Raises ValueError for another kind.
    """
    class_term = F.cross_entropy(class_logits, targets, label_smoothing=label_smoothing)
    if kind == "hard":
        distillation_term = hard_distillation(distillation_logits, teacher_logits)
    elif kind == "soft":
        distillation_term = soft_distillation(distillation_logits, teacher_logits, temperature)
    else:
        raise ValueError(f"unknown kind of distillation {kind!r}: choose hard or soft")
    return (1 - alpha) * class_term + alpha * distillation_term, class_term, distillation_term


def main():
    parser = argparse.ArgumentParser(description="Works the objectives through on one image and two classes.")
    parser.error = lambda message: parser.exit(2, f"distill.py: {message}\n")
    parser.parse_args()
    # with two classes and logits (log a, log b) the softmax is (a, b) / (a + b): all numbers are fractions
    class_logits = torch.tensor([[3.0, 1.0]]).log()
    distillation_logits = torch.tensor([[1.0, 1.0]]).log()
    teacher_logits = torch.tensor([[1.0, 4.0]]).log()
    label = torch.tensor([0])
    print("one image, two classes, label 0; softmax of the class head (3/4, 1/4), of the distillation head\n"
          "(1/2, 1/2), of the teacher (1/5, 4/5), which says class 1\n")

    def row(name, work, value, source=""):
        print(f"{name:<21}{work:<46}= {value:.4f}  {source}".rstrip())

    loss, class_term, hard = distillation_loss(class_logits, distillation_logits, label, teacher_logits)
    row("class term", "-log 3/4", class_term)
    row("hard distillation", "-log 1/2", hard)
    row("hard loss", f"1/2 {class_term:.4f} + 1/2 {hard:.4f}", loss, "equation 3")
    print()
    loss, class_term, soft = distillation_loss(class_logits, distillation_logits, label, teacher_logits,
                                               kind="soft", alpha=0.1, temperature=1.0)
    row("soft distillation", "1/5 log (1/5)/(1/2) + 4/5 log (4/5)/(1/2)", soft)
    row("soft loss", f"9/10 {class_term:.4f} + 1/10 {soft:.4f}", loss, "equation 2, lambda 0.1, tau 1")
    print("with tau 2, softmax of half the logits: teacher (1/3, 2/3)")
    row("soft distillation", "4 (1/3 log 2/3 + 2/3 log 4/3)",
        soft_distillation(distillation_logits, teacher_logits, 2.0))


if __name__ == "__main__":
    main()
