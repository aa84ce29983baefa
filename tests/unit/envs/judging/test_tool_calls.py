import json
import time

import pytest

from sdpo_megatron.envs.judging.tool_calls import (
    ToolCall,
    Unreadable,
    gold_calls,
    judge,
    judge_as_official,
    written_calls,
)

# Right answers as ToolUse's test file has them: 4046, 4056, 4058, 4055, 4072, 4079, 4087, 4106 (its first two calls).
GOLD = [
    [("getRandomAxolotlImage", "{}")],
    [("searchAnime", """{"filter":"genre = 'Mystery' AND release_year = 2020 AND user_rating >= 4"}""")],
    [
        (
            "reportAbusiveIP",
            '{"ip": "192.168.1.100", "categories": ["brute-force", "DDoS"], "comment": "Failed logins."}',
        )
    ],
    [
        ("searchAxolotlImages", '{"color": "wild", "gender": "male", "size": "medium", "page": 1}'),
        ("searchAxolotlImages", '{"color": "wild", "gender": "female", "size": "medium", "page": 1}'),
    ],
    [
        (
            "updateUserProfile",
            '{"userId": "g-user123", "profileData": {"profilePictureUrl": "https://example.com/new_image.jpg"}}',
        )
    ],
    [
        ("getUserProfile", '{"userId": "g-user123", "accessToken": "abcd1234"}'),
        ("[Optional]updateUserProfile", '{"userId": "g-user123", "profileData": {"profilePicture": "x"}}'),
    ],
    [
        ("convertCurrency", '{"from": "EUR", "to": "GBP", "amount": 5000}'),
        ("setPriceAlert", '{"currency_pair": "EUR/GBP", "price": 0.9, "direction": "above"}'),
    ],
    [
        ("getDetails", '{"Question":"Can you tell me soureId and dashboardId?"}'),
        ("deleteDataSource", '{"sourceId": 12345}'),
    ],
]


def answer_of(calls) -> str:
    return json.dumps([{"Action": name, "Action_Input": given} for name, given in calls])


def written(calls) -> str:
    steps = (f"Thought: I need {name}.\nAction: {name}\nAction Input: {given}" for name, given in calls)
    return "\n".join(steps)


@pytest.mark.parametrize("calls", GOLD)
def test_the_right_calls_score_1_in_any_order_and_others_0(calls):
    gold = gold_calls(answer_of(calls))
    assert judge(written(calls), gold).reward == 1
    assert judge(written(calls[::-1]), gold).reward == 1
    assert judge(written(calls), gold).feedback == ""
    for number, (name, given) in enumerate(calls):
        arguments = json.loads(given)
        changed = [("other", given), (name, json.dumps({**arguments, "more": 1}))]
        for key in arguments:
            changed.append((name, json.dumps({k: v for k, v in arguments.items() if k != key})))
            changed.append((name, json.dumps({**arguments, key: "else"})))
        for call in changed:
            grade = judge(written([*calls[:number], call, *calls[number + 1 :]]), gold)
            assert (grade.reward, grade.correct_format) == (0, True) and grade.feedback, call
        assert judge(written(calls[:number] + calls[number + 1 :]), gold).reward == 0
        assert judge(written([*calls, calls[number]]), gold).reward == 0


@pytest.mark.parametrize(
    ("written_arguments", "reward"),
    [
        ('{"n": 1, "s": "a", "b": true, "o": {"x": [1, {"y": null}]}}', 1),
        ('{"o": {"x": [1, {"y": null}]}, "b": true, "s": "a", "n": 1}', 1),
        ('{"n": 1.0, "s": "\\u0061", "b": true, "o": {"x": [1e0, {"y": null}]}}', 1),
        ('{"n": "1", "s": "a", "b": true, "o": {"x": [1, {"y": null}]}}', 0),
        ('{"n": true, "s": "a", "b": true, "o": {"x": [1, {"y": null}]}}', 0),
        ('{"n": 1, "s": "a", "b": 1, "o": {"x": [1, {"y": null}]}}', 0),
        ('{"n": 1, "s": "A", "b": true, "o": {"x": [1, {"y": null}]}}', 0),
        ('{"n": 1, "s": "a", "b": true, "o": {"x": [{"y": null}, 1]}}', 0),
        ('{"n": 1, "s": "a", "b": true, "o": {"x": [1, {"y": 0}]}}', 0),
        ('{"n": 1, "s": "a", "b": true, "o": {"x": [1, {}]}}', 0),
        ('{"n": 1, "s": "a", "b": true, "o": {"x": [true, {"y": null}]}}', 0),
    ],
)
def test_arguments_are_compared_as_values(written_arguments, reward):
    gold = [ToolCall("f", {"n": 1, "s": "a", "b": True, "o": {"x": [1, {"y": None}]}})]
    grade = judge(f"Action: f\nAction Input: {written_arguments}", gold)
    assert (grade.reward, grade.correct_format) == (reward, True)


