"""`--experts_implementation`: what runs the experts of the models of a command, chosen, set, checked and described.

transformers runs other experts than were asked for without a word: where it doesn't find its decorator in a model's
file, and where a class goes without it. So what runs is read off the experts' modules after it was set.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from moe_backbone.experts_choice import ExpertsKind, choose_experts, find_experts, known_experts, obstacle
from moe_backbone.memcpy_experts import NAME
from otpo.cli.options.run_options import RunArguments
from otpo.trl_seam import have_experts_run_by, implementations
from otpo_kernels.backend import triton_is_installed

AUTO = "auto"
_OPTION = "experts_implementation"


class Request(NamedTuple):
    """What a command line says of the experts.

    Attributes:
        name: Of an experts function, or [`AUTO`].
        source: The option that says so.
        spread_by: What spreads the experts over processes, `"deepspeed"` or `"transformers"`; None for nothing.
    """

    name: str = AUTO
    source: str = _OPTION
    spread_by: str | None = None


class Running(NamedTuple):
    """What runs the experts of one model.

    Attributes:
        name: Of the experts function, or what else runs them.
        reason: Why it is not what `auto` would rather take; None where it is, or where the user named it.
        source: The option that named it; None for `auto`.
    """

    name: str
    reason: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        """As the header has it."""
        text = f"run by {self.name}"
        if self.source is not None:
            text += f" (`{self.source}`)"
        if self.reason is not None:
            text += f", not by {'memcpy' if self.name == 'grouped_mm' else 'memcpy or grouped_mm'}: {self.reason}"
        return text


def require_known(name: str) -> None:
    """Raises a `ValueError` unless `experts_implementation` is a name that can be asked for."""
    known = [AUTO, *known_experts()]
    if name not in known:
        raise ValueError(f"`{_OPTION}={name}` is not known. Set one of: {', '.join(known)}.")


def read_request(options: RunArguments, loading: Any = None) -> Request:
    """What the options ask for.

    Args:
        options: Of the run.
        loading: `model_init_kwargs`, a mapping or None, which may name experts too.

    Raises:
        ValueError: The two name different ones, the name is not known, or DeepSpeed's layer would pass it over.
    """
    name = options.experts_implementation
    require_known(name)
    spread_by = None if options.expert_parallel_size == 1 else options.expert_parallel_backend
    source, loaded = _OPTION, loading.get(_OPTION) if isinstance(loading, Mapping) else None
    if loaded is not None:
        if name not in (AUTO, loaded):
            raise ValueError(
                f"`{_OPTION}={name}`, and `model_init_kwargs` has {_OPTION}={loaded}. Remove one of the two."
            )
        name, source = loaded, "model_init_kwargs"
    if spread_by == "deepspeed" and name not in (AUTO, NAME):
        raise ValueError(
            f"`{source}: {name}` with `expert_parallel_size={options.expert_parallel_size}`: DeepSpeed trains a layer "
            f"in place of the experts, whose rows {NAME} moves. Leave `{_OPTION}` out."
        )
    return Request(name, source, spread_by)


def set_experts(
    request: Request, models: Sequence[Any], device_type: str, halved: bool, has_triton: bool | None = None
) -> str | None:
    """Has the experts of the models run as asked, makes sure that they do, and describes what runs.

    Args:
        request: Of [`read_request`].
        models: The model that is trained, and its reference where there is one; also wrapped ones.
        device_type: Of the device that trains.
        halved: Whether mixed precision computes in 16 bits.
        has_triton: Whether Triton is installed; None to look.

    Returns:
        `"run by ..."`, as the header has it; None for dense models.

    Raises:
        ValueError: The experts can't be run so, or there are none and the user named a function.
    """
    triton = triton_is_installed() if has_triton is None else has_triton
    told = [_set(request, model, (device_type, 2 if halved else 4, triton)) for model in models]
    if not any(told):
        if request.name != AUTO:
            kind = type(_plain(models[0])).__name__
            raise ValueError(
                f"`{request.source}` asks for {_OPTION}={request.name}, and {kind} is a model without experts. Leave "
                "it out."
            )
        return None
    policy, *others = told
    reference = others[0] if others else None
    if policy is None:
        return f"of the reference, {reference}"
    if reference is None:
        return str(policy)
    return f"{policy}, the reference's too" if reference == policy else f"{policy}; the reference's {reference}"


def set_answering_experts(model: Any, device_type: str | None = None, has_triton: bool | None = None) -> str | None:
    """[`set_experts`] for a model that answers in batches, as `auto` has them; on a GPU alone.

    Where a GPU writes token after token, transformers runs `grouped_mm` experts by `batched_mm`. That copies, in each
    layer, the weights of every token's experts: of some hundred rows many times the whole model. Where memcpy can't
    run, it stays so.

    Args:
        model: On its device.
        device_type: Of that device; None to look.
        has_triton: Whether Triton is installed; None to look.

    Returns:
        `"run by ..."`; None where nothing is set.
    """
    weight = next(model.parameters())
    if (weight.device.type if device_type is None else device_type) != "cuda":
        return None
    told = set_experts(Request(), [model], "cuda", weight.element_size() == 2, has_triton)
    if told is not None and "grouped_mm" in model.get_experts_implementation().values():
        told += "; by batched_mm as tokens are written"
    return told


def set_trainers_experts(request: Request, trainer: Any, options: RunArguments) -> None:
    """[`set_experts`] for the models of a trainer; what runs is noted for the header."""
    models = [trainer.model, getattr(trainer, "ref_model", None)]
    args = trainer.args
    told = set_experts(
        request,
        [model for model in models if model is not None],
        trainer.accelerator.device.type,
        args.mixed_precision != "no",  # by an option, or by accelerate's launcher
    )
    if told is not None:
        options.notes["experts"] = told


def _set(request: Request, model: Any, facts: tuple[str, int, bool]) -> Running | None:
    kinds = find_experts(model)
    if not kinds:
        return None
    if request.spread_by == "deepspeed":
        if any(kind.runs_by_name for kind in kinds):  # an engine may have put its layers in their place
            _require(NAME, request, kinds, facts)
        return Running(f"the layers of expert parallelism, whose rows {NAME} moves")
    if request.spread_by == "transformers" and request.name == AUTO:
        # What `native_expert_parallel_options` loads it with.
        _require(NAME, request, kinds, facts)
        return _confirm(model, Running(NAME), request)
    if isinstance(request.name, Mapping):  # one for each part of a model, which transformers has set
        return Running(_names(kinds), source=request.source)
    if request.name != AUTO:
        _require(request.name, request, kinds, facts)
        return _confirm(model, Running(request.name, source=request.source), request)
    return _confirm(model, Running(*choose_experts(kinds, *facts)), request)


def _confirm(model: Any, wanted: Running, request: Request) -> Running:
    """Sets what is wanted where it does not run yet, and looks at what runs then."""
    kinds = find_experts(model)
    if _names(kinds) == wanted.name:
        return wanted
    refused = ""
    try:
        _plain(model).set_experts_implementation(wanted.name)
        _set_copies(model, wanted.name)
    except (ValueError, RuntimeError) as error:  # of a class that it does not know, or of what is set at load alone
        refused = f": {' '.join(str(error).split())}"
    running = _names(find_experts(model))
    if running == wanted.name:
        return wanted
    kind = type(_plain(model)).__name__
    if request.name == AUTO:
        return Running(running, f"transformers keeps {running} for {kind}{refused}")
    raise ValueError(
        f"`{request.source}` asks for {_OPTION}={wanted.name}, and transformers runs {running} for {kind}{refused}. "
        "Leave it out."
    )


def _set_copies(model: Any, name: str) -> None:
    """Sets the experts that PEFT trains as a copy (`modules_to_save`): the copy has a configuration of its own."""
    if implementations(_plain(model).config)[1] != name:  # transformers has refused
        return
    for place, module in model.named_modules():
        if ".modules_to_save." in place:
            have_experts_run_by(getattr(module, "config", None), name)


def _require(name: str, request: Request, kinds: Sequence[ExpertsKind], facts: tuple[str, int, bool]) -> None:
    found = obstacle(name, kinds, *facts)
    if found is None:
        return
    if request.spread_by is not None and request.name == AUTO:
        raise ValueError(f"`expert_parallel_size` moves rows by {NAME}, which can't run here: {found}.")
    eager = name != "eager" and any(kind.runs_by_name and kind.quantized is None for kind in kinds)
    remedy = f"set `{_OPTION}` to eager or auto" if eager else "leave it out"
    raise ValueError(
        f"`{request.source}` asks for {_OPTION}={name}, which can't run here: {found}. Change that, or {remedy}."
    )


def _names(kinds: Sequence[ExpertsKind]) -> str:
    """The functions that run, of several parts of a model several."""
    reached = [kind for kind in kinds if kind.runs_by_name] or kinds
    return " and ".join(dict.fromkeys(kind.running for kind in reached))


def _plain(model: Any) -> Any:
    """The model of transformers inside an adapter's or an engine's."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))
