"""GPT-2 and Llama with a transformers model's weights give its logits and its gradients."""

import pytest
import torch

from core.errors import UserError
from model.interop.transformers import (
    from_transformers,
    gpt2_config,
    gpt2_state,
    llama_config,
    llama_state,
)
from tests.references import import_transformers


def gpt2(**changes):
    library = import_transformers()
    shape = {"n_embd": 24, "n_layer": 3, "n_head": 4, "vocab_size": 61, "n_positions": 40}
    return randomised(library.GPT2LMHeadModel(library.GPT2Config(**shape, **changes)))


def llama(**changes):
    library = import_transformers()
    shape = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "vocab_size": 61,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return randomised(library.LlamaForCausalLM(library.LlamaConfig(**{**shape, **changes})))


@torch.no_grad()
def randomised(model):
    """Every parameter is moved, so that none agrees by being zero or one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


CASES = {
    "gpt2": (gpt2, gpt2_state, {}),
    "gpt2 untied, exact gelu": (
        gpt2, gpt2_state,
        {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 50},
    ),
    "llama": (llama, llama_state, {}),
    "llama tied, biased, wide heads": (
        llama, llama_state,
        {
            "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 10,
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_and_one_training_steps_gradients(case):
    make, mapped, changes = CASES[case]
    theirs = make(**changes)
    ours = from_transformers(theirs).eval()
    ids = torch.randint(0, 61, (2, 38), generator=torch.Generator().manual_seed(1))
    tokens, targets = ids[:, :-1], ids[:, 1:]

    expected = theirs(tokens).logits
    torch.testing.assert_close(ours({"tokens": tokens}).logits, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1, "logits too even to tell anything"

    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    ours({"tokens": tokens, "targets": targets}).token_losses.mean().backward()
    # A tied head is one parameter there as here.
    gradients = mapped({name: p.grad for name, p in theirs.named_parameters()})
    own = dict(ours.named_parameters())
    assert set(gradients) == set(own)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        # A bias on the keys moves all scores of a query alike, so its gradient is rounding alone.
        scale = max(gradient.abs().max(), 1e-3 * largest)
        error = (own[name].grad - gradient).abs().max() / scale
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_a_bare_models_checkpoint_loads_too():
    theirs = gpt2()
    bare = theirs.transformer.state_dict()
    assert gpt2_state(bare).keys() | {"head.weight"} == gpt2_state(theirs.state_dict()).keys()


def test_config_json_is_enough():
    config = gpt2_config({"model_type": "gpt2", **import_transformers().GPT2Config().to_dict()})
    assert config["block"]["feedforward"]["width"] == 3072 and config["max_length"] == 1024


def test_what_has_no_counterpart_is_named():
    scaled = import_transformers().LlamaConfig().to_dict()
    scaled["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    with pytest.raises(UserError, match="rope_type 'llama3'"):
        llama_config(scaled)
    with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx: True"):
        gpt2_config(import_transformers().GPT2Config(scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(UserError, match="model_type 'llama' is not a gpt2"):
        gpt2_config(import_transformers().LlamaConfig())
    with pytest.raises(UserError, match="activation_function: 'mish'"):
        gpt2_config(import_transformers().GPT2Config(activation_function="mish"))
    state = llama().state_dict()
    with pytest.raises(UserError, match=r"hold 'adapter\.weight'"):
        llama_state({**state, "adapter.weight": torch.zeros(1)})
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"lack 'layers\.1\.mlp\.up_proj\.weight'"):
        llama_state(state)