@pytest.mark.parametrize(
    "text",
    [
        'Action: f\nAction Input: {"a": {"b": 1}}',
        'Thought: An Action: word.\nAction: f\nAction Input: {"a": {"b": 1}}\nObservation: done\nDone.',
        'Action: f\n\nAction Input:\n{\n  "a": {\n    "b": 1\n  }\n}',
        'Action: f\r\nAction Input: {"a": {"b": 1}}\r\n',
        'Action: `f`\nAction Input: `{"a": {"b": 1}}`',
        '**Action:** f\n**Action Input:** {"a": {"b": 1}}',
        '**Action**: f\n**Action Input**: {"a": {"b": 1}}',
        '- Action: "f"\n- Action Input: {"a": {"b": 1}}',
        'Action: f\nAction Input:\n```json\n{"a": {"b": 1}}\n```',
        'Action:f\nAction Input:{"a":{"b":1}}.',
    ],
)
def test_the_ways_in_which_models_write_a_call(text):
    assert written_calls(text) == [ToolCall("f", {"a": {"b": 1}})]


def test_a_call_inside_an_argument_is_none():
    text = 'Action: f\nAction Input: {"a": "\\nAction: g\\nAction Input: {}"}\nAction: h\nAction Input: {}'
    assert [call.name for call in written_calls(text)] == ["f", "h"]
    text = 'Action: f\nAction Input: {"a": [1,\n"Action: g"]}'
    assert written_calls(text) == [ToolCall("f", {"a": [1, "Action: g"]})]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "calls no tool"),
        ("I need no tool.", "calls no tool"),
        ("Action Input: {}", "calls no tool"),
        ("Action:\nAction Input: {}", "names no tool"),
        ("Action: f", "Action f has no Action Input"),
        ("Action: f\nThought: hm\nAction Input: {}", "Action f has no Action Input"),
        ("Action: f\nAction: f\nAction Input: {}\nAction Input: {}", "Action f has no Action Input"),
        ("Action: f\nAction Input:", "of f is not a JSON object"),
        ("Action: f\nAction Input: none", "of f is not a JSON object"),
        ("Action: f\nAction Input: [1]", "of f is not a JSON object"),
        ("Action: f\nAction Input: {'a': 1}", "of f is not a JSON object"),
        ('Action: f\nAction Input: {"a": 1', "of f is not a JSON object"),
        ('Action: f\nAction Input: {"a": NaN}', "of f is not a JSON object"),
        ('Action: f\nAction Input: {"a": ' + "9" * 5000 + "}", "of f is not a JSON object"),
        ('Action: f\nAction Input: {"a": ' + "[" * 100_000, "of f is not a JSON object"),
        ("Action: " + "f" * 5000, "f…"),
    ],
)
def test_what_is_no_call_scores_0_and_says_why(text, reason):
    grade = judge(text, [ToolCall("f", {})])
    assert (grade.reward, grade.correct_format) == (0, False)
    assert reason in grade.feedback and len(grade.feedback) < 200


