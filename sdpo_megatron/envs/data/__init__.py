"""Files of problems."""
