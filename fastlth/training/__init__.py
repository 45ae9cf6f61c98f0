"""One training of one net on one mask: schedule, step, evaluation, and the loop that drives them."""
