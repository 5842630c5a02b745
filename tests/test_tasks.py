"""Prompts and rewards."""

import itertools
import json
import re

import pytest

from nvfp4_qat.errors import UserError
from nvfp4_qat.models import tiny_tokenizer
from nvfp4_qat.nouns import EVALUATION, TRAINING
from nvfp4_qat.tasks import (
    Chain,
    Grade,
    MathFile,
    OneSentence,
    Problem,
    SortDigits,
    encode_prompt,
    encode_prompts,
    grade_math,
    make_task,
    normalize_answer,
)


@pytest.mark.parametrize("task", [SortDigits(), Chain(), OneSentence()])
def test_draws_follow_from_their_key_alone(task):
    first = task.problems(5, "0/3/0")
    task.problems(7, "something else")
    assert task.problems(5, "0/3/0") == first
    assert task.problems(5, "0/4/0") != first


def prompts(problems):
    return {str(problem.prompt) for problem in problems}


@pytest.mark.parametrize("task", [SortDigits(), Chain(), OneSentence()])
def test_evaluations_ask_no_problem_twice(task):
    asked = task.evaluation(128)
    assert len(prompts(asked)) == len(asked) == 128
    assert task.evaluation(128) == asked


@pytest.mark.parametrize(
    ("task", "there"), [(SortDigits(1), 10), (Chain(operands=1, largest=20), 20), (OneSentence(), len(EVALUATION))]
)
def test_an_evaluation_asks_no_more_than_there_is(task, there):
    assert len(prompts(task.evaluation(1000))) == len(task.evaluation(1000)) == there


def test_words_for_evaluations_are_not_trained_on():
    assert len(TRAINING) >= 400 and len(EVALUATION) >= 128
    assert len({*TRAINING, *EVALUATION}) == len(TRAINING) + len(EVALUATION)  # no word twice
    assert all(re.fullmatch("[a-z]+", word) for word in (*TRAINING, *EVALUATION))
    trained = [problem.answer for key in range(200) for problem in OneSentence().problems(32, f"0/{key}/0")]
    assert set(trained) == set(TRAINING)
    assert len(prompts(OneSentence().problems(32, "k"))) == 32  # groups of a step are of different words
    asked = OneSentence().evaluation(len(EVALUATION))
    assert {problem.answer for problem in asked} == set(EVALUATION)


def test_chains_are_so_many_that_evaluations_have_none_that_were_trained_on():
    trained = prompts(problem for step in range(200) for problem in Chain().problems(256, f"warmup/0/{step}"))
    assert len(trained) == 200 * 256 and not trained & prompts(Chain().evaluation(256))
    assert Chain().largest ** Chain().operands > 9e17


def test_sorting():
    task = SortDigits(digits=5)
    (problem,) = task.problems(1, "k")
    assert problem.prompt.endswith(">")
    assert problem.answer == "".join(sorted(problem.prompt[:-1]))
    assert task.grade(Problem("52914>", "12459"), "12459") == Grade(1.0, True, "12459")
    assert task.grade(Problem("52914>", "12459"), "12495").score == -1.0
    assert task.grade(Problem("52914>", "12459"), "124591").correct is False


def test_chains():
    task = Chain(operands=5, largest=99)
    for problem in task.problems(200, "k"):
        numbers = re.findall(r"[+-]?\d+", problem.prompt.removesuffix("="))
        totals = list(itertools.accumulate(map(int, numbers)))
        assert len(numbers) == 5 and min(totals) >= 0
        steps = zip(numbers[1:], totals[1:], strict=True)
        assert problem.answer == numbers[0] + "".join(f"{number}={total}" for number, total in steps)
        assert task.grade(problem, problem.answer).correct
        assert task.grade(problem, f"1=2={totals[-1]}").correct  # the way there is not graded
        assert not task.grade(problem, problem.answer + "=").correct
        assert not task.grade(problem, f"{problem.answer}0").correct
    assert sum("-" in p.prompt for p in task.problems(50, "k")) > 25


def test_the_answer_to_a_chain_is_not_too_long():
    task = Chain()
    longest = max(len(problem.answer) for problem in task.problems(2000, "k")) + 1  # with the token that ends it
    assert longest <= task.max_new_tokens - task.overlong_buffer


def test_prompts_are_encoded_together_as_alone():
    tokenizer = tiny_tokenizer()
    problems = Chain().problems(5, "k")
    assert encode_prompts(tokenizer, problems) == [encode_prompt(tokenizer, problem) for problem in problems]


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("The dog sleeps in the sun.", True),
        (" A Dog! ", True),
        ("The dogs sleep in the sun.", False),
        ("The dog sleeps. It snores.", False),
        ("The dog sleeps in the sun", False),
        ("The dog sleeps\nin the sun.", False),
        ("The dog " + "very " * 15 + "fast.", False),
        ("", False),
    ],
)
def test_one_sentence(response, correct):
    grade = OneSentence().grade(Problem("", "dog"), response)
    assert grade.correct is correct
    assert grade.score == (1.0 if correct else -1.0)


