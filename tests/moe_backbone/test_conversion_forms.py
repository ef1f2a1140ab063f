"""Conversions: every form of a checkpoint, what is left out, what is refused, folders that are whole or not there."""

import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from compass_helpers import FULL, SIZES, YARN, assert_same_state, compass_model, stored_keys
from conversion_helpers import assert_same_answers, exported, imported, loaded
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from moe_backbone import CompassForCausalLM
from moe_backbone.conversion.exporting import export_model
from moe_backbone.conversion.folders import new_folder
from moe_backbone.conversion.importing import import_model
from moe_backbone.conversion.targets import less_one, with_still_gates
from moe_backbone.conversion.tensors import LazyTensor, read_tensors, split_experts, state_tensors
from moe_backbone.conversion.verifying import answers, require_equal

# Forms of checkpoints


def deepspeed_form(state):
    """The experts as DeepSpeed's layer holds them, in three tensors."""
    spread = {}
    for name, tensor in state.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            spread[f"{prefix}.experts.w1"], spread[f"{prefix}.experts.w3"] = tensor.chunk(2, dim=1)
        elif kind == "down_proj":
            spread[f"{prefix}.experts.w2"] = tensor
        else:
            spread[name] = tensor
    return {name: tensor.contiguous() for name, tensor in spread.items()}


