"""Lab 3: small is a matter of |θ|; eight weights to a byte."""

import torch


def get_mask(theta, h):
    return theta.abs() <= h


def pack(mask):
    bits = mask.view(-1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
    return bits.sum(1).to(torch.uint8)
