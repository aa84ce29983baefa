"""python -m sdpo_megatron.conversion: what tools/convert_checkpoint.py does, for other commands to call."""

import sys

from sdpo_megatron.conversion.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
