"""Bad input is one line: the value, what is allowed, the fix. Exit code 2, no traceback.

UserError        whoever runs a command, or calls a function, gave what cannot be: said at once
AssertionError   what only a mistake in the calling code can bring about: a traceback is wanted
"""

import sys

import torch


class UserError(ValueError):
    """One line that names the value, what is allowed and the fix."""


def fail(program: str, error: Exception, memory: str = "a smaller --batch-size or --max-length"):
    """Print the line; the exit code of bad input. `memory`: what takes less of it."""
    why = (str(error) or type(error).__name__).splitlines()[0]
    hint = f"; try {memory}" * isinstance(error, torch.OutOfMemoryError)
    print(f"{program}: error: {why}{hint}", file=sys.stderr)
    return 2
