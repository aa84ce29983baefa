"""Programs in answers: taken out, tested in a sandbox, and told what went wrong."""
