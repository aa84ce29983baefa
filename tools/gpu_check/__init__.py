"""The parts of `tools/check_gpu.py`, a module each. `run(machine)` yields a part's rows one by one."""
