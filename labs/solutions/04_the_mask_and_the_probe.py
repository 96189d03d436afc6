"""Lab 4: one mask, of the weights that no probe has touched."""

from masks import get_mask


def probe(theta, h, z, eps):
    step = eps * get_mask(theta, h) * z
    plus = theta + step
    minus = plus - 2 * step
    return plus, minus, minus + step
