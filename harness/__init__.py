"""What a long run needs and no paper speaks of: settings, loading, the log, workers, bench."""