@pytest.mark.parametrize(
    ("calls", "feedback"),
    [
        ([("g", "{}")], "The call of g is not among the right ones, or is one too many."),
        ([("f", '{"a": "secret"}')], "A call is missing."),
        ([("f", '{"a": "secret"}')] * 3, "The call of f is not among the right ones, or is one too many."),
        ([("f", '{"b": 1}'), ("f", '{"b": "hidden"}')], "The call of f has other arguments than it needs."),
        (
            [("f", '{"a": 1}'), ("f", '{"b": "hidden"}')],
            "The call of f has an argument whose value is wrong.",
        ),
    ],
)
def test_the_feedback_says_what_is_wrong_and_not_what_is_right(calls, feedback):
    gold = [ToolCall("f", {"a": "secret"}), ToolCall("f", {"b": "hidden"})]
    assert judge(written(calls), gold).feedback == feedback


@pytest.mark.parametrize("calls", GOLD)
def test_the_official_grader_knows_no_nested_arguments(calls):
    gold = gold_calls(answer_of(calls))
    nested = any(isinstance(v, dict) for call in gold for v in call.arguments.values())
    assert judge_as_official(written(calls), gold).reward == (0 if nested else 1)


@pytest.mark.parametrize(
    ("text", "reward", "correct_format"),
    [
        ('Action: f\nAction Input: {"a": 1}\nAction: g\nAction Input: {"b": 2}', 1, True),
        # whose argument is whose does not count, nor that the input follows its action
        ('Action: f\nAction Input: {"b": 2}\nAction: g\nAction Input: {"a": 1}', 1, True),
        ('Action: g\nAction: f\nAction Input: {"a": 1, "b": 2}', 1, True),
        ('Action Input: {"a": 1, "b": 2} Action: f Action: g', 1, False),
        ('Action: f(x)\nAction Input: {"a": true}\nAction: g\nAction Input: {"b": 2.0}', 1, True),
        ('Action: f\nAction Input: {"a": 0}\nAction: g\nAction Input: {"a": 1, "b": 2}', 1, True),
        ('Action: f\nAction Input: {"a": 1, "b": 2}\nAction: g\nAction Input: {"c": }', 1, True),
        ('Action: f\nAction Input: {"a": 1, "b": 2}\nAction: g\nAction Input: {"c": {}}', 1, True),
        ('Action: f\nAction Input: {"a": 1, "b": 2}', 0, True),
        ('Action: f\nAction Input: {"a": 1, "b": "2"}\nAction: g', 0, True),
        ("f g", 0, False),
    ],
)
def test_the_official_grader(text, reward, correct_format):
    """Each value is what the published grader returned for this text."""
    grade = judge_as_official(text, [ToolCall("f", {"a": 1}), ToolCall("g", {"b": 2})])
    assert (grade.reward, grade.correct_format) == (reward, correct_format)
    assert bool(grade.feedback) == (reward == 0)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("getUser", "not JSON"),
        ("{}", "not a JSON list of at least one call"),
        ("[]", "not a JSON list of at least one call"),
        ('[{"Action": "f"}]', "Call 1 of the answer is not an object of Action and Action_Input"),
        ('[{"Action": 3, "Action_Input": "{}"}]', "Action of call 1 of the answer is not a name"),
        ('[{"Action": "f", "Action_Input": "{"}]', "Action_Input of call 1 of the answer is not JSON"),
        (
            '[{"Action": "f", "Action_Input": "3"}]',
            "Action_Input of call 1 of the answer is not a JSON object",
        ),
    ],
)
def test_an_answer_that_is_no_list_of_calls_is_refused(answer, reason):
    with pytest.raises(Unreadable, match=reason):
        gold_calls(answer)


def test_an_answer_may_hold_its_arguments_as_an_object():
    assert gold_calls('[{"Action": "f", "Action_Input": {"a": 1}}]') == [ToolCall("f", {"a": 1})]


@pytest.mark.parametrize(
    "text",
    [
        "Action: f\nAction Input: {}\n" * 3000,
        "Action: f\nAction Input: {" * 3000,
        "Action: " * 10_000,
        "Action: f" + "\n" * 50_000,
        "#" * 50_000,
    ],
)
def test_no_text_takes_long(text):
    before = time.process_time()
    judge(text, [ToolCall("f", {})])
    judge_as_official(text, [ToolCall("f", {})])
    assert time.process_time() - before < 10
