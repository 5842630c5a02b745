"""Tasks for the demo: where prompts come from and what a response earns.

A task is a source of `Problem` and a rule that grades a response. Four are here: `SortDigits` for the tiny models,
`Chain` for the small ones, `OneSentence` for instruction-tuned ones, and `MathFile` for the data of DAPO (or a file of
one's own). A draw is a function of its key alone, no generator is carried from step to step: every arm of a comparison
sees the same prompts, whatever the other arms drew, and a resumed run sees those of the run that was killed.

An evaluation asks distinct problems: a standard error over them counts none twice. ``one-sentence`` has words of its
own for evaluations. ``chain`` has 10^18 problems, of which a warm-up sees five million at most: the chance that one of
256 is among them is 10^-9. Of the million rows of ``sort`` a run of the preset sees 1 to 2 %, also of an evaluation's.
The rows of a file are for both.

The grading of mathematics follows DAPO: +1 for a right answer and -1 for anything else, which includes a right number
in the wrong place. The other tasks use the same two values.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .errors import UserError
from .nouns import EVALUATION, TRAINING

_T = TypeVar("_T")
Message = Mapping[str, str]


@dataclass(frozen=True)
class Problem:
    """One prompt, as text or as chat messages, and the answer that a response is held against."""

    prompt: str | tuple[Message, ...]
    answer: str


@dataclass(frozen=True)
class Grade:
    """What a response earned: the reward, whether the answer is right, and the answer that was read out of it."""

    score: float
    correct: bool
    predicted: str

    @staticmethod
    def of(predicted: str, answer: str) -> "Grade":
        """Return +1 if the two strings are equal, else -1."""
        return Grade(1.0 if predicted == answer else -1.0, predicted == answer, predicted)


EVAL_KEY = "evaluation"
"""Seeds an evaluation: the same problems in every run and at every step."""


class Task(Protocol):
    """What the training loop asks of a task."""

    @property
    def name(self) -> str:
        """What reports call the task."""

    @property
    def max_new_tokens(self) -> int:
        """Longest response."""

    @property
    def overlong_buffer(self) -> int:
        """The last so many of these tokens are penalised (DAPO's soft overlong punishment); 0 switches it off."""

    def problems(self, count: int, key: str) -> list[Problem]:
        """Draw ``count`` problems to train on; equal keys give equal draws."""

    def evaluation(self, count: int) -> list[Problem]:
        """Problems to evaluate on: no two alike, always the same, fewer than ``count`` where there are no more."""

    def grade(self, problem: Problem, response: str) -> Grade:
        """Grade the text of a response, special tokens removed."""


@dataclass(frozen=True)
class SortDigits:
    """``52914>`` is to be answered ``12459``: a minute of training away for a model of two million parameters."""

    digits: int = 6
    name: str = "sort"
    max_new_tokens: int = 10
    overlong_buffer: int = 2

    def problems(self, count: int, key: str) -> list[Problem]:
        draw = random.Random(f"{self.name}/{key}")
        return [self._problem(draw) for _ in range(count)]

    def evaluation(self, count: int) -> list[Problem]:
        return _distinct(self.name, self._problem, min(count, 10**self.digits))

    def _problem(self, draw: random.Random) -> Problem:
        row = "".join(draw.choice("0123456789") for _ in range(self.digits))
        return Problem(f"{row}>", "".join(sorted(row)))

    def grade(self, problem: Problem, response: str) -> Grade:
        return Grade.of(response, problem.answer)


@dataclass(frozen=True)
class Chain:
    """``47+385-219=`` is to be answered ``47+385=432-219=213``: one operation after another; the last total is graded.

    Steps are reasoned in the open, and only the result is verified: a slip in one of them spoils all that follow, so a
    model that masters a step still fails often at many.
    """

    operands: int = 6
    largest: int = 999
    name: str = "chain"
    max_new_tokens: int = 56
    overlong_buffer: int = 4

    def problems(self, count: int, key: str) -> list[Problem]:
        draw = random.Random(f"{self.name}/{key}")
        return [self._problem(draw) for _ in range(count)]

    def evaluation(self, count: int) -> list[Problem]:
        return _distinct(self.name, self._problem, min(count, self.largest**self.operands))  # signs make it some more

    def _problem(self, draw: random.Random) -> Problem:
        total = draw.randint(1, self.largest)
        asked = answer = str(total)
        for _ in range(self.operands - 1):
            operand = draw.randint(1, self.largest)
            sign = -1 if operand <= total and draw.random() < 0.5 else 1  # never below zero
            total += sign * operand
            operation = f"{'-' if sign < 0 else '+'}{operand}"
            asked += operation
            answer += f"{operation}={total}"
        return Problem(f"{asked}=", answer)

    def grade(self, problem: Problem, response: str) -> Grade:
        return Grade.of(response.rpartition("=")[2], problem.answer.rpartition("=")[2])


@dataclass(frozen=True)
class OneSentence:
    """Following an instruction that a program can check: one short sentence with a given word in it.

    Right is a response that holds the word, has at most ``longest`` words, and is one sentence: it ends in ``.``, ``!``
    or ``?`` and has none of these and no line break before. Arithmetic would be the usual choice, but the SmolLM2-135M
    at hand solves next to none of it (0 to 3 % of 64 one-step sums below 20, sampled at temperature 1, with none to
    four examples in the prompt), and a group in which every response fails teaches nothing.
    """

    longest: int = 16
    name: str = "one-sentence"
    max_new_tokens: int = 32
    overlong_buffer: int = 8

    def problems(self, count: int, key: str) -> list[Problem]:
        return [self._problem(word) for word in _drawn(TRAINING, count, f"{self.name}/{key}")]

    def evaluation(self, count: int) -> list[Problem]:
        words = _drawn(EVALUATION, min(count, len(EVALUATION)), f"{self.name}/{EVAL_KEY}")
        return [self._problem(word) for word in words]

    def _problem(self, word: str) -> Problem:
        return Problem(({"role": "user", "content": f'Write one short sentence with the word "{word}" in it.'},), word)

    def grade(self, problem: Problem, response: str) -> Grade:
        text = response.strip()
        words = re.findall(r"[a-z']+", text.lower())
        one_sentence = re.fullmatch(r"[^.!?\n]+[.!?]", text) is not None
        correct = problem.answer in words and len(words) <= self.longest and one_sentence
        return Grade(1.0 if correct else -1.0, correct, text)


class MathFile:
    """Problems from a ``.parquet`` or ``.jsonl`` file, graded by DAPO's rule.

    Args:
        path: rows with the columns of DAPO-Math-17k (``prompt``, a list of messages; ``reward_model`` with
            ``ground_truth``) or with ``prompt`` and ``answer``, both text. Repeated rows count once: DAPO's own file
            holds each problem a hundred times.
        max_new_tokens: longest response, in tokens.
        overlong_buffer: see `Task`.

    Raises:
        UserError: the file is missing, of another kind, or a row lacks the columns; the message names the row.
    """

    def __init__(self, path: str | Path, max_new_tokens: int = 256, overlong_buffer: int = 32) -> None:
        self.name = Path(path).stem
        self.max_new_tokens = max_new_tokens
        self.overlong_buffer = overlong_buffer
        rows = (_problem(row, f"{path}, row {index + 1}") for index, row in enumerate(_rows(Path(path))))
        self._problems = list({json.dumps((problem.prompt, problem.answer)): problem for problem in rows}.values())
        if not self._problems:
            raise UserError(f"{path} holds no problem")

    def __len__(self) -> int:
        return len(self._problems)

    def __repr__(self) -> str:
        """The same in every process: the file of a warm-up is named by it."""
        contents = hashlib.sha256(repr(self._problems).encode()).hexdigest()[:16]
        return f"MathFile({self.name!r}, {contents}, {self.max_new_tokens}, {self.overlong_buffer})"

    def problems(self, count: int, key: str) -> list[Problem]:
        return _drawn(self._problems, count, f"{self.name}/{key}")

    def evaluation(self, count: int) -> list[Problem]:
        return _drawn(self._problems, min(count, len(self._problems)), f"{self.name}/{EVAL_KEY}")

    def grade(self, problem: Problem, response: str) -> Grade:
        return grade_math(response, problem.answer)


def _drawn(there: Sequence[_T], count: int, key: str) -> list[_T]:
    """A draw that repeats nothing where there is enough."""
    draw = random.Random(key)
    return draw.choices(there, k=count) if count > len(there) else draw.sample(there, count)


def _distinct(name: str, problem: Callable[[random.Random], Problem], count: int) -> list[Problem]:
    """The problems of an evaluation, of a task that makes them up; there are ``count`` or more."""
    draw, found = random.Random(f"{name}/{EVAL_KEY}"), dict[str, Problem]()
    while len(found) < count:
        made = problem(draw)
        found.setdefault(str(made.prompt), made)
    return list(found.values())


TASKS: Mapping[str, type[SortDigits | Chain | OneSentence]] = {
    "sort": SortDigits,
    "chain": Chain,
    "one-sentence": OneSentence,
}

TASKS_OF_MODELS = {"tiny": "sort", "tiny-moe": "sort", "small": "chain", "small-moe": "chain"}
"""What suits a model; any other gets ``one-sentence``."""


def make_task(spec: str, model: str = "") -> Task:
    """Return the task that a name or a path stands for.

    Args:
        spec: a name of `TASKS`, the path of a ``.parquet`` or ``.jsonl`` file, or ``auto``, see `TASKS_OF_MODELS`.
        model: the model's spec, which ``auto`` goes by.

    Raises:
        UserError: there is no such task or no such file.
    """
    if spec == "auto":
        spec = TASKS_OF_MODELS.get(model, "one-sentence")
    if spec in TASKS:
        return TASKS[spec]()
    if spec.endswith((".parquet", ".jsonl")):
        return MathFile(spec)
    raise UserError(f"unknown task '{spec}': give {', '.join(TASKS)}, or a .parquet or .jsonl file")


def encode_prompt(tokenizer: Any, problem: Problem) -> list[int]:
    """Return the prompt's token ids, through the tokenizer's chat template where it has one."""
    return encode_prompts(tokenizer, [problem])[0]


def encode_prompts(tokenizer: Any, problems: Sequence[Problem]) -> list[list[int]]:
    """Return `encode_prompt` of several problems, in one call of the tokenizer."""
    # A chat template writes the special tokens itself; a plain prompt of these models has none in front.
    texts = [_prompt_text(tokenizer, problem.prompt) for problem in problems]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False).input_ids
    return ids


