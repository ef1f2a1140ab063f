"""FP8 folders: scales in closed form, vLLM's keys, and what transformers computes with them."""

import json

import pytest
import torch
from compass_helpers import token_ids
from quantization_helpers import VARIANTS, Rounded, documents, exported_model, needs_compressed_tensors, rounded
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from moe_backbone.conversion.tensors import read_tensors, split_experts, state_tensors
from moe_backbone.quantization.observing import Observations, observe
from moe_backbone.quantization.reference import RoundedInputs, load_rounded
from moe_backbone.quantization.scales import from_fp8, input_scales, scales, to_fp8, weight_scales
from moe_backbone.quantization.scheme import (
    Target,
    find_targets,
    make_scheme,
    require_compressed_tensors,
    require_full_precision,
)
from moe_backbone.quantization.tapping import find_places, tapped
from moe_backbone.quantization.writing import count_bytes

pytestmark = needs_compressed_tensors


def stored(folder):
    """The tensors of a folder's files, as vLLM reads them."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_scales_and_rounding_in_closed_form():
    args = make_scheme("static").weights
    assert scales(torch.tensor([448.0, 0.0, 1.0]), args).tolist() == pytest.approx([1, torch.finfo().eps, 1 / 448])
    # e4m3: 3 bits behind the first, so steps of 1 from 8 to 16 and of 32 from 256 on, ties to even; 448 is the end.
    values = torch.tensor([[8.4, 8.5, 9.5, 300.0, 1000.0, -460.0, 0.0, 2**-10]])
    got = to_fp8(values, torch.ones(1), args)
    assert got.dtype == torch.float8_e4m3fn
    assert from_fp8(got, torch.ones(1), args).tolist() == [[8, 8, 10, 288, 448, -448, 0, 0]]
    half = to_fp8(values / 2, torch.tensor([0.5]), args)
    assert half.float().equal(got.float())
    each = to_fp8(torch.tensor([[4.0], [7.0]]), torch.tensor([[0.5], [7 / 448]]), make_scheme("dynamic").weights)
    assert each.float().tolist() == [[8], [448]]


def observations(rows, gate_up, down):
    """One layer, number 3, two experts; a document a line; and one linear layer whose inputs are `down`'s sums."""
    as_cells = {name: torch.tensor(values)[:, None] for name, values in (("gate_up", gate_up), ("down", down))}
    return Observations(
        (3,),
        ("q_proj",),
        torch.ones(len(rows), dtype=torch.int64),
        torch.tensor(rows)[:, None],
        as_cells,
        as_cells,
        torch.tensor(down).sum(1, keepdim=True),
    )


def test_input_scales_are_those_of_drawn_documents_and_an_unseen_expert_has_its_layers_largest():
    found = observations([[2, 0], [1, 0], [1, 5]], [[1.0, 0], [4, 0], [2, 9]], [[5.0, 0], [3, 0], [1, 8]])
    args = make_scheme("static").input_activations
    some = input_scales(found, [0, 1], args)
    assert some.unseen == [(3, 1)]
    torch.testing.assert_close(some.experts["gate_up"], torch.tensor([[4.0, 4]]) / 448)
    torch.testing.assert_close(some.experts["down"], torch.tensor([[5.0, 5]]) / 448)
    torch.testing.assert_close(some.linears["q_proj"], torch.tensor([5.0]) / 448)
    every = input_scales(found, [2, 0, 1], args)
    assert not every.unseen
    torch.testing.assert_close(every.experts["gate_up"], torch.tensor([[4.0, 9]]) / 448)
    torch.testing.assert_close(every.of(Target("x", "x", None, 3, 1, "down")), torch.tensor([8.0]) / 448)
    torch.testing.assert_close(every.of(Target("x", "x", None, 3, 0, "up")), torch.tensor([4.0]) / 448)
    served = every.largest_of_layers()
    torch.testing.assert_close(served.experts["gate_up"], torch.tensor([[9.0, 9]]) / 448)
    assert served.linears is every.linears


