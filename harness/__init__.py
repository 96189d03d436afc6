"""What a long run needs beside the papers: settings, models, data, log, workers, bench."""

import os

# pictures need no backend, and matplotlib refuses a notebook's where its package is missing
os.environ.pop("MPLBACKEND", None)
