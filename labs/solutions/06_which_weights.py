"""Lab 6: the quarter with the largest gradients of the task itself."""

import masks


class Yours(masks.Rule):
    def __init__(self, gradient):
        super().__init__(density=0.25)
        self.gradient = gradient

    def prepare(self, weight, stream):
        return self.gradient.abs() > masks.threshold(self.gradient, 1 - self.density)

    @staticmethod
    def mask(theta, element, state):
        return state[element]
