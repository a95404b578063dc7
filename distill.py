"""The distillation objectives of DeiT, as pure functions of logits.

Section 4 of "Training data-efficient image transformers & distillation through
attention" (https://arxiv.org/abs/2012.12877): a transformer learns from the labels
through its class token and from a convnet through its distillation token. With hard
labels (equation 3) DeiT-Ti reaches 74.5 % top-1 instead of 72.2 %.

For instance, if the distillation head gives (1/2, 1/2) to two classes and the teacher
(1/5, 4/5), the hard term is -log 1/2 = 0.6931 and the soft one, at temperature 1,
1/5 log(2/5) + 4/5 log(8/5) = 0.1927.

Logits are (B, K): B images, K classes. Every function returns scalars, means over images.
"""
import torch.nn.functional as F


def hard_distillation(logits, teacher_labels):
    """Cross-entropy with the teacher's decisions as labels: second term of equation 3.

    `teacher_labels` (B,) is the argmax of the teacher's logits for the very images that
    the student sees: one label per image, even if the image is mixed, and not smoothed.
    """
    return F.cross_entropy(logits, teacher_labels)


def soft_distillation(logits, teacher_logits, temperature):
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)), averaged over images:
    second term of equation 2.

    The official code divides the sum by B K instead of B, so its term is K times smaller
    than the paper's. If a is the alpha given there, alpha = (a / K) / (1 - a + a / K)
    gives the same direction of the gradient here.
    """
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    student = F.log_softmax(logits / temperature, dim=1)
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature**2 * kl


def distillation_loss(class_logits, distillation_logits, targets, teacher_output, *,
                      kind="hard", alpha=0.5, temperature=3.0, label_smoothing=0.0):
    """(1 - alpha) cross_entropy(class head, targets)
    + alpha distillation(distillation head, teacher): equations 2 and 3.

    `targets` are class indices (B,) or probabilities (B, K); they are smoothed here, by
    `label_smoothing`, and nowhere else. `teacher_output` is the teacher's labels (B,) if
    `kind` is "hard" (the paper: alpha 1/2) and its logits (B, K) if it is "soft" (alpha
    0.1, temperature 3). Returns (loss, class term, distillation term), both terms
    unweighted. Raises ValueError for another kind.
    """
    class_term = F.cross_entropy(class_logits, targets, label_smoothing=label_smoothing)

    if kind == "hard":
        distillation_term = hard_distillation(distillation_logits, teacher_output)
    elif kind == "soft":
        distillation_term = soft_distillation(distillation_logits, teacher_output, temperature)
    else:
        raise ValueError(f"unknown kind of distillation {kind!r}: choose hard or soft")

    loss = (1 - alpha) * class_term + alpha * distillation_term
    return loss, class_term, distillation_term
