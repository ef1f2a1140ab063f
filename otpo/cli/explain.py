"""`otpo explain`: which tokens of a pair count, what they are aligned with, and what that does to the rewards."""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otpo.data.source_kinds import HELP, WHOLE
from otpo.registry import Option
from otpo.weighting.registry import default_note, kinds_of, registered_options, split, weighting_names, weightings_help

from .launching.interrupt import interruptible
from .options.explained import TEXTS, load_rows, typed_pair
from .options.typed_text import readable
from .options.writing import require_writable_file

if TYPE_CHECKING:  # at run time they are imported when options have been read, since they bring torch
    from datasets import Dataset

    from otpo.explain import ExplainedPair

_DESCRIPTION = """\
Show the token weights of a model on a pair, or on rows of a dataset: each token coloured by its weight, the transport
plan as a heat map, the tokens that it aligns, and what each token adds to the rewards of DPO and of OTPO. The page
needs no network; `--format png` makes a picture.

  otpo explain --model_name_or_path MODEL --dataset_name otpo/demo --rows 0 3 17 --ot_reg 0.05 --output page.html
  otpo explain --model_name_or_path runs/align --reference MODEL --prompt "Which colour?" --chosen "It is red." \\
      --rejected "It is blue." --output page.html

Rewards need the model that training started from: `--reference`, or, where the model is a LoRA adapter, the model
under it. Without one, log-probabilities are shown instead. OTPO_TRACEBACK=1 in the environment shows where an error
comes from.
"""
_BESIDE = ("otpo", "contrast", "diff")
_METAVARS = {float: "X", int: "N", str: "NAME"}


def make_parser() -> argparse.ArgumentParser:
    """The parser. Options without a default take `OTPOConfig`'s, which also checks them."""
    parser = argparse.ArgumentParser(
        prog="otpo explain",
        usage="otpo explain --model_name_or_path MODEL (--dataset_name NAME | --prompt ... --chosen ... "
        "--rejected ...) [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # Both models, and how they are loaded.
    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--model_name_or_path",
        metavar="MODEL",
        help="the policy: a name on the Hub, or a folder of a model or adapter",
    )
    add("--reference", metavar="MODEL", help="the reference model that rewards are measured against")
    add("--model_revision", default="main", metavar="TEXT", help="branch, tag or commit of the policy (main)")
    add("--dtype", default="float32", metavar="NAME", help="auto, bfloat16, float16, float32 (float32)")
    add("--attn_implementation", metavar="NAME", help="attention that transformers takes for both models")
    add("--trust_remote_code", action="store_true", help="run the code that comes with a model")
    add("--use_cpu", nargs="?", const=True, default=False, type=_boolean, metavar="BOOL", help="leave GPUs alone")

    # Rows of a dataset, or one pair that is typed.
    group = parser.add_argument_group("pairs")
    add = group.add_argument
    add("--dataset_name", metavar="NAME", help=_trimmed(HELP["dataset_name"]))
    add("--dataset_config", metavar="NAME", help=_trimmed(HELP["dataset_config"]))
    add("--dataset_train_split", default=WHOLE, metavar="NAME", help=_trimmed(HELP["dataset_train_split"]))
    add("--rows", type=int, nargs="+", metavar="N", help="rows of the split, numbered from 0 (0)")
    add(
        "--prompt",
        metavar="TEXT",
        help="the prompt of one pair, as a user's message where the model has a chat template",
    )
    add("--chosen", metavar="TEXT", help="its better response")
    add("--rejected", metavar="TEXT", help="its worse response")
    add("--max_length", type=int, metavar="N", help="tokens kept of prompt and response together (1024)")

    # Options of the weighting are made from its registry, so that a new one appears here by itself.
    group = parser.add_argument_group("token weights")
    add = group.add_argument
    add("--weighting", metavar="NAME", help=f"{weightings_help().removesuffix('.')} (otpo)")
    for option in registered_options().values():
        add(f"--{option.field}", type=option.kind, metavar=_METAVARS[option.kind], help=_help(option))
    add(
        "--beside",
        metavar="NAME",
        nargs="*",
        help="other weightings that are shown for comparison, with the same options; none without a NAME "
        f"({' '.join(_BESIDE)})",
    )
    add("--beta", type=float, metavar="X", help="factor of the rewards (0.1)")

    # What is written.
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output", metavar="FILE", help="file to write (explain.html or explain.png)")
    add("--format", metavar="NAME", help="html, png (by the ending of `--output`, else html)")
    add("--weights_only", action="store_true", help="of a picture the tokens with their weights alone")
    return parser


def _trimmed(text: str) -> str:
    """A help text of all commands as the others here: without a capital and a full stop."""
    return text[:1].lower() + text[1:].removesuffix(".")