@pytest.mark.parametrize("form", ["packed", "deepspeed", "torch", "torch in two files"])
def test_every_form_of_a_checkpoint(tmp_path, form):
    model = compass_model(num_mtp_layers=1).eval()
    model.save_pretrained(tmp_path / "keys")
    exported(tmp_path / "keys", tmp_path / "want")
    folder = tmp_path / form
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if form == "packed":
        save_file(state, folder / "model.safetensors")
    elif form == "deepspeed":
        save_file(deepspeed_form(state), folder / "model.safetensors")
    elif form == "torch":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names = list(state)
        weight_map = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(names)}
        for file in set(weight_map.values()):
            torch.save({name: state[name] for name in names if weight_map[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    exported(folder, tmp_path / "got")
    got, want = (load_file(tmp_path / name / "model.safetensors") for name in ("got", "want"))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_files_of_old_torch_are_read(tmp_path):
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    read = read_tensors(tmp_path)
    assert list(read) == ["a", "b"] and all(torch.equal(read[name].whole(), state[name]) for name in state)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("form", ["object", "empty", "cut", "pointer", "list", "nested"])
def test_files_that_are_not_weights_are_refused_by_their_name(tmp_path, form, old):
    path = tmp_path / "pytorch_model.bin"
    found = {"object": {"a": Path("b")}, "list": [torch.ones(2)], "nested": {"model": {"a": torch.ones(2)}}}
    torch.save(found.get(form, {"a": torch.ones(2000)}), path, _use_new_zipfile_serialization=not old)
    if form in ("empty", "cut"):
        path.write_bytes(path.read_bytes()[: 0 if form == "empty" else 1000])
    elif form == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    message = "more than tensors by their names" if form in ("list", "nested") else "can't be read: it is damaged, or"
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin.*{message}"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_cannot_be_read_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.*`weight_map`.*Copy it again"):
        read_tensors(tmp_path)


def test_a_part_of_a_packed_tensor_is_read_alone(tmp_path):
    experts = torch.arange(24.0).reshape(2, 4, 3)
    save_file({"a.experts.gate_up_proj": experts}, tmp_path / "model.safetensors")
    split = split_experts(read_tensors(tmp_path), 2)
    assert list(split) == [f"a.experts.{e}.{name}.weight" for e in range(2) for name in ("gate_proj", "up_proj")]
    up = split["a.experts.1.up_proj.weight"]
    assert up.shape == (2, 3) and torch.equal(up.whole(), experts[1, 2:])
    with pytest.raises(ValueError, match="2 of 4 experts: the file is one process's part"):
        split_experts(read_tensors(tmp_path), 4)


def test_no_more_than_a_shard_is_in_memory(tmp_path):
    """Tensors that were read and still are in memory, whenever another one is read."""
    model = compass_model(num_shared_experts=1)
    alive, most, size = weakref.WeakSet(), [], 30_000

    def watched(tensor):
        def read(index):
            most.append(sum(it.nbytes for it in alive))
            found = tensor.read(index).clone()
            alive.add(found)
            return found

        return LazyTensor(tensor.shape, tensor.dtype, read)

    tensors = {name: watched(tensor) for name, tensor in state_tensors(model.state_dict()).items()}
    written = export_model(model.config, tensors, tmp_path / "out", max_shard_size=size)
    total = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert written.shards > 4 and total > 4 * size
    assert len(most) > 40 and max(most) <= size + max(it.nbytes for it in model.state_dict().values())


def test_a_tied_head_that_was_saved_is_left_out(tmp_path):
    model = compass_model(tie_word_embeddings=True)
    export_model(model.config, state_tensors(model.state_dict()), tmp_path / "out")
    assert "lm_head.weight" not in stored_keys(tmp_path / "out")
    assert loaded(tmp_path / "out").lm_head.weight.shape == (61, 32)


def test_weights_in_another_dtype(tmp_path):
    model = compass_model()
    model.save_pretrained(tmp_path / "compass")
    assert exported(tmp_path / "compass", tmp_path / "out", dtype=torch.bfloat16).dtype is torch.bfloat16
    got, want = loaded(tmp_path / "out", dtype="auto"), loaded(tmp_path / "compass", dtype=torch.bfloat16)
    assert_same_state(got, want)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_older_readers_find_their_names(tmp_path):
    compass_model(rope_parameters=YARN, max_position_embeddings=128).save_pretrained(tmp_path / "compass")
    exported(tmp_path / "compass", tmp_path / "out")
    options = json.loads((tmp_path / "out" / "config.json").read_text())
    assert options["num_experts"] == options["num_local_experts"] == 5
    assert options["rope_theta"] == 10_000.0 and options["head_dim"] == 8
    assert options["rope_scaling"] == {name: value for name, value in YARN.items() if name != "rope_theta"}
    assert options["rope_parameters"] == YARN
    assert options["torch_dtype"] == options["dtype"] == "float32"
    # What vLLM's qwen3_moe.py reads of the configuration.
    read = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim rms_norm_eps"
    read += (
        " hidden_act max_position_embeddings attention_bias rope_theta rope_scaling num_experts num_experts_per_tok"
    )
    read += " moe_intermediate_size intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers pad_token_id"
    assert {*read.split(), "tie_word_embeddings"} <= options.keys()


# Biases and shared experts


@pytest.mark.parametrize("bias", [0.0, 0.25])
def test_biases_that_choose_nothing_are_left_out(tmp_path, bias):
    model = compass_model(router_bias_update_speed=0.1).eval()
    for router in model.model.routers:
        router.e_score_correction_bias.fill_(bias)
    model.save_pretrained(tmp_path / "compass")
    written = exported(tmp_path / "compass", tmp_path / "out")
    assert any("the routers' biases" in note for note in written.left_out)
    assert any("`router_bias_update_speed=0.1`: it only teaches" in note for note in written.left_out)
    assert_same_answers(loaded(tmp_path / "out"), model)


def test_biases_of_mtp_layers_do_not_count(tmp_path):
    model = compass_model(router_bias_update_speed=0.1, num_mtp_layers=1).eval()
    for router in model.model.routers[:2]:
        router.e_score_correction_bias.fill_(0.0)
    model.save_pretrained(tmp_path / "compass")
    exported(tmp_path / "compass", tmp_path / "out")
    assert_same_answers(loaded(tmp_path / "out"), model)


def test_biases_where_all_experts_are_taken(tmp_path):
    model = compass_model(router_bias_update_speed=0.1, num_experts=3, num_experts_per_tok=3).eval()
    model.save_pretrained(tmp_path / "compass")
    exported(tmp_path / "compass", tmp_path / "out")
    assert_same_answers(loaded(tmp_path / "out"), model)


def test_shared_experts_in_bfloat16_are_refused_or_widened(tmp_path):
    compass_model(num_shared_experts=1).save_pretrained(tmp_path / "float32")
    model = CompassForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight[0] = 0.01  # less 1, bfloat16 has it as 0.0117
    model.save_pretrained(tmp_path / "compass")
    with pytest.raises(ValueError, match=r"bfloat16 rounds by 0\.00\d+: .*Set `--dtype float32`"):
        exported(tmp_path / "compass", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    exported(tmp_path / "compass", tmp_path / "out", dtype=torch.float32)
    assert_same_answers(
        loaded(tmp_path / "out"), CompassForCausalLM.from_pretrained(tmp_path / "compass", dtype=torch.float32).eval()
    )


def test_norms_and_gates_of_qwen3_next():
    weight = torch.tensor([-3.0, 0.0, 1e-6, 0.3, 1.0, 7.7, 50.0])
    torch.testing.assert_close(1 + less_one("norm", weight), weight, rtol=1.2e-7, atol=1.2e-7)
    gated = with_still_gates(torch.arange(1.0, 9.0).reshape(4, 2), head_dim=2)
    assert gated.tolist() == [[1, 2], [3, 4], [0, 0], [0, 0], [5, 6], [7, 8], [0, 0], [0, 0]]


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"router_bias_update_speed": 0.1},
            r"model\.layers\.0\.mlp\.gate\.e_score_correction_bias and 1 more: routers",
        ),
        (FULL, "e_score_correction_bias and 1 more: routers with biases"),
        ({"hidden_act": "gelu"}, "`hidden_act=gelu`"),
        ({"attention_bias": True}, "`attention_bias=True`"),
        ({"sliding_window": 8}, "`sliding_window=8`"),
        ({"use_qk_norm": False, "num_shared_experts": 1}, "`num_shared_experts=1` with `use_qk_norm=False`"),
        ({"use_qk_norm": False, "norm_topk_prob": False}, "`norm_topk_prob=False` with `use_qk_norm=False`"),
    ],
    ids=str,
)
def test_what_would_answer_otherwise_is_not_exported(tmp_path, changes, message):
    model = compass_model(**changes)
    with pytest.raises(ValueError, match=message):
        export_model(model.config, state_tensors(model.state_dict()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_only_layers": [1]}, r"layer\(s\) 1 are dense"),
        ({"decoder_sparse_step": 2}, r"layer\(s\) 0 are dense"),
        ({"use_sliding_window": True, "sliding_window": 16}, "`sliding_window=16`"),
        ({"quantization_config": {"quant_method": "fp8"}}, "`quantization_config`"),
        ({"num_experts_per_tok": 6}, "`num_experts_per_tok=6` is above `num_experts=5`"),
        ({"architectures": ["Qwen3MoeForMorphing"]}, "there is no CompassForMorphing"),
    ],
    ids=str,
)
def test_what_compass_lacks_is_not_imported(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        import_model(Qwen3MoeConfig(**{**SIZES, **changes}), {}, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MixtralConfig(sliding_window=4096), "`sliding_window=4096`"),
        (Qwen2MoeConfig(), "`model_type=qwen2_moe`"),
    ],
    ids=["window", "another architecture"],
)
def test_other_models_are_not_imported(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        import_model(config, {}, tmp_path / "out")


def test_checkpoints_that_are_not_whole(tmp_path):
    model = compass_model()
    tensors = state_tensors(model.state_dict())
    without = {name: tensor for name, tensor in tensors.items() if "norm" not in name}
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.\S+norm\.weight and 8 more"):
        export_model(model.config, without, tmp_path / "out")
    with pytest.raises(ValueError, match=r"has, beside what the model has, value_head\.weight: its config"):
        export_model(model.config, {**tensors, "value_head.weight": tensors["lm_head.weight"]}, tmp_path / "out")
    model.config.vocab_size = 62
    with pytest.raises(ValueError, match=r"has the shape \[61, 32\], its config.json describes \[62, 32\]"):
        export_model(model.config, tensors, tmp_path / "out")
    with pytest.raises(ValueError, match="has no weights"):
        read_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    with pytest.raises(ValueError, match=r"names b\.safetensors, which is not there"):
        read_tensors(tmp_path)
    save_file({"c": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="names a, which its file does not have"):
        read_tensors(tmp_path)


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").touch()
        assert not any((tmp_path / "empty").iterdir())
    assert (tmp_path / "empty" / "file").is_file()
    with pytest.raises(ValueError, match="is there already"), new_folder(tmp_path / "empty"):
        pass
    with pytest.raises(KeyError), new_folder(tmp_path / "deep" / "one"):
        raise KeyError
    assert not list((tmp_path / "deep").iterdir())


def test_a_link_is_followed_to_an_empty_folder_alone(tmp_path):
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
        (tmp_path / f"to {name}").symlink_to(name)
    (tmp_path / "full" / "file").touch()
    (tmp_path / "to nothing").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    with new_folder(tmp_path / "to empty") as folder:
        (folder / "weights").touch()
    assert (tmp_path / "to empty").is_symlink() and (tmp_path / "empty" / "weights").is_file()
    for name, message in (
        ("to nothing", "is a link to nothing, which is not there"),
        ("to full", "is there already"),
        ("pipe", "is there already"),
    ):
        with pytest.raises(ValueError, match=message), new_folder(tmp_path / name):
            pytest.fail("something was written")


@pytest.mark.parametrize("convert", ["export", "import"])
def test_a_folder_that_is_refused_when_it_is_checked_gets_no_name(tmp_path, convert):
    def refuse(folder, written):
        assert (folder / "config.json").is_file() and written.source
        raise ValueError("no")

    compass_model().save_pretrained(tmp_path / "compass")
    exported(tmp_path / "compass", tmp_path / "served")
    source, function = ("compass", exported) if convert == "export" else ("served", imported)
    with pytest.raises(ValueError, match="no"):
        function(tmp_path / source, tmp_path / "out", check=refuse)
    assert {path.name for path in tmp_path.iterdir()} == {"compass", "served"}


def test_verifying_tells_models_apart(tmp_path):
    left = answers(compass_model())
    assert require_equal(left, answers(compass_model())) == 0.0
    with pytest.raises(ValueError, match="logits differ by up to"):
        require_equal(left, answers(compass_model(seed=1)))
    with pytest.raises(ValueError, match="logits differ by up to nan"):
        require_equal(left, left * float("nan"))
