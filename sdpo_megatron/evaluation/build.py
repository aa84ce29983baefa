"""From settings to suites, and to what their rulers have in common."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

from sdpo_megatron.chat import Chat
from sdpo_megatron.config import EvalSettings, GradingSettings, ModelSettings, RolloutSettings, TaskSettings
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.envs.grading.pool import GradingPool
from sdpo_megatron.envs.grading.thread import BackgroundThread
from sdpo_megatron.errors import ServerLost, ServerRefused
from sdpo_megatron.evaluation import ruler
from sdpo_megatron.evaluation.suite import Conditions, Sampling, Suite
from sdpo_megatron.problems import canonical, evaluated
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.run_dir.evaluations_file import HELD_OUT


def build_suites(
    task: TaskSettings,
    env: Environment,
    grader: GradingPool,
    suite_envs: Mapping[str, Environment],
    chat: Chat,
    *,
    settings: EvalSettings,
    rollout: RolloutSettings,
    model: ModelSettings,
    grading: GradingSettings,
) -> list[Suite]:
    """Returns the task's held-out problems and the suites of `settings`, whose environments `suite_envs` has by name.
    `grader` grades for the task; the suites get graders of their own. None is started."""

    def sampling(of: EvalSettings) -> Sampling:
        return Sampling(
            samples=of.samples,
            temperature=of.temperature,
            top_p=of.top_p,
            max_tokens=of.max_tokens or rollout.max_tokens,
            max_context_length=model.max_context_length,
        )

    suites = [
        Suite(
            name=HELD_OUT,
            env_name=task.env,
            env=env,
            grader=grader,
            problems=list(env.test_problems())[: settings.problems],
            exact_problems=canonical(env.test_problems())[: settings.exact_problems],
            sampling=sampling(settings),
            chat=chat,
        )
    ]
    for name, given in settings.suites.items():
        own, its_env = settings.of_suite(given), suite_envs[name]
        pool = GradingPool(given.task, suite_envs[name], grading)
        suites.append(
            Suite(
                name=name,
                env_name=given.task.env,
                env=its_env,
                grader=pool,
                problems=evaluated(its_env.test_problems(), its_env.train_problems(), own.problems),
                sampling=sampling(own),
                chat=chat.with_system_prompt(given.system_prompt),
            )
        )
    return [suite for suite in suites if suite.problems or suite.exact_problems]


def common_conditions(
    clients: list[Client], model_directory: Path, arithmetic: str, success_threshold: float
) -> Callable[[], Conditions]:
    """Returns what makes the conditions of an evaluation, once servers are there to be asked for their version. The
    model's weights are hashed meanwhile."""
    base_model: Future[str] = Future()
    BackgroundThread("hash of the weights").run(lambda: ruler.base_model(model_directory), base_model)

    def conditions() -> Conditions:
        versions = sorted({server_version(client) for client in clients})
        return Conditions(
            base_model=base_model,
            server=f"SGLang {' and '.join(versions)}, {arithmetic}",
            success_threshold=success_threshold,
        )

    return conditions


def server_version(client: Client) -> str:
    """Returns the version that a server reports, "unknown" where it reports none or does not answer."""
    try:
        return str(client.server_info().get("version", "unknown"))
    except (ServerLost, ServerRefused):
        return "unknown"
