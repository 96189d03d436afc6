"""Lab 5: two new tensors, and an ε above the noise of bf16."""

EPS_BF16 = 2e-2


def probe(theta, loss, z, eps):
    loss_plus, loss_minus = loss(theta + eps * z), loss(theta - eps * z)
    return loss_plus, loss_minus
