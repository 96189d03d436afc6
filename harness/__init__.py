"""What a long run needs and no paper speaks of: settings, models, data, log, workers, masks."""

import os
import sys


def _one_line(kind, error, trace):
    """Ctrl-C while the modules are imported, which takes seconds, is no fault to be traced."""
    if kind is KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _one_line

# pictures need no backend, and matplotlib refuses a notebook's where its package is missing
os.environ.pop("MPLBACKEND", None)
