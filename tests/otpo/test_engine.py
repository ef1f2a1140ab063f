"""What the commands say of a quantized model."""

import torch
from cli_helpers import arguments
from compass_helpers import compass_model
from torch.testing._internal.two_tensor import TwoTensor

from otpo.cli import align
from otpo.cli.launching.engine import describe_run, weight_bytes


def int8(*shape):
    return torch.nn.Parameter(torch.zeros(shape, dtype=torch.int8), requires_grad=False)


def test_bytes_of_quantized_and_of_plain_weights():
    model = compass_model(num_hidden_layers=1, tie_word_embeddings=True)
    nothing, plain = weight_bytes(model)
    assert nothing == {} and sum(plain.values()) == sum(value.nbytes for value in model.parameters())
    assert plain["CompassExperts"] == 5 * 3 * 24 * 32 * 4 and next(iter(plain)) == "CompassExperts"
    attention, linear = model.model.layers[0].self_attn, plain["Linear"]
    attention.q_proj.weight = int8(32, 32)  # as bitsandbytes
    attention.k_proj.weight = torch.nn.Parameter(torch.zeros(16, 32).to(torch.float8_e4m3fn), requires_grad=False)
    two = TwoTensor(int8(16, 32).data, int8(16, 32).data)  # as torchao, one that is made of others
    attention.v_proj.weight = torch.nn.Parameter(two, requires_grad=False)
    attention.o_proj.weight = None  # as GPTQ
    attention.o_proj.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))
    attention.register_buffer("causal", torch.ones(64, 64, dtype=torch.bool))
    quantized, plain = weight_bytes(model)
    assert quantized == {"Linear": 32 * 32 + 16 * 32 + 16 * 32 * 2 + 4 * 32 * 4}
    assert plain.get("Linear", 0) == linear - (32 + 16 + 16 + 32) * 32 * 4


def test_a_run_says_what_was_quantized(compass_folder, pairs_file, tmp_path, own_process):

    parsed = align.make_parser().parse_args_into_dataclasses(
        arguments(compass_folder, pairs_file, tmp_path), look_for_args_file=False
    )
    trainer = align.make_trainer(*parsed)
    assert "quantized" not in describe_run(trainer, "model")
    for layer in trainer.model.model.layers:
        layer.self_attn.q_proj.weight = int8(32, 32)
    line = describe_run(trainer, "model")["quantized"]
    assert line.startswith("3.0 KiB in Linear; left as it was: ") and "KiB in CompassExperts" in line
