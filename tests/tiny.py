"""Tiny random models of the transformers library, with a tokenizer and adapters, for tests."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

if TYPE_CHECKING:
    from bayes_dispatch.dispatcher.estimator import Dispatcher
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
    from bayes_dispatch.model.transformers.backbone import TransformersBackbone

VOCABULARY = 270
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    **SPECIAL,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
JAMBA: dict[str, Any] = {
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
GRANITE: dict[str, Any] = {
    "layer_types": ["mamba", "attention"] * 2,
    "num_local_experts": 0,
    "shared_intermediate_size": 64,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.3,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.2,
}
KINDS = ("llama", "qwen3", "gemma3", "granite", "falconh1", "jamba", "bamba", "mamba2", "gpt2")


def tiny_config(kind: str) -> Any:
    """A configuration of four blocks."""
    if kind == "llama":
        return LlamaConfig(**SIZES)
    if kind == "qwen3":
        return Qwen3Config(**SIZES, head_dim=8)
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention"] * 2
        return Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6, layer_types=layers)
    if kind == "granite":
        return GraniteMoeHybridConfig(**SIZES, **GRANITE, **MAMBA)
    if kind == "falconh1":
        return FalconH1Config(**SIZES, mamba_d_ssm=64, **MAMBA)
    if kind == "jamba":
        return JambaConfig(**SIZES, **JAMBA)
    if kind == "bamba":
        return BambaConfig(**SIZES, attn_layer_indices=[1, 3], **MAMBA)
    if kind == "mamba2":
        sizes = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}
        return Mamba2Config(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, **sizes, **SPECIAL)
    assert kind == "gpt2"
    return GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, **SPECIAL)


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A random model, whose vectors are not all ones and zeros either."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                else:
                    parameter.mul_(3.0)  # so that predictions differ from even ones
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with a beginning token that is put before a text, and a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: 3 + n for n, letter in enumerate(letters)}}
    merges = [("a", "b"), ("t", "h"), ("Ġ", "a"), ("th", "e"), ("1", "2")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    from tokenizers.processors import TemplateProcessing

    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_backbone(kind: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0) -> "TransformersBackbone":
    """A model and its tokenizer."""
    from bayes_dispatch.model.transformers.backbone import TransformersBackbone

    return TransformersBackbone(tiny_model(kind, dtype, seed), tiny_tokenizer(), f"tiny/{kind}")


def tiny_converted(kind: str, dtype: torch.dtype = torch.float64) -> "MambaFormerForCausalLM":
    """A MambaFormer that a model was converted to: of hybrids, half of each head is turned."""
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM
    from bayes_dispatch.model.transformers.tokenizer import TransformersTokenizer

    tokenizer = TransformersTokenizer(tiny_tokenizer(), VOCABULARY, [2])
    return MambaFormerForCausalLM.from_transformers(tiny_model(kind, dtype), tokenizer=tokenizer)


def tiny_adapter(
    directory: Path,
    kind: str = "llama",
    seed: int = 0,
    *,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    **settings: Any,
) -> Any:
    """Save a random LoRA adapter of the tiny model, and give PEFT's model of it, in float64."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(100 + seed)
        config = LoraConfig(
            target_modules=list(targets), init_lora_weights=False, **{"r": 4, "lora_alpha": 6, **settings}
        )
        model = get_peft_model(tiny_model(kind), config, autocast_adapter_dtype=False).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory, save_embedding_layers=False)
    return model


def dispatcher_of(names: tuple[str, ...], model: Any, tokenizer: Any) -> "Dispatcher":
    """One that is fitted, coarsely, to what comes out of the first block."""
    from bayes_dispatch.dispatcher.estimator import Dispatcher
    from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
    from bayes_dispatch.dispatcher.fitting.svi import SVISettings
    from bayes_dispatch.inference.two_pass.first_pass import first_pass

    labels = np.arange(30) % 3
    texts = [("ab>ba\n", "ba>ab\n", "1+2=3\n")[label] * (1 + i % 4) for i, label in enumerate(labels)]
    evidence = first_pass(model, tokenizer, texts, cut=1).evidence
    features = FeatureSettings(dimensions=4, folds=2)
    return Dispatcher(names, svi=SVISettings(steps=40, rounds=1), features=features).fit(evidence, labels)
