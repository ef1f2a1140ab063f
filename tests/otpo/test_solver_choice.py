import os
import subprocess
import sys

import pytest
import torch
from helpers import history, make_pairs, option_dict

from otpo import OTPOConfig, OTPOTrainer
from otpo.transport.backend import choose_solver
from otpo.transport.options import TransportOptions
from otpo.transport.registry import COSTS, SOLVERS, CostKind, SolverKind
from otpo.transport.solution import TransportWeights
from otpo.transport.solve import transport_weights

SETTINGS = {"reg": 1.0, "reg_m": 0.2, "tolerance": 1e-6}
MASK = torch.ones(2, 5, dtype=torch.bool)


def states(dtype=torch.float32, length=5):
    return torch.randn(2, length, 4).to(dtype), torch.randn(2, length, 4).to(dtype)


def test_auto_is_torch_on_the_cpu_and_the_result_says_so():
    assert transport_weights(*states(), MASK, MASK).solver == "torch"


def test_the_kernels_run_when_they_are_asked_for():
    pytest.importorskip("triton", reason="triton is made for Linux")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [tensor.to(device) for tensor in (*states(), MASK, MASK)]
    got = transport_weights(*tensors, solver="triton")
    want = transport_weights(*tensors, solver="torch")
    assert (got.solver, want.solver) == ("triton", "torch")
    torch.testing.assert_close(got.chosen, want.chosen, rtol=1e-5, atol=0)


@pytest.mark.lengthy
def test_the_trainer_learns_the_same_with_either_solver(model_folder, tmp_path):
    pytest.importorskip("triton", reason="triton is made for Linux")
    losses = {}
    for solver in ("triton", "torch"):
        args = OTPOConfig(**option_dict(tmp_path / solver, ot_solver=solver, ot_reg=0.1, max_steps=3))
        trainer = OTPOTrainer(model_folder, args=args, train_dataset=make_pairs())
        trainer.train()
        losses[solver] = history(trainer, "loss", "weights/ess")
    assert len(losses["triton"]) == 3
    torch.testing.assert_close(losses["triton"], losses["torch"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("dtype", "changes", "message"),
    [
        (torch.float64, {}, "hidden states of torch.float64"),
        (torch.float32, {"reg": 0.001}, "`reg` 0.001 is below 0.01"),
        (torch.float32, {"reg_m": 0.001}, "`reg_m` 0.001 is below 0.02"),
        (torch.float32, {"tolerance": 1e-9}, "`tolerance` 1e-09 is below 1e-06"),
    ],
)
def test_asking_for_the_kernels_where_they_cannot_run_is_an_error(dtype, changes, message):
    pytest.importorskip("triton", reason="triton is made for Linux")
    with pytest.raises(ValueError, match=rf"`solver='triton'` cannot run: {message}.*'auto' or 'torch'"):
        choose_solver(TransportOptions(solver="triton", **(SETTINGS | changes)), *states(dtype))


def test_rows_beyond_the_kernels_are_refused():
    pytest.importorskip("triton", reason="triton is made for Linux")
    long = torch.empty(1, 40_000, 0)
    with pytest.raises(ValueError, match="a row of 40000 positions is longer than 32768"):
        choose_solver(TransportOptions(solver="triton", **SETTINGS), long, long)


@pytest.mark.lengthy
def test_without_a_gpu_the_kernels_are_refused():
    """In a process of its own: Triton decides at import whether it interprets."""
    code = (
        "import torch; from otpo.transport.solve import transport_weights as w;"
        "m = torch.ones(1, 2, dtype=torch.bool); w(torch.ones(1, 2, 3), torch.ones(1, 2, 3), m, m, solver='triton')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(TRITON_INTERPRET="0")
    )
    assert "`solver='triton'` cannot run" in run.stderr and run.returncode == 1


@pytest.mark.lengthy
def test_importing_the_library_does_not_import_triton():
    code = "import sys, otpo, otpo.transport.solve, otpo_kernels; assert 'otpo_kernels.sinkhorn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


@pytest.mark.parametrize("name", ["cuda", "Triton", ""])
def test_an_unknown_solver_is_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match=f"`solver` must be 'auto', 'triton' or 'torch', got '{name}'"):
        transport_weights(*states(), MASK, MASK, solver=name)
    with pytest.raises(ValueError, match=f"`ot_solver` must be 'auto', 'triton' or 'torch', got '{name}'"):
        OTPOConfig(output_dir=str(tmp_path), ot_solver=name, use_cpu=True, bf16=False)


