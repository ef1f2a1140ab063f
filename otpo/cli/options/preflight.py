"""Checks of a command's options that need neither model nor data, made before processes are launched."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from transformers import SchedulerType
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    is_azureml_available,
    is_flytekit_available,
)

from otpo.cli.models.experts import require_known
from otpo.cli.models.loading import find_origin, load_config
from otpo.training.hidden_states import check_layer_number

from .writing import require_writable_file, require_writable_folder

PREFERENCE_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
"""What `trl.DPOTrainer` knows; it tells an unknown one in its first step."""
_LEAST = {"learning_rate": 0.0, "beta": 0.0, "dataloader_num_workers": 0, "weight_decay": 0.0, "max_grad_norm": 0.0}
_LEAST |= {"adam_epsilon": 0.0, "num_train_epochs": 0.0}
_PACKAGES = {"comet_ml": "comet-ml", "azure_ml": "azureml-mlflow", "flyte": "flytekit", "kubeflow": "kubeflow"}


def check_options_alone(values: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for an option of a training command that can't be used, whatever the data are.

    Args:
        values: Value of each option.
    """
    if values["report"] is not None:
        require_writable_file("report", values["report"], "report.json")
    if values["output_dir"] is not None:
        require_writable_folder("output_dir", values["output_dir"])
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if values[name] < 1:
            raise ValueError(f"`{name}` must be at least 1, got {values[name]}.")
    for name, least in _LEAST.items():
        value = values.get(name)
        if value is not None and not least <= float(value) < float("inf"):
            raise ValueError(f"`{name}` must be a finite number of at least {least:g}, got {value}.")
    for name in ("adam_beta1", "adam_beta2"):  # which Adam refuses as the first step begins
        if not 0 <= float(values[name]) < 1:
            raise ValueError(f"`{name}` must be at least 0 and below 1, got {values[name]}.")
    require_schedule(values["lr_scheduler_type"], values["lr_scheduler_kwargs"], float(values["learning_rate"]))
    require_trackers(values["report_to"])
    if "weighting" in values:
        require_losses(values["loss_type"])
        if values["f_divergence_type"] not in DIVERGENCES:
            found, known = values["f_divergence_type"], ", ".join(DIVERGENCES)
            raise ValueError(f"`f_divergence_type={found}` is not known. Set one of: {known}.")
    require_known(values["experts_implementation"])
    check_model_options(values)


def require_schedule(kind: Any, arguments: Any, learning_rate: float) -> None:
    """Raises a `ValueError` for arguments that the schedule of the learning rate can't be made of.

    Args:
        kind: One of transformers' schedules, or text that transformers refuses.
        arguments: A mapping, as text or as it is; None for none.
        learning_rate: The peak.
    """
    from moe_backbone.pretraining.schedule import check_schedule

    kind, given = getattr(kind, "value", kind), arguments
    with suppress(ValueError):  # what is no JSON is told when the options are parsed
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if kind not in {known.value for known in SchedulerType} or isinstance(arguments, str):
        return
    try:
        check_schedule(kind, arguments, learning_rate)
    except ValueError as error:
        shown = "`lr_scheduler_kwargs`" if given is None else f"`lr_scheduler_kwargs={given}`"
        raise ValueError(f"{shown} can't be used with `lr_scheduler_type={kind}`: {error}.") from error


def require_trackers(report_to: str | list[str] | None) -> None:
    """Raises a `ValueError` for a tracker that is unknown or whose package is not installed."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if names in (["none"], ["all"]):
        return
    installed = {*get_available_reporting_integrations()}
    installed |= {"azure_ml"} if is_azureml_available() else set()
    installed |= {"flyte"} if is_flytekit_available() else set()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(["none", "all", *sorted(INTEGRATION_TO_CALLBACK)])
            raise ValueError(f"`report_to={name}` is not known. Set one or several of: {known}.")
        if name not in installed:
            package = _PACKAGES.get(name, name)
            raise ValueError(
                f"`report_to={name}` needs the package {package}: `pip install {package}`, or set `report_to` to none."
            )


def require_losses(loss_type: str | list[str]) -> None:
    """Raises a `ValueError` that lists the losses unless all of `loss_type` are among them."""
    for name in [loss_type] if isinstance(loss_type, str) else loss_type:
        if name not in PREFERENCE_LOSSES:
            raise ValueError(
                f"`loss_type={name}` is not known. Set one or several of: {', '.join(PREFERENCE_LOSSES)}."
            )


def check_model_options(values: Mapping[str, Any]) -> None:
    """Raises a `ValueError` when the model's folder and the options that depend on its kind don't fit."""
    name = values["model_name_or_path"]
    if name is None:
        return
    origin = find_origin("model_name_or_path", name, values["model_revision"])
    if origin.adapted:
        for option, off in (("use_peft", False), ("expert_parallel_size", 1), ("preset", None), ("save_code", False)):
            if values.get(option, off) != off:
                raise ValueError(
                    f"`{option}={values[option]}` with `model_name_or_path={name}`, which is an adapter and trains on "
                    f"as it is. Leave `{option}` out, or merge the adapter into its model first."
                )
        if "preset" in values:
            raise ValueError(
                f"`model_name_or_path={name}` is an adapter, and pretraining trains whole models. Merge it into its "
                "model first."
            )
    if values.get("hidden_layer", -1) not in (None, -1):
        require_layer(values["hidden_layer"], load_config(origin, values.get("trust_remote_code", False)))


def require_layer(layer: float | None, config: Any) -> None:
    """Raises a `ValueError` unless a model of that configuration has hidden states of that number.

    The trainer looks again, at the model: some have no layers in a list.
    """
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    if layer is not None and layer != -1 and count is not None:
        check_layer_number(count, layer, "this model")
