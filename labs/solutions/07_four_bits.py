"""Lab 7: the values leave, a 0 stands in their places, and the rest goes into four bits."""

import quant


def split(weight, places):
    dense = weight.clone()
    dense[places] = 0
    return *quant.nf4_encode(dense), weight[places]


def read(codes, scales, places, values):
    weight = quant.nf4_decode(codes, scales)
    return weight.index_put((places,), values)
