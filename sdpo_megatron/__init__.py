"""Self-distillation policy optimisation (SDPO, arXiv 2601.20802) on megatron-core and SGLang.

Start reading at `train.py`; README.md has a map of the files. Importing the package imports nothing else.
"""
