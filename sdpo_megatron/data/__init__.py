"""Published sets of problems, and other people's files, turned into files that an environment reads."""