def _prompt_text(tokenizer: Any, prompt: str | tuple[Message, ...]) -> str:
    if tokenizer.chat_template is None:
        return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def grade_math(response: str, truth: str) -> Grade:
    """Grade a response as DAPO does: the last ``Answer: …`` line of its last 300 characters.

    Args:
        response: the text of the response.
        truth: the right answer.

    Returns:
        `Grade` with +1 or -1; ``predicted`` is the normalised answer, ``[none]`` if the line is missing.

    Source: the answer rule of DAPO (arXiv 2503.14476) as published with its data.
    """
    found = re.findall(r"(?i)Answer\s*:\s*([^\n]+)", response[-300:])
    return Grade.of(normalize_answer(found[-1]) if found else "[none]", normalize_answer(truth))


_UNITS = (
    "square units", "units", "degrees", "degree", "percent", "dollars", "cents", "meters", "cm", "km", "inches", "feet",
    "hours", "minutes", "seconds", "days", "points", "miles", "mph",
)  # fmt: skip
_UNIT = re.compile(r"(?<=[\d})\s])\s*(?:" + "|".join(_UNITS) + r")\b")


def normalize_answer(answer: str) -> str:
    """Bring a mathematical answer into the form in which two equal ones are equal strings.

    Keeps what follows the last ``=``; drops ``$``, ``\\text{…}``, ``\\boxed{…}`` wrappers, units, spaces, a closing
    full stop and the commas of whole numbers; writes ``\\frac12`` as ``\\frac{1}{2}`` and ``\\sqrt2`` as ``\\sqrt{2}``.
    """
    text = answer.split("=")[-1].strip().replace("\\!", "").replace("\\%", "").replace("%", "")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\$", "").replace("$", "")
    text = re.sub(r"\\(?:left|right)(?![a-z])", "", text)
    text = re.sub(r"\^\s*\{?\\circ\}?", "", text)
    text = re.sub(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}", r" \1", text)
    text = _UNIT.sub("", text)
    text = re.sub(r"\s+", "", text).rstrip(".")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    if text.replace(",", "").lstrip("-").isdigit():
        text = text.replace(",", "")
    return text


def _rows(path: Path) -> Sequence[Mapping[str, Any]]:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
            from pyarrow import ArrowException
        except ImportError:
            raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from None
        try:
            table: Sequence[Mapping[str, Any]] = parquet.read_table(path).to_pylist()
        except ArrowException as error:
            raise UserError(f"{path} is not a readable parquet file: {error}") from error
        return table
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: a task file ends in .parquet or .jsonl")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, row {number} is not JSON: {error}") from error
    return rows


def _problem(row: Any, where: str) -> Problem:
    match row:
        case {"prompt": str(prompt), "answer": str() | int() | float() as answer}:
            return Problem(prompt, str(answer))
        case {"prompt": [*messages], "reward_model": {"ground_truth": truth}} if messages and all(
            isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages
        ):
            return Problem(tuple({"role": m["role"], "content": m["content"]} for m in messages), str(truth))
    raise UserError(f"{where}: expected 'prompt' and 'answer', or DAPO's 'prompt' and 'reward_model.ground_truth'")