def test_inputs_of_zeros_alone_clip_nothing_that_comes_later():
    args = make_scheme("static").input_activations
    # Expert 1 has rows, and nothing but zeros goes into its second product; neither expert's linear layer sees any.
    some = input_scales(observations([[2, 3]], [[4.0, 2.0]], [[5.0, 0.0]]), [0], args)
    torch.testing.assert_close(some.experts["down"], torch.tensor([[5.0, 5.0]]) / 448)
    torch.testing.assert_close(some.experts["gate_up"], torch.tensor([[4.0, 2.0]]) / 448)
    assert not some.unseen and some.zeros == [("layer 3 expert 1, down", "its layer's largest")]
    none = input_scales(observations([[2, 0]], [[4.0, 0.0]], [[0.0, 0.0]]), [0], args)
    assert none.experts["down"].tolist() == [[1, 1]] and none.linears["q_proj"].tolist() == [1]
    assert none.unseen == [(3, 1)] and none.zeros == [("layer 3 expert 0, down", "1"), ("q_proj", "1")]
    later = torch.tensor([[300.0, -2.0]])
    assert from_fp8(to_fp8(later, none.linears["q_proj"], args), none.linears["q_proj"], args).tolist() == [[288, -2]]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_dtypes_and_shapes_are_those_that_vllm_reads(tmp_path, variant, kind):
    made = rounded(tmp_path, kind, **VARIANTS[variant])
    before, after = stored(tmp_path / "exported"), stored(made.folder)
    assert len(list(made.folder.glob("*.safetensors"))) > 1
    names = {target.name for target in made.targets}
    attention = {f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qkvo"}
    block, parts = ("block_sparse_moe", ("w1", "w2", "w3")) if variant == "Mixtral" else ("mlp", None)
    parts = parts or ("gate_proj", "up_proj", "down_proj")
    layers = [f"model.layers.{layer}.{block}" for layer in range(2)]
    experts = {f"{layer}.experts.{expert}.{part}" for layer in layers for expert in range(5) for part in parts}
    shared = {f"{layer}.shared_expert.{part}" for layer in layers for part in parts if variant == "Qwen3-Next"}
    assert names == attention | experts | shared

    # Per tensor: one number each, as `w13_weight_scale` and `w13_input_scale` are loaded; per channel: one an output.
    for name in names:
        weight, scale = after.pop(f"{name}.weight"), after.pop(f"{name}.weight_scale")
        assert weight.dtype == torch.float8_e4m3fn and weight.shape == before[f"{name}.weight"].shape
        assert scale.dtype == torch.float32 and scale.shape == ((1,) if kind == "static" else (len(weight), 1))
        if kind == "static":
            given = after.pop(f"{name}.input_scale")
            assert given.dtype == torch.float32 and given.shape == (1,) and given > 0
        back = weight.float() * scale
        original = before.pop(f"{name}.weight")
        assert ((back - original).abs() <= original.abs() / 16 + scale / 512).all()
    assert after.keys() == before.keys() and all(after[name].equal(before[name]) for name in after)

    config = json.loads((made.folder / "config.json").read_text())
    told = config.pop("quantization_config")
    assert config == json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (told["quant_method"], told["format"]) == ("compressed-tensors", "float-quantized")
    assert told["quantization_status"] == "compressed" and told["kv_cache_scheme"] is None
    (group,) = told["config_groups"].values()
    assert group["targets"] == ["Linear"]
    want = ("tensor", "tensor", False) if kind == "static" else ("channel", "token", True)
    weights, inputs = group["weights"], group["input_activations"]
    assert (weights["strategy"], inputs["strategy"], inputs["dynamic"]) == want
    for args in (weights, inputs):
        assert (args["num_bits"], args["type"], args["symmetric"]) == (8, "float", True)
    assert not weights["dynamic"]
    gates = {f"{layer}.gate" for layer in layers}
    gates |= {f"{layer}.shared_expert_gate" for layer in layers if variant == "Qwen3-Next"}
    assert set(told["ignore"]) == {"lm_head"} | gates


def test_matrices_that_are_multiplied_as_one_share_their_scale(tmp_path):
    """Requantizing to the largest scale, which vLLM does at load, changes no number then."""
    made = rounded(tmp_path, num_shared_experts=1)
    after = stored(made.folder)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        groups = [[f"{prefix}.self_attn.{part}_proj" for part in "qkv"]]
        groups += [
            [f"{prefix}.mlp.{it}.{part}_proj" for part in ("gate", "up")] for it in ("experts.4", "shared_expert")
        ]
        for group in groups:
            for kind in ("weight_scale", "input_scale"):
                assert len({after[f"{name}.{kind}"].item() for name in group}) == 1
            largest = max(after[f"{name}.weight"].float().abs().max() for name in group)
            assert largest == 448
    assert (
        after["model.layers.0.mlp.experts.0.up_proj.weight_scale"]
        != after["model.layers.0.mlp.experts.0.down_proj.weight_scale"]
    )


def loads(folder, **options):
    """As anybody loads it; transformers has no place for input scales of experts and says so."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    assert all(".experts." in name and name.endswith("input_scale") for name in info["unexpected_keys"])
    return model.eval()


class LinearInputs(RoundedInputs):
    """What transformers computes: experts' inputs stay as they are.

    Of dynamic scales, the inputs that a shared expert gets as two dimensions have one scale in all, since
    compressed-tensors 0.20 takes both dimensions for tokens' and leaves none. The test fails when that is mended.
    """

    def linear(self, name, values):
        if self.found is None and values.dim() == 2:
            return self._rounded(values, scales(values.abs().amax().reshape(1), self.args))
        return super().linear(name, values)

    def gate_up(self, layer, rows):
        return rows.values_RX

    def down(self, layer, rows):
        return rows.values_RX


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_transformers_computes_the_reference(tmp_path, variant, kind):
    made: Rounded = rounded(tmp_path, kind, **VARIANTS[variant])
    ids = token_ids(2, 9)
    model, args = made.model, made.scheme.input_activations
    before = model(ids).logits
    load_rounded(model, made.places, made.targets, made.written, made.scheme.weights)
    weights_alone = model(ids).logits
    with tapped(model, made.places, LinearInputs(args, made.inputs)):
        linears = model(ids).logits
    with tapped(model, made.places, RoundedInputs(args, made.inputs)):
        everything = model(ids).logits
    torch.testing.assert_close(loads(made.folder)(ids).logits, linears, rtol=0, atol=1e-5)
    assert not torch.allclose(linears, weights_alone, rtol=0, atol=1e-3)
    assert not torch.allclose(everything, linears, rtol=0, atol=1e-3)
    assert not torch.allclose(weights_alone, before, rtol=0, atol=1e-3)


def quantize_by_hand(values, scale):
    return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@torch.no_grad()
def test_the_reference_of_an_expert_is_the_formula(tmp_path):
    """One layer's experts, token by token, with each expert's own scales and with the largest."""
    made = rounded(tmp_path)
    load_rounded(made.model, made.places, made.targets, made.written, made.scheme.weights)
    experts = made.places.experts[1]
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 32, generator=generator)
    index = torch.tensor([[0, 3], [1, 2], [4, 0], [0, 1], [3, 4], [2, 2]])
    weights = torch.rand(6, 2, generator=generator)
    for inputs in (made.inputs, made.inputs.largest_of_layers()):
        want = torch.zeros_like(hidden)
        for token in range(6):
            for slot in range(2):
                expert = index[token, slot]
                x = quantize_by_hand(hidden[token], inputs.experts["gate_up"][1, expert])
                gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
                h = torch.nn.functional.silu(gate) * up
                h = quantize_by_hand(h, inputs.experts["down"][1, expert])
                want[token] += weights[token, slot] * (experts.down_proj[expert] @ h)
        with tapped(made.model, made.places, RoundedInputs(made.scheme.input_activations, inputs)):
            got = experts(hidden, index, weights)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_weights_before_and_after_are_counted(tmp_path):
    made = rounded(tmp_path)
    size = count_bytes(made.tensors, made.written)
    assert size.before == sum(tensor.nbytes for tensor in stored(tmp_path / "exported").values())
    assert size.after == sum(tensor.nbytes for tensor in stored(made.folder).values())


def test_an_expert_of_zeros_stays_one(tmp_path):
    model = exported_model(tmp_path)
    places = find_places(model)
    tensors = split_experts(read_tensors(tmp_path / "exported"), 5)
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    tensors |= state_tensors({name: torch.zeros(tensors[name].shape)})
    found = weight_scales(tensors, find_targets(tensors, places), make_scheme("dynamic").weights)
    scale = found[name.removesuffix(".weight")]
    assert scale.shape == (32, 1) and (scale > 0).all()
    assert to_fp8(torch.zeros(32, 24), scale, make_scheme("dynamic").weights).float().eq(0).all()


def test_what_cannot_be_held_or_found_is_refused(tmp_path):
    model = exported_model(tmp_path)
    places = find_places(model)
    tensors = split_experts(read_tensors(tmp_path / "exported"), 5)
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    broken = tensors | state_tensors({name: torch.full(tensors[name].shape, torch.nan)})
    with pytest.raises(ValueError, match=r"experts\.2\.down_proj\.weight has values that are not finite"):
        weight_scales(broken, find_targets(broken, places), make_scheme("static").weights)
    with pytest.raises(ValueError, match="29 of 30 matrices of experts"):
        find_targets({key: it for key, it in tensors.items() if key != name}, places)
    query = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=f"no {query}"):
        find_targets({key: it for key, it in tensors.items() if key != query}, places)
    assert observe(model, places, [documents(1)]).rows_NLE.sum() == 4  # one token suffices


def test_quantized_models_and_a_missing_library_are_refused(tmp_path, monkeypatch):
    made = rounded(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(made.folder).config
    with pytest.raises(ValueError, match="compressed-tensors: it is quantized already"):
        require_full_precision(config)
    monkeypatch.setattr("moe_backbone.quantization.scheme.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"otpo\[fp8\]"):
        require_compressed_tensors()
