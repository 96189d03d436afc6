"""Lab 6: in each tensor the hundredth with the largest gradients of the task itself."""

import masks


class Yours(masks.ConstantMask):
    def __init__(self, gradients):
        super().__init__(density=0.01)
        self.gradients = gradients

    def prepare(self, weight, stream):
        size = self.gradients[stream].abs()
        return size > masks.threshold(size, 1 - self.density)
