"""Answers found in texts and judged: texts in, grades out. No data, no settings, no processes."""