def test_one_sentence_prompts_name_the_word():
    for problem in OneSentence().problems(20, "k"):
        assert f'"{problem.answer}"' in problem.prompt[0]["content"]


@pytest.mark.parametrize(
    ("response", "truth", "correct"),
    [
        ("So 2 + 2.\nAnswer: 4", "4", True),
        ("answer :  4.", "4", True),
        ("Answer: 3\nAnswer: 4", "4", True),
        ("Answer: 4\nAnswer: 3", "4", False),
        ("The answer is 4", "4", False),
        ("Answer: x = 4", "4", True),
        ("Answer: $\\boxed{4}$", "4", True),
        ("Answer: \\boxed{\\frac{1}{2}}", "\\frac12", True),
        ("Answer: 1,234", "1234", True),
        ("Answer: (1,2)", "(1,2)", True),
        ("Answer: (1,2)", "12", False),
        ("Answer: 4 \\text{ cm}", "4", True),
        ("Answer: 4 degrees", "4^\\circ", True),
        ("Answer: -4", "4", False),
        ("Answer: 4" + " " * 300, "4", False),  # only the last 300 characters count
        ("", "4", False),
    ],
)
def test_math_answers(response, truth, correct):
    grade = grade_math(response, truth)
    assert grade.correct is correct
    assert grade.score == (1.0 if correct else -1.0)


def test_an_answer_that_is_missing_is_not_an_answer():
    assert grade_math("I do not know", "[none]").predicted == "[none]"
    assert normalize_answer("\\sqrt2") == normalize_answer("\\sqrt{2}") == "\\sqrt{2}"


def _dapo_row(text, answer):
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": text}],
        "ability": "MATH",
        "reward_model": {"style": "rule-lighteval/MATH_v2", "ground_truth": answer},
        "extra_info": {"index": "0"},
    }


def test_math_files_are_read_and_repeated_rows_count_once(tmp_path):
    rows = [_dapo_row(f"What is {n} + 1?", str(n + 1)) for n in range(4)]
    path = tmp_path / "math.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows * 3))
    task = MathFile(path)
    assert len(task) == 4
    assert task.name == "math"
    drawn = task.problems(4, "k")
    assert sorted(problem.answer for problem in drawn) == ["1", "2", "3", "4"]
    assert len(task.problems(9, "k")) == 9
    assert task.problems(3, "k") == task.problems(3, "k")
    assert len(prompts(task.evaluation(9))) == len(task.evaluation(9)) == 4
    assert task.grade(drawn[0], f"Answer: {drawn[0].answer}").correct
    shorter = tmp_path / "shorter"
    shorter.mkdir()
    (shorter / path.name).write_text("\n".join(json.dumps(row) for row in rows[:3]))
    assert repr(MathFile(path)) == repr(task) != repr(MathFile(shorter / path.name))


def test_plain_rows_and_parquet(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "1+1=", "answer": 2}\n')
    assert make_task(str(tmp_path / "own.jsonl")).problems(1, "k") == [Problem("1+1=", "2")]
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist([_dapo_row("What is 1 + 1?", "2")]), tmp_path / "dapo.parquet")
    (problem,) = make_task(str(tmp_path / "dapo.parquet")).problems(1, "k")
    assert problem == Problem(({"role": "user", "content": "What is 1 + 1?"},), "2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x", "answer": "1"}\n{"prompt": "x"}\n', "row 2: expected 'prompt'"),
        ("a.jsonl", '{"prompt": "x", "answer": "1"}\nnot json\n', "row 2 is not JSON"),
        ("a.jsonl", "[1]\n", "row 1: expected"),
        ("a.jsonl", '{"prompt": [], "reward_model": null}\n', "row 1: expected"),
        ("a.jsonl", '{"prompt": ["text"], "reward_model": {"ground_truth": "1"}}\n', "row 1: expected"),
        ("a.jsonl", '{"prompt": [{"role": "user"}], "reward_model": {"ground_truth": "1"}}\n', "row 1: expected"),
        ("a.jsonl", "", "holds no problem"),
        ("a.jsonl", None, "no such file"),
        ("a.parquet", "not a table", "a.parquet"),
    ],
)
def test_bad_files_are_user_errors(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        make_task(str(tmp_path / name))


def test_task_names():
    assert make_task("auto", "tiny-moe").name == "sort"
    assert make_task("auto", "smollm2").name == "one-sentence"
    assert make_task("sort").name == "sort"
    with pytest.raises(UserError, match="unknown task 'chess'"):
        make_task("chess")


def test_prompts_go_through_the_chat_template_where_there_is_one():
    tokenizer = tiny_tokenizer()
    assert encode_prompt(tokenizer, Problem("12>", "12")) == tokenizer("12>").input_ids
    messages = Problem(({"role": "user", "content": "hello"},), "")
    assert encode_prompt(tokenizer, messages) == tokenizer("hello").input_ids
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '=' }}"
    assert encode_prompt(tokenizer, messages) == tokenizer("[user]hello=").input_ids
    assert encode_prompt(tokenizer, Problem("hello", "")) == tokenizer("[user]hello=").input_ids
