"""What a long run needs and no paper speaks of: settings, models, data, log, workers, masks."""

import os

# pictures need no backend, and matplotlib refuses a notebook's where its package is missing
os.environ.pop("MPLBACKEND", None)
