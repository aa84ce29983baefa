"""Moves weights between Hugging Face directories and megatron-core's; README, "Moving checkpoints".

.venv/bin/python tools/convert_checkpoint.py hf-to-megatron Qwen/Qwen3-8B /data/qwen3 --tp 8
.venv/bin/python tools/convert_checkpoint.py megatron-to-hf runs/mine@000120 /data/mine
.venv/bin/python tools/convert_checkpoint.py megatron-to-hf runs/mine /data/teacher --weights teacher
"""

import sys

from sdpo_megatron.conversion.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "tools/convert_checkpoint.py"))
