"""Runs lm-eval, a library that others keep, on a model or an adapter, with our tasks beside its own."""

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from traceback import extract_tb
from typing import Any

from otpo.cli.models import compass  # noqa: F401 - makes its models known to the Auto classes
from otpo.cli.models.experts import set_answering_experts
from otpo.cli.models.loading import default_device, find_origin, load_config, load_tokenizer
from otpo.pairs.any_length import attend_at_any_length

OWN_TASKS = Path(__file__).parent / "tasks"


def require_lm_eval() -> None:
    """Raises an `ImportError` where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise ImportError("`otpo eval` runs lm-eval, which is not installed. Run `pip install 'otpo[eval]'`.")


def find_tasks(named: Sequence[str]) -> tuple[list[str], Any]:
    """The names of tasks and lm-eval's manager that knows them.

    Args:
        named: Names or patterns of lm-eval, ours (`otpo_pairs`, `otpo_answers`), folders of tasks' YAML files, or
            such files.

    Raises:
        ValueError: There is no such task.
    """
    TaskManager = _extra("lm_eval.tasks").TaskManager
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what no user of ours can change

    names: list[str] = []
    folders = [OWN_TASKS]
    for name in named:
        path = Path(name)
        if path.is_dir():
            found = list(TaskManager(include_path=str(path), include_defaults=False).all_subtasks)
            if not found:
                raise ValueError(f"`--tasks {name}`: the folder has no YAML file of a task.")
            names, folders = names + found, [*folders, path]
        elif path.suffix in (".yaml", ".yml"):
            if not path.is_file():
                raise ValueError(f"`--tasks {name}`: there is no such file.")
            names.append(str(path))
        else:
            names.append(name)
    # lm-eval reads thousands of files to know its own tasks, which takes seconds where none of them is asked for.
    paths = [str(folder) for folder in folders]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(Path(name).is_file() or manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=paths)
    chosen: list[str] = []
    for name in names:
        matches = [name] if Path(name).is_file() else manager.match_tasks([name])
        if not matches:
            close = get_close_matches(name, manager.all_tasks, n=3)
            hint = f" Close to it: {', '.join(close)}." if close else ""
            raise ValueError(f"`--tasks {name}`: lm-eval has no such task.{hint} `lm-eval ls tasks` lists all.")
        chosen += [match for match in matches if match not in chosen]
    return chosen, manager


def evaluate(
    name: str, option: str, tasks: list[str | dict[str, Any]], manager: Any, **options: Any
) -> dict[str, Any]:
    """Evaluates a model, or an adapter on its model.

    Args:
        name: A folder or a name on the Hub.
        option: The option that gave it.
        tasks: Names, from [`find_tasks`], and configurations of tasks.
        manager: From it too.
        options: `batch_size`, `device`, `dtype`, `limit`, `num_fewshot`, `apply_chat_template`, `seed`.

    Returns:
        lm-eval's results.

    Raises:
        ValueError: The model can't be found.
    """
    origin = find_origin(option, name)
    load_config(origin, trust_remote_code=False)
    load_tokenizer(origin, trust_remote_code=False)
    own_tokenizer = (Path(name) / "tokenizer_config.json").is_file()
    model = _extra("lm_eval.models.huggingface").HFLM(
        pretrained=origin.base,
        revision=origin.revision,
        peft=name if origin.adapted else None,
        tokenizer=name if own_tokenizer else None,
        backend="causal",
        device=options.pop("device") or default_device(),
        dtype=options.pop("dtype"),
        batch_size=options["batch_size"],
    )
    if options["batch_size"] > 4:  # fewer rows are as fast by transformers' own choice
        set_answering_experts(model.model)
    return run(model, tasks, manager, name, **options)


def wrap(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """A model that is loaded, as lm-eval takes one.

    Args:
        model: Of transformers.
        tokenizer: Of the model.
        batch_size: Questions of a forward pass.
    """
    return _extra("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size
    )


def run(
    model: Any, tasks: list[str | dict[str, Any]], manager: Any, name: str = "the model", **options: Any
) -> dict[str, Any]:
    """Evaluates a model of lm-eval's.

    Args:
        model: Of [`wrap`], or another one of lm-eval's.
        tasks: Names, from [`find_tasks`], and configurations of tasks.
        manager: From it too.
        name: What messages call the model.
        options: `batch_size`, `limit`, `num_fewshot`, `apply_chat_template`, `seed`.

    Returns:
        lm-eval's results.

    Raises:
        ValueError: A chat template is asked for, and there is none, or an answer is longer than the model reads.
    """
    if options["apply_chat_template"] and not getattr(model.tokenizer, "chat_template", None):
        raise ValueError(
            f"`--apply_chat_template`: the tokenizer of {name} has no chat template. Leave the option out."
        )
    seed = options.pop("seed")
    try:
        with attend_at_any_length():
            results = _extra("lm_eval").simple_evaluate(
                model=model,
                tasks=tasks,
                task_manager=manager,
                log_samples=True,
                bootstrap_iters=1000,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                **options,
            )
    except AssertionError as error:
        if "self.max_length" not in (extract_tb(error.__traceback__)[-1].line or ""):
            raise
        raise ValueError(
            f"`--tasks`: an answer that {name} is to score has more tokens than the {model.max_length} that it reads. "
            "Name other tasks, or a model that reads more."
        ) from error
    assert results is not None  # of the first process, and this is the only one
    return dict(results)


def _extra(module: str) -> Any:
    """A module of lm-eval, which types are not checked against: it is an extra, and decorates its signatures away."""
    return import_module(module)