def _help(option: Option) -> str:
    """The option's help as that of the others here: without a full stop, with the default in brackets."""
    text = option.help.removesuffix(".")
    if option.default is None:
        return text
    if note := default_note(option):
        return f"{text};{note.removeprefix(' Unset:').removesuffix('.')}"
    return f"{text} ({option.default if isinstance(option.default, str) else format(option.default, 'g')})"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page or the picture and returns 0; 2 with one message for what can't be used."""
    return interruptible("otpo explain", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        path, kind = _output(options.output, options.format)
        if options.weights_only and kind != "png":
            raise ValueError("`weights_only` is an option of pictures. Set `format=png`, or leave it out.")
        _check_source(options)
        beside = _beside(options)
    except ValueError as error:
        parser.error(str(error))
    from rich.console import Console

    from .running.command import REFUSALS, refuse

    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer, names, referenced, facts = _prepare(options, folder)
        except REFUSALS as error:
            return refuse(parser.prog, error)
        try:
            pairs = _explained(trainer, names, referenced, beside)
        except REFUSALS as error:
            return refuse(parser.prog, error)
        content = _rendered(pairs, facts, kind, options.weights_only)
    try:
        path.write_bytes(content)
    except OSError as error:
        return refuse(parser.prog, error)
    line = f"saved      {path}, {len(names)} pair(s), {len(content) / 1024:.0f} KiB"
    Console(soft_wrap=True).print(line, highlight=False, markup=False)
    return 0


def _boolean(word: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if word.lower() not in words:
        raise argparse.ArgumentTypeError(f"true or false, got {word!r}")
    return words[word.lower()]


def _output(output: str | None, kind: str | None) -> tuple[Path, str]:
    """Where to write what, checked before any model is loaded."""
    ending = Path(output or "").suffix.lower()
    known = {".html": "html", ".htm": "html", ".png": "png"}
    kind = kind or known.get(ending, "html")
    if kind not in ("html", "png"):
        raise ValueError(f"`format={kind}` is not known. Set html or png.")
    path = Path(output or f"explain.{kind}")
    if known.get(ending, kind) != kind:
        raise ValueError(f"`format={kind}` does not fit `output={output}`. Change one of them.")
    if not path.parent.is_dir():
        raise ValueError(f"`output={output}`: the folder {path.parent} does not exist. Make it, or name another file.")
    require_writable_file("output", str(path), f"explain.{kind}")
    if kind == "png" and find_spec("matplotlib") is None:
        raise ValueError("`format=png` needs matplotlib: `pip install 'otpo[plots]'`. `format=html` needs nothing.")
    return path, kind


def _check_source(options: argparse.Namespace) -> None:
    """Raises a `ValueError` unless the options name one pair or rows of a dataset."""
    for name in TEXTS:
        if getattr(options, name) is not None:
            setattr(options, name, readable(getattr(options, name)))
    texts = {name: getattr(options, name) for name in TEXTS}
    given = [name for name, text in texts.items() if text is not None]
    if given and options.dataset_name:
        raise ValueError(f"Both `dataset_name={options.dataset_name}` and `{given[0]}` name a pair. Leave one out.")
    if not given and not options.dataset_name:
        raise ValueError("No pair is named. Set `dataset_name`, or `prompt`, `chosen` and `rejected`.")
    if given and options.rows is not None:
        raise ValueError(f"`rows={options.rows}` are rows of a dataset, and `{given[0]}` gives a pair. Leave one out.")
    for name, text in texts.items() if given else ():
        if text is None:
            raise ValueError(f"`{name}` is missing: a pair is `prompt`, `chosen` and `rejected`.")
        if name != "prompt" and not text.strip():
            raise ValueError(f"`{name}={text!r}` is empty, so there are no tokens to weigh. Give the response's text.")
    if options.ld_alpha is not None and "ld" not in split(options.weighting or ""):
        raise ValueError(f"`ld_alpha={options.ld_alpha:g}` is an option of `weighting=ld`. Set that, or leave it out.")


def _prepare(options: argparse.Namespace, folder: str) -> tuple[Any, list[str], bool, dict[str, str]]:
    """A trainer that holds the pairs, their names, whether there is a reference, and what is looked at."""
    from trl import ModelConfig

    from otpo import OTPOConfig
    from otpo.trl_seam import use_one_gpu

    from .models import compass  # noqa: F401 - makes its models known to the Auto classes
    from .models.loading import (
        find_origin,
        load_adapted,
        load_config,
        load_plain,
        load_processor,
        load_reference,
        require_model,
        require_same_vocabulary,
        with_model_options,
    )
    from .options.preflight import require_layer

    # What the options name, each looked up before anything is loaded.
    model = ModelConfig(
        model_name_or_path=options.model_name_or_path,
        model_revision=options.model_revision,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
    )
    origin = find_origin("model_name_or_path", require_model(model), model.model_revision)
    other = find_origin("reference", options.reference) if options.reference else None
    names = ("weighting", *registered_options(), "beta", "max_length")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    args = OTPOConfig(
        output_dir=folder,
        use_cpu=options.use_cpu,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        drop_identical_pairs=True,
        trust_remote_code=options.trust_remote_code,
        **chosen,
    )
    use_one_gpu(args)  # one pair at a time

    # What can't be explained is refused before the model is loaded.
    if any(kind.needs_reference for kind in kinds_of(args.weighting)) and other is None and not origin.adapted:
        raise ValueError(
            f"`weighting={args.weighting}` is made of the reference's log-probabilities, and there is none. Set "
            "`reference`, or another weighting."
        )
    config = load_config(origin, options.trust_remote_code)
    require_layer(args.hidden_layer, config)
    if other is not None:
        require_same_vocabulary("reference", config, load_config(other, options.trust_remote_code))
    rows, data = (None, None) if options.dataset_name is None else load_rows(options)

    # Policy, processor, reference, and a trainer that scores with them.
    kwargs = with_model_options(None, model, origin.revision)
    if args.device.type not in ("cpu", "mps"):
        kwargs["device_map"] = {"": str(args.device)}
    policy = load_adapted(origin, args, kwargs) if origin.adapted else load_plain(origin, args, kwargs)
    processor = load_processor(origin, options.trust_remote_code)
    if data is None:
        data = typed_pair(options, processor)
    reference = None if other is None else load_reference(other, args, kwargs)
    names = ["the pair"] if rows is None else [f"row {row}" for row in rows]
    trainer = _trainer(policy, reference, args, data, processor, names)

    # What the page says of all this.
    told = options.reference or (origin.base if origin.adapted else "none")
    source = "typed" if options.dataset_name is None else f"{options.dataset_name}, {options.dataset_train_split}"
    facts = {"model": origin.name, "reference": told, "pairs": source}
    return trainer, names, origin.adapted or reference is not None, facts


def _trainer(policy: Any, reference: Any, args: Any, data: "Dataset", processor: Any, names: list[str]) -> Any:
    """A trainer of the pairs, all of which can be weighed."""
    import copy

    from otpo import OTPOTrainer
    from otpo.plain_model import has_adapter

    adapted = has_adapter(policy)
    # Without a reference it is never asked, and a shallow copy spares a second model in memory.
    stand_in = copy.copy(policy) if reference is None and not adapted else reference
    trainer = OTPOTrainer(policy, stand_in, args=args, train_dataset=data, processing_class=processor)
    if adapted and reference is None:
        policy.delete_adapter("ref")  # TRL's copy of the adapter, for training it on; without, the model under it
    known = trainer.prepared_datasets.get(trainer.train_dataset)
    kept = range(len(data)) if known is None or known.kept is None else known.kept
    lost = [name for place, name in enumerate(names) if place not in kept]
    if lost:
        raise ValueError(
            f"`rows`: {', '.join(lost)} can't be weighed: a response is empty within `max_length={args.max_length}`, "
            "or both are the same. Name other rows, or raise `max_length`."
        )
    return trainer


def _beside(options: argparse.Namespace) -> list[str]:
    """The weightings to compare with: those that are asked for, or the three of one plan and of a plain diff."""
    names = _BESIDE if options.beside is None else options.beside
    unknown = [name for name in names if name not in weighting_names()]
    if unknown:
        raise ValueError(f"`beside={unknown[0]}` is not known. Name some of {', '.join(weighting_names())}.")
    if options.ld_alpha is None and (needing := [name for name in names if "ld" in split(name)]):
        raise ValueError(
            f"`beside={needing[0]}` needs `ld_alpha`, which changes any other weighting that it is set with. Set "
            f"`weighting={needing[0]}` with `ld_alpha`, and name the other one in `beside`."
        )
    return [name for name in dict.fromkeys(names) if name != (options.weighting or "otpo")]


def _explained(trainer: Any, names: Sequence[str], referenced: bool, beside: Sequence[str]) -> list["ExplainedPair"]:
    from dataclasses import replace

    from otpo.explain import explain_rows

    pairs = explain_rows(trainer, range(len(names)), reference=referenced, beside=beside)
    return [replace(pair, name=name) for pair, name in zip(pairs, names, strict=True)]


def _rendered(pairs: Sequence["ExplainedPair"], facts: Mapping[str, str], kind: str, weights_only: bool) -> bytes:
    from otpo.explain import draw_picture, render_page

    return (
        draw_picture(pairs, weights_only=weights_only)
        if kind == "png"
        else render_page(pairs, facts=facts).encode("utf-8")
    )


if __name__ == "__main__":
    sys.exit(main())
