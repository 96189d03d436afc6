"""Lab 8: replay the log; add up all messages."""


def rebuild(patch, log):
    for seed, a in log:
        patch.update(seed, a)


def common(messages):
    total_plus, total_minus, count = (sum(column) for column in zip(*messages, strict=True))
    return total_plus / count, total_minus / count
