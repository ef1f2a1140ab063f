"""Who says how good each answer to a prompt is: checkers by name, a reward model, or a function of the user's."""

import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence, Set
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from otpo.registry import Registered


class JudgeError(RuntimeError):
    """A judge raised, or gave something that is not a finite number for each answer."""


class Judge(Protocol):
    """What scores the answers to one prompt; any function of this form is one."""

    def __call__(self, prompt: Any, answers: list[str], row: Mapping[str, Any]) -> Sequence[float]:
        """One finite number for each answer, in their order; higher is better, any scale.

        All three are copies, which a judge may change as it likes.

        Args:
            prompt: Text, or a list of messages, as it stands in the row.
            answers: The distinct answers, at least two; one may be blank or cut off.
            row: The whole row of the dataset, for right answers, tests and the like.
        """
        ...


REWARD_MODEL = "reward_model"
JUDGES: dict[str, Registered] = {
    "checkers": Registered(
        "otpo.pairs.judges:checkers",
        "the share of attribute, price, language and format that is right, or of the constraints that are kept, for "
        "rows of the data that comes with otpo",
        "ours",
    ),
    "exact_match": Registered(
        "otpo.pairs.judges:exact_match",
        "1 for an answer that is the row's 'answer', white space at the ends and case aside, else 0",
        "ours",
    ),
}
"""Judges by name; [`REWARD_MODEL`] is made of its model."""


def checkers(prompt: Any, answers: list[str], row: Mapping[str, Any]) -> list[float]:
    """Scores in [0, 1] of what comes with otpo; 0 for a blank answer.

    By [`otpo.data.ecommerce.answers.check_answer`] they are quarters; by
    [`otpo.data.constraints.checks.score_constraints`], of rows with `constraints`, shares of those that are set.

    Raises:
        ValueError: The row does not tell its right answer as the bundled data does.
    """
    from otpo.data.constraints.checks import score_constraints
    from otpo.data.ecommerce.answers import check_answer

    if isinstance(row.get("constraints"), Mapping):
        return [score_constraints(row, answer) for answer in answers]
    known = row.get("answer")
    if not isinstance(known, Mapping) or not {"attribute", "price", "language", "format"} <= set(known):
        raise ValueError("the row has no 'answer' as the data that comes with otpo has: name another judge")
    checks = ("attribute", "price", "language", "format")
    scores = []
    for answer in answers:
        results = check_answer(row, answer)
        scores.append(sum(results[name] for name in checks) / len(checks) if answer.strip() else 0.0)
    return scores


def exact_match(prompt: Any, answers: list[str], row: Mapping[str, Any]) -> list[float]:
    """1 for an answer that is the text of the row's `answer`, else 0.

    Raises:
        ValueError: The row has no such text.
    """
    known = row.get("answer")
    if not isinstance(known, str):
        raise ValueError("the row has no text in 'answer' to compare with: add that column, or name another judge")
    return [float(answer.strip().casefold() == known.strip().casefold()) for answer in answers]


def judged(judge: Judge, prompt: Any, answers: list[str], row: Mapping[str, Any]) -> list[float]:
    """Asks a judge and looks at what it says.

    The judge gets copies, since prompt and row are written into the pair afterwards.

    Raises:
        JudgeError: It raised, or did not give a finite number for each answer, in an order.
    """
    try:
        given = judge(_copied(prompt), list(answers), _copied(row))
    except (KeyboardInterrupt, JudgeError):
        raise
    except BaseException as error:  # what a user's function raises is of this prompt, exits and cancelled tasks too
        raise JudgeError(f"the judge raised {type(error).__name__}: {_message(error)}") from error
    # What can be gone through without being scores in the answers' order: keys, letters, and members.
    if isinstance(given, (Mapping, str, bytes, bytearray, Set)) or not _can_be_gone_through(given):
        raise JudgeError(
            f"the judge gave a {type(given).__name__}, {_shown(given)}: return a list of one number for each "
            "answer, in the order of the answers"
        )
    try:
        scores = [float(score) for score in given]
    except (KeyboardInterrupt, JudgeError):
        raise
    except BaseException as error:  # a generator runs the user's code here, too
        raise JudgeError(
            f"the judge gave no number for each answer, but {_shown(given)}: {type(error).__name__}: {_message(error)}"
        ) from error
    if len(scores) != len(answers):
        raise JudgeError(f"the judge gave {len(scores)} score(s) for {len(answers)} answers")
    bad = [place for place, score in enumerate(scores) if not math.isfinite(score)]
    if bad:
        raise JudgeError(f"the judge gave {scores[bad[0]]} for answer {bad[0]}, not a finite number")
    return scores


def load_judge(name: str) -> Judge:
    """The judge of [`JUDGES`] by its name, or the function that `module:function` or `path/to/file.py:function` is.

    That imports the module, from the current folder too, or runs the file, which finds modules beside it.

    Raises:
        ValueError: There is no such judge, or it is no function; the message says what can be named.
    """
    if name in JUDGES:
        return cast(Judge, JUDGES[name].load())
    home, _, attribute = name.rpartition(":")
    if not home or not attribute:
        raise ValueError(
            f"`judge={name}` is not known. Set one of {', '.join(JUDGES)}, {REWARD_MODEL}, or name a function of "
            "yours as module:function or path/to/file.py:function."
        )
    is_file = home.endswith(".py")
    if is_file and not Path(home).is_file():
        raise ValueError(f"`judge={name}`: there is no file {home}.")
    try:
        _find_modules_in(Path(home).parent if is_file else Path.cwd())
        module = _run_file(Path(home)) if is_file else import_module(home)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of the user's code, which may raise anything, and end the process
        told = f"{type(error).__name__}: {_message(error)}"
        raise ValueError(f"`judge={name}`: {home} can't be imported: {told}.") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        what = "has no such name" if found is None else f"has a {type(found).__name__} of that name"
        raise ValueError(f"`judge={name}`: {home} {what}. Name a function that takes prompt, answers and row.")
    return cast(Judge, found)


def _copied(value: Any) -> Any:
    """A copy of rows and messages; what holds no others, such as text or a picture, is not copied."""
    if isinstance(value, Mapping):
        return {name: _copied(entry) for name, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value


def _can_be_gone_through(value: Any) -> bool:
    try:
        iter(value)
    except Exception:  # of the user's class, and of a tensor without dimensions
        return False
    return True


def _shown(value: Any) -> str:
    try:
        text = _plain(repr(value))
    except Exception:  # of the user's class
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _message(error: BaseException) -> str:
    try:
        return _plain(str(error))
    except Exception:  # of the user's class
        return "its message can't be shown"


def _plain(text: str) -> str:
    """What the ledger can hold: text with halves of characters, such as names of files have, is no UTF-8."""
    return " ".join(text.split()).encode("utf-8", "backslashreplace").decode()


def _find_modules_in(folder: Path) -> None:
    """Has modules of a folder found after all others, also when the user's function imports them later."""
    place = str(folder.resolve())
    if place not in sys.path:
        sys.path.append(place)


def _run_file(path: Path) -> Any:
    name = f"otpo_judge_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a module up by its name
    spec.loader.exec_module(module)
    return module
