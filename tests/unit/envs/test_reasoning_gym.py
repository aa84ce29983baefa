import sys

import pytest

from sdpo_megatron.envs import reasoning_gym
from sdpo_megatron.envs.data.reasoning_gym_entries import made
from sdpo_megatron.envs.reasoning_gym import SYSTEM, ReasoningGym, ReasoningGymOptions
from sdpo_megatron.errors import RunFailed, UserError
from tests.graders import answering

pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")


def build(dataset="chain_sum", **options) -> ReasoningGym:
    return ReasoningGym(
        ReasoningGymOptions(dataset=dataset, **{"train_size": 20, "test_size": 10, **options})
    )


@pytest.fixture
def here(monkeypatch):
    """Makes the entries in this process, which has imported the package already."""

    def entries(options):
        size = options.test_size + options.train_size
        return made(options.dataset, options.config, seed=options.seed * 100_000, size=size)

    monkeypatch.setattr(reasoning_gym, "_entries", entries)


@pytest.fixture(scope="module")
def sums() -> ReasoningGym:
    return build()


def test_a_problem_is_the_generator_s_question(sums):
    problem = sums.train_problems()[0]
    assert problem.messages[0] == {"role": "system", "content": SYSTEM}
    assert problem.messages[1]["content"] == problem.metadata["entry"]["question"]
    assert "arithmetic" in problem.messages[1]["content"]


def test_rewards(sums):
    for problem in sums.test_problems():
        right = sums.grade(problem, answering(f"Sum it.\n<answer>\n{problem.answer}\n</answer>"))
        assert (right.reward, right.feedback, right.metrics) == (1, "", {"score": 1})
        wrong = sums.grade(problem, answering(f"<answer>{problem.answer}1</answer>"))
        assert (wrong.reward, wrong.feedback) == (0, f"The answer {problem.answer}1 is wrong.")
        untagged = sums.grade(problem, answering(problem.answer))
        assert (untagged.reward, untagged.correct_format) == (0, False) and "<answer>" in untagged.feedback
        last = sums.grade(problem, answering(f"<answer>0</answer> No: <answer>{problem.answer}"))
        assert last.reward == 1


def test_without_tags_the_whole_response_is_the_answer(here):
    bare = build(tags=False)
    assert [m["role"] for m in bare.train_problems()[0].messages] == ["user"]
    assert (
        bare.grade(bare.train_problems()[0], answering(f" {bare.train_problems()[0].answer}\n")).reward == 1
    )


# the scorers of fraction_simplification and knights_knaves give a part of 1 to a wrong answer
@pytest.mark.parametrize(
    "dataset", ["fraction_simplification", "knights_knaves", "leg_counting", "word_sorting", "maze"]
)
def test_right_answers_of_some_generators_score_1_and_each_other_s_0(dataset, here):
    env = build(dataset, train_size=8, test_size=1)
    problems = env.train_problems()
    for problem, other in zip(problems, [*problems[1:], problems[0]], strict=True):
        assert env.grade(problem, answering(f"<answer>{problem.answer}</answer>")).reward == 1
        if other.answer != problem.answer:
            assert env.grade(problem, answering(f"<answer>{other.answer}</answer>")).reward == 0


@pytest.mark.parametrize(
    ("dataset", "nonsense"),
    [
        ("game_of_life_halting", "zzz"),  # its scorer takes all but True for False
        ("game_of_life_halting", ""),
        ("complex_arithmetic", "nan"),  # its scorer gives 1
        ("prime_factorization", "zzz"),  # its scorer raises
    ],
)
def test_nonsense_that_scorers_do_not_refuse_scores_0(dataset, nonsense, here):
    env = build(dataset, test_size=1)
    for problem in env.train_problems():
        assert env.grade(problem, answering(f"<answer>{nonsense}</answer>")).reward == 0
        assert env.grade(problem, answering(f"<answer>{problem.answer}</answer>")).reward == 1


def test_no_held_out_question_is_trained_on(here):
    # 1-digit sums of two terms: there are few, so that most are drawn more than once
    env = build(config={"max_terms": 2, "max_digits": 1}, train_size=400, test_size=30)
    train = [p.metadata["entry"]["question"] for p in env.train_problems()]
    test = [p.metadata["entry"]["question"] for p in env.test_problems()]
    assert len(set(train)) == len(train) > 40 and len(set(test)) == len(test) > 20
    assert not set(train) & set(test)


def test_the_seed_says_which_problems_and_a_larger_training_set_keeps_the_held_out_ones(sums):
    def questions(problems):
        return {p.metadata["entry"]["question"] for p in problems}

    held_out = questions(sums.test_problems())
    assert questions(build(train_size=40).test_problems()) == held_out
    other = build(seed=1)
    assert not questions(other.test_problems()) & held_out
    assert not questions(other.train_problems()) & questions(sums.train_problems())


def test_problems_are_the_same_in_every_process(monkeypatch):
    """word_ladder walks through sets, whose order differs from one hash seed to the next."""
    answers = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        answers.append([p.answer for p in build("word_ladder").train_problems()])
    assert answers[0] == answers[1] and all("," in answer for answer in answers[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dataset": "chain"},
            "reasoning-gym has no generator (task.options.dataset) 'chain' among its 106.",
        ),
        (
            {"config": {"min_digit": 1}},
            "chain_sum has no setting (task.options.config) 'min_digit'. There are: ",
        ),
        ({"config": {"seed": 1}}, "seed and sizes are task.options' own"),
        (
            {"config": {"min_digits": 5, "max_digits": 2}},
            "chain_sum refuses task.options.config: max_digits must be >= min_digits.",
        ),
        ({"config": {"min_digits": "a"}}, "chain_sum refuses task.options.config: '>' not supported"),
    ],
)
def test_what_it_cannot_make_is_one_line(options, message):
    said = made(**{"dataset": "chain_sum", "config": {}, "seed": 0, "size": 2, **options})
    assert isinstance(said, str) and message in said and "\n" not in said


def test_a_package_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    said = made("chain_sum", {}, seed=0, size=2)
    assert isinstance(said, str) and "pip install reasoning-gym==0.1.25" in said and "\n" not in said


def test_a_process_that_ends_without_problems_ends_the_run(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunFailed, match="could not make problems of chain_sum: exit code 1"):
        build()


def test_what_it_cannot_make_stops_the_run():
    with pytest.raises(UserError, match="has no generator .*'chain_sums'.* The nearest are: chain_sum"):
        build("chain_sums")
