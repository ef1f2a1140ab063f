"""Policy and reference of a run in its layout: chosen before training, tried on a few tokens, then asked.

Shapes: R rows, L positions of a padded batch, T = L - 1 scored positions, D hidden size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from otpo import trl_seam
from otpo.training.hidden_states import captured_states, entered_layer, evaluating
from otpo.training.lent import writes_to

from .attention import attend_as_before, attend_by_lengths
from .choice import Layout, choose_layout
from .compiled import compile_by_default, compile_layers, why_not_compile
from .names import ROW_LAYOUTS
from .plan import RowPlan
from .scoring import PLANNED, as_padded, padded_states, plan_of, planned_arguments
from .trial import is_same_state, state_gap, trial_batch

logger = logging.get_logger(__name__)


class LaidOutModels:
    """Asks a trainer's models for log-probabilities, in padded rows or in rows without padding.

    Args:
        trainer: An `OTPOTrainer` whose models are loaded.

    Raises:
        ValueError: The layout that is asked for can't be had; the message says what to set.

    Attributes:
        layout: The layout of the run; padding takes its place where a model turns out not to know it.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._accelerator = trainer, trainer.accelerator
        self._asked = trainer.args.row_layout
        self._tried: set[int] = set()  # ids of models
        self._unwrapped: dict[int, tuple[Any, Any]] = {}  # by ids of models: they, and what is in them
        self._compiling_is_decided = False
        # Of the last batch: what its plan is made of, with counts of writes; the plan that it came with; the plan.
        self._planned: tuple[list[tuple[Tensor, int]], RowPlan | None, RowPlan] | None = None

        # Policy and reference take the same layout: what both can.
        options: dict[str, Any] = {
            "device": self._accelerator.device,
            "autocast": trl_seam.autocast_dtype(self._accelerator),
            "max_length": trainer.args.max_length,
            "obstacle": trl_seam.layout_obstacle(trainer),
        }
        layouts = [choose_layout(self._asked, model, **options) for model in self._models()]
        self.layout = min(layouts, key=lambda layout: ROW_LAYOUTS.index(layout.name))
        if len({layout.way for layout in layouts}) > 1:
            if self._asked not in ("auto", "padded"):
                raise ValueError(
                    f"`row_layout={self._asked!r}` is not possible with a policy and a reference of different "
                    "attention or precision. Load them alike, or set `row_layout='auto'`."
                )
            self.layout = Layout("padded", reason="policy and reference have different attention")
        for model in self._models() if self.layout.way else ():
            trl_seam.scores_rows(model)
            if self.layout.way == "lengths":
                attend_by_lengths(model)

    def settle(self, model: Any, inputs: Mapping[str, Any]) -> None:
        """Makes sure, before the first batch, that the layout is right; compiles before the first training step.

        All processes have to call it with their batches.

        Args:
            model: The one that is asked, with its engine.
            inputs: The first batch.

        Raises:
            ValueError: A layout that was asked for by name is not right for the model or the batch.
        """
        if id(self.unwrapped(model)) not in self._tried:
            self._try(model, inputs)
        state = self._trainer.state
        if not self._compiling_is_decided and trl_seam.mode_of(self._trainer) == "train" and state.max_steps > 0:
            self._compiling_is_decided = True
            self._compile(state.max_steps * self._trainer.args.gradient_accumulation_steps)

    def ask(self, model: Any, inputs: Mapping[str, Any], *, router_logits: bool) -> Any:
        """A model's `FusedCausalLMOutput` of a batch, in padded rows, on the batch's device.

        Args:
            model: Policy or reference, with its engine.
            inputs: The batch, on the device.
            router_logits: Whether the routers' loss is asked for.
        """
        plan = self._plan(inputs)
        if plan is None:
            arguments = trl_seam.policy_arguments(inputs, router_logits=router_logits)
        else:
            causal_lm = self.unwrapped(model)
            longest = self._trainer.args.max_length
            arguments = planned_arguments(plan, self.layout, causal_lm, longest, router_logits=router_logits)
        outputs = trl_seam.on_device(model(**arguments), inputs["input_ids"].device)
        return outputs if plan is None else as_padded(outputs, plan)

    def unwrapped(self, model: Any) -> Any:
        """A model without its engine. accelerate walks through all modules for it, so each model is asked for once."""
        if id(model) not in self._unwrapped:
            self._unwrapped[id(model)] = model, self._accelerator.unwrap_model(model)
        return self._unwrapped[id(model)][1]

    def scored_states(self, states: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Hidden states as the backbone returned them for a batch, at the scored positions, `(R, T, D)`."""
        plan = self._plan(inputs)
        if plan is not None:
            return padded_states(states, plan)
        return states[:, :-1][:, -(inputs["input_ids"].size(1) - 1) :]  # virtual tokens of adapters stand before

    def _plan(self, inputs: Mapping[str, Any]) -> RowPlan | None:
        if self.layout.way is None:
            return None
        tensors = [inputs[name] for name in PLANNED]
        made_of = [(each, writes_to(each)) for each in tensors]
        made = inputs.get(trl_seam.ROW_PLAN)
        if self._planned is not None:
            before, came_with, plan = self._planned
            if all(new[0] is old[0] and new[1] == old[1] for new, old in zip(made_of, before, strict=True)):
                return plan
            if made is came_with:  # the batch is another one by now
                inputs = {name: each for name, each in inputs.items() if name != trl_seam.ROW_PLAN}
        self._planned = made_of, made, plan_of(inputs, self.layout)
        return self._planned[2]

    def keep_plan(self, inputs: Mapping[str, Any]) -> None:
        """Remembers what the plan of a batch was made of, before anybody changes the batch."""
        if trl_seam.ROW_PLAN in inputs:
            self._plan(inputs)

    def _models(self) -> list[Any]:
        models = (self._trainer.model, self._trainer.ref_model)
        return [self.unwrapped(model) for model in models if model is not None]

    def _try(self, model: Any, inputs: Mapping[str, Any]) -> None:
        """Compares a few tokens in the chosen layout with padded ones, and goes back to padding where they differ."""
        # A pass before training asks the reference alone, so the policy may come later.
        reference = self._trainer.ref_model
        self._tried.add(id(self.unwrapped(model)))
        if self.layout.way is None:
            return
        unknown = sorted(inputs.keys() - {*PLANNED, *trl_seam.REFERENCE_COLUMNS, *trl_seam.OURS})
        fault = f"the batch's {', '.join(unknown)}" if unknown else self._fault(model)
        if fault is None and reference is not None:
            plain = id(self.unwrapped(reference))
            fault = None if plain in self._tried else self._fault(reference)
            self._tried.add(plain)
        if fault is None:
            return
        if self._asked != "auto":
            raise ValueError(f"`row_layout={self._asked!r}` is not possible with {fault}. Set `row_layout='auto'`.")
        self.layout = Layout("padded", reason=f"because of {fault}")
        for each in self._models():  # models ask for the name of their attention
            attend_as_before(each)
        logger.warning(f"Rows are {self.layout.describe()}.")

    def _fault(self, model: Any) -> str | None:
        """What is wrong with a model's hidden states in the chosen layout; the same answer on all processes."""
        causal_lm, layout, planned_before = self.unwrapped(model), self.layout, self._planned
        device = self._accelerator.device
        trial = trial_batch(causal_lm.config.get_text_config().vocab_size, device)
        failure = "a hidden state is not finite, or another process failed"
        gap = torch.full((), torch.inf, device=device)
        try:
            with torch.no_grad(), evaluating(model), captured_states(causal_lm) as captured:
                self.ask(model, trial, router_logits=False)
                self.layout = Layout("padded")
                self.ask(model, trial, router_logits=False)
            planned, padded = captured
            gap = state_gap(padded, planned, plan_of(trial, layout).to(planned.device))
        except Exception as error:  # whatever a model does with arguments that it does not know
            failure = (str(error) or type(error).__name__).splitlines()[0]
        finally:
            self.layout, self._planned = layout, planned_before
        # A failure is a gap too: on all processes, whichever has seen it.
        largest = self._accelerator.gather(gap.to(device).reshape(1)).max().item()
        if is_same_state(largest):
            return None
        if largest == torch.inf:
            return f"{type(causal_lm).__name__}, which fails on it: {failure}"
        return f"{type(causal_lm).__name__}, whose hidden states differ by {largest:.2f} of their norm"

    def _compile(self, micro_batches: int) -> None:
        """Compiles the decoder layers of policy and reference, if that is asked for or pays."""
        args = self._trainer.args
        wanted = args.compile_layers
        if wanted is None:
            policy, device = self._models()[0], self._accelerator.device
            wanted = self.layout.way == "lengths" and compile_by_default(policy, device, micro_batches)
        if not wanted or args.torch_compile:
            return
        engine = self._accelerator.distributed_type
        reasons = [why_not_compile(model, engine) for model in self._models()]
        reason = next((each for each in reasons if each), None)
        if reason is not None:
            logger.warning(f"The decoder layers are not compiled, since {reason}.")
            return
        for model in self._models():
            compile_layers(model, but=entered_layer(model, args.hidden_layer))
        logger.warning(
            "The decoder layers are compiled at the first steps, which takes a minute or two once and seconds when "
            "torch's cache has them. Set `compile_layers=False` to go without."
        )
