import gc
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may touch the network
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # what one run caches must not be there in the next

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before `helpers` imports Triton: its kernels run on the CPU

from helpers import IMAGE_TEMPLATE, MARKED_TEMPLATE, make_pairs, make_tokenizer, save_model


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def own_process(monkeypatch, tmp_path_factory):
    """What a launcher leaves in the environment is gone, and data is cached nowhere but in this run."""
    for name in list(os.environ):
        if name == "LOCAL_RANK" or name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def tiny_sizes(tokenizer):
    """The shape of the text model in each of the tiny models; its weights are large enough to tell tokens apart."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    }


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory):
    """A random two-layer Qwen3 with its tokenizer, as a folder that `from_pretrained` reads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(**tiny_sizes(tokenizer))
    return save_model(Qwen3ForCausalLM(config), tmp_path_factory.mktemp("qwen3"), tokenizer)


@pytest.fixture(scope="session")
def other_model_folder(tokenizer, model_folder, tmp_path_factory):
    """The model of `model_folder` with other random weights, for a reference that is not the policy."""
    from transformers import AutoConfig, Qwen3ForCausalLM

    torch.manual_seed(1)
    model = Qwen3ForCausalLM(AutoConfig.from_pretrained(model_folder))
    return save_model(model, tmp_path_factory.mktemp("other_qwen3"), tokenizer)


@pytest.fixture(scope="session")
def moe_folder(tokenizer, tmp_path_factory):
    """A random two-layer Qwen3-MoE of four experts, two of them active."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **tiny_sizes(tokenizer),
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.1,
        output_router_logits=True,
    )
    return save_model(Qwen3MoeForCausalLM(config), tmp_path_factory.mktemp("qwen3_moe"), tokenizer)


@pytest.fixture(scope="session")
def compass_folder(tmp_path_factory):
    """A random Compass model of two layers, four experts and an MTP layer; its chat template marks the answers."""
    from moe_backbone import CompassConfig, CompassForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = MARKED_TEMPLATE
    sizes = {name: size for name, size in tiny_sizes(tokenizer).items() if name != "intermediate_size"}
    config = CompassConfig(
        **sizes,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_mtp_layers=1,
        router_aux_loss_coef=0.1,
    )
    return save_model(CompassForCausalLM(config), tmp_path_factory.mktemp("compass"), tokenizer)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    make_pairs(12).to_json(path)
    return str(path)


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory):
    """A random Llava: a two-layer CLIP tower of four patches an image before a two-layer Qwen3, and its processor."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen3Config,
    )

    torch.manual_seed(0)
    tokenizer = make_tokenizer()  # one of its own: saving a processor marks its tokenizer
    text = Qwen3Config(**tiny_sizes(tokenizer))
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("llava")
    save_model(LlavaForConditionalGeneration(config), folder, tokenizer)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=IMAGE_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return str(folder)


def pytest_collection_finish(session):
    # Every `train()` collects garbage, half of a tiny run's time while all imported modules are looked through.
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption("--first-cases", action="store_true", help="of a parametrized test, run its first case alone")


@pytest.hookimpl(trylast=True)  # when -m and -k have chosen
def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if config.getoption("first_cases"):
        first = {(item.path, item.originalname): item for item in reversed(items)}
        left_out = [item for item in items if first[item.path, item.originalname] is not item]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if first[item.path, item.originalname] is item]
