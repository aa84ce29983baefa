from setuptools import find_packages, setup

setup(
    name="sdpo_megatron",
    version="0.1.0",
    description="Self-distillation policy optimisation of language models with megatron-core and SGLang",
    python_requires=">=3.11",
    packages=find_packages(include=["sdpo_megatron", "sdpo_megatron.*"]),
    package_data={"sdpo_megatron": ["py.typed"], "sdpo_megatron.report": ["*.html", "*.css", "*.js"]},
    install_requires=[
        "torch>=2.13,<2.14",
        # The CPU build of torch does not bring it; a CUDA build pins its own.
        "triton>=3.7,<3.10; platform_system == 'Linux'",
        # Releases from 0.17 on need Python 3.12; those from 0.18 on import triton, which they do not declare.
        "megatron-core==0.16.1; python_version < '3.12'",
        "megatron-core>=0.16.1,<0.20; python_version >= '3.12'",
        "transformers==5.23.0",
        "huggingface_hub>=2.4,<3",
        # what huggingface_hub's connections raise
        "httpx2>=2,<3",
        "safetensors>=0.8,<1",
        "gguf>=0.19,<0.20",
        "numpy>=2.4,<3",
        "pydantic>=2.14,<3",
        "PyYAML>=6.0.3,<7",
        "httpx>=0.28,<0.29",
        "msgspec>=0.20,<0.22",
        "rich>=15,<16",
        "jinja2>=3.1,<4",
        # the curves of tools/summarize_runs.py
        "matplotlib>=3.10,<4",
        # files of problems in parquet
        "pyarrow>=25,<26",
        "platformdirs>=4.14,<5",
        "psutil>=7.2,<8",
        # Another release may judge otherwise, and the parser's runtime belongs to its grammar.
        "math-verify==0.9.0",
        "antlr4-python3-runtime==4.13.2",
        # what runs programs of the model where user namespaces are forbidden
        "sandlock==0.9.0; platform_system == 'Linux'",
    ],
    extras_require={
        # One of its requirements has no wheel: it needs a C compiler and Python's headers. The name has no - and no
        # _, which pips of different age spell differently.
        "gym": ["reasoning-gym==0.1.25"],
        "log": ["tensorboard>=2.21,<3", "wandb>=0.31,<0.32"],
        # submits jobs
        "slurm": ["submitit>=1.5,<2"],
        "dev": [
            "submitit>=1.5,<2",
            "accelerate>=1.0",
            "pytest>=9.2,<10",
            "pytest-timeout>=2.4,<3",
            "pytest-xdist>=3.8,<4",
            # drives the Chromium that .ci/run installs
            "playwright==1.65.2",
            "ruff==0.17.6",
            "pyright[nodejs]==1.1.414",
        ],
    },
)
