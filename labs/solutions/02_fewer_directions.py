"""Lab 2: the rate of Theorem 1; the gain of a step is c / (k + 2)."""

L = 1.0


def rate(d_hat):
    return 1 / (4 * (d_hat + 4) * L)


def gain(k, c, d):
    return c / (k + 2) * (d + 2)
