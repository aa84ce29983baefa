"""Where SGLang keeps what it compiles, by its own words: a job places all of it."""

import json
import os
import subprocess
from pathlib import Path

from sdpo_megatron.cluster.setup import cache_variables

ROOT = Path(__file__).parents[2]
ASK = """
import importlib.util, json, sys
place = importlib.util.find_spec("sglang").submodule_search_locations[0] + "/srt/environ.py"
spec = importlib.util.spec_from_file_location("environ", place)
environ = importlib.util.module_from_spec(spec)
spec.loader.exec_module(environ)
own = ("SGLANG_CACHE_DIR", "SGLANG_DG_CACHE_DIR", "SGLANG_CUTE_AOT_CACHE_DIR", "SGLANG_JIT_CACHE_DIR")
found = {name: getattr(environ.envs, name).get() for name in own}
print(json.dumps([found, environ.third_party_cache_defaults()]))
"""


def test_all_that_sglang_compiles_lies_below_the_jobs_scratch(tmp_path: Path):
    placed = cache_variables(str(tmp_path))
    environment = {"PATH": os.environ["PATH"], "HOME": "/home-of-nobody", **placed}
    python = str(ROOT / ".venv-sglang/bin/python")
    said = subprocess.run([python, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
    own, of_others = json.loads(said.stdout)
    assert len(own) == 4 and all(path.startswith(f"{tmp_path}/") for path in own.values()), own
    # those that it would set itself
    assert len(of_others) >= 5 and of_others.keys() <= placed.keys()
