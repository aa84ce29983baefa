"""Whether a machine is fit to train: checks that each say what is, and what to do about it."""
