"""Responses are graded in processes beside the rollouts: host.py forks them, pool.py asks them, step.py waits."""