def test_a_cost_that_the_kernels_lack_is_refused_by_them(monkeypatch):
    pytest.importorskip("triton", reason="triton is made for Linux")
    kind = CostKind("otpo.transport.cost:euclidean", "the same", "nobody", "otpo.transport.cost:norms")
    monkeypatch.setitem(COSTS, "new", kind)
    message = "`solver='triton'` cannot run: the kernels know the `cost` 'euclidean' and 'cosine', not 'new'"
    with pytest.raises(ValueError, match=message):
        transport_weights(*states(), MASK, MASK, cost="new", solver="triton")
    got, want = (transport_weights(*states_alike(), MASK, MASK, cost=cost) for cost in ("new", "euclidean"))
    assert got.chosen.equal(want.chosen)


def states_alike():
    torch.manual_seed(0)
    return states()


def test_a_new_solver_is_one_function_and_one_entry(monkeypatch, tmp_path):
    """`"auto"` tries it where it stands, takes the next one where it can't run, and says why."""
    warnings = []
    monkeypatch.setattr("otpo.transport.backend.logger.warning_once", warnings.append)

    def solve(chosen, rejected, chosen_mask, rejected_mask, options, memory_budget):
        ones = torch.ones(len(chosen))
        return TransportWeights(chosen_mask * 1.0, rejected_mask * 1.0, ones * 0, ones, "ones", ones > 0)

    def obstacle(chosen, rejected, options):
        return None if options.reg < 1 else "`reg` is too large"

    known = dict(SOLVERS)
    for name in reversed(known):  # so that they come back in their order
        monkeypatch.delitem(SOLVERS, name)
    monkeypatch.setitem(SOLVERS, "ones", SolverKind(solve, "ones", "nobody", "ones", obstacle))
    for name, kind in known.items():
        monkeypatch.setitem(SOLVERS, name, kind)

    assert transport_weights(*states(), MASK, MASK, reg=0.1).solver == "ones" and not warnings
    assert transport_weights(*states(), MASK, MASK, solver="torch").solver == "torch" and not warnings
    assert transport_weights(*states(), MASK, MASK).solver == "torch"
    assert warnings == ["Transport runs in plain torch, not in ones: `reg` is too large."]
    message = "`solver='ones'` cannot run: `reg` is too large. Change that, or set it to 'auto', 'triton' or 'torch'"
    with pytest.raises(ValueError, match=message):
        transport_weights(*states(), MASK, MASK, solver="ones")
    assert OTPOConfig(str(tmp_path), ot_solver="ones", use_cpu=True, bf16=False).ot_solver == "ones"


@pytest.mark.gpu
def test_auto_on_a_gpu_is_the_kernels_or_says_why_not(monkeypatch):
    warnings = []
    monkeypatch.setattr("otpo.transport.backend.logger.warning_once", warnings.append)
    tensors = [tensor.cuda() for tensor in states()]
    assert choose_solver(TransportOptions(**SETTINGS), *tensors) == "triton" and not warnings
    assert choose_solver(TransportOptions(**(SETTINGS | {"reg": 0.001})), *tensors) == "torch"
    assert warnings == [
        "Transport runs in plain torch, not in Triton: `reg` 0.001 is below 0.01, the least that float32 matrices "
        "serve."
    ]


def _environment(**changes):
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | changes
