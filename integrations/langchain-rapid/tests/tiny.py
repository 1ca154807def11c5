"""Random models that take milliseconds, with a tokenizer of one token a character."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from rapid_llm.decoder import RapidDecoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WINDOW = 2048
BOS, EOS = "<s>", "</s>"
TEMPLATE = (
    "<s>{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"


def tiny_model(
    seed: int = 0, *, vocab_size: int = len(_CHARACTERS) + 2, window: int = WINDOW
) -> LlamaForCausalLM:
    """Two layers in float32; greedily decoded, it never ends by itself."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        initializer_range=0.4,  # logits that differ, so that a wrong token shows
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[:2] = 0.0  # BOS and EOS: some other token is always likelier
    return model


def tiny_tokenizer(*, every_byte: bool = False) -> PreTrainedTokenizerFast:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = [byte_level.pre_tokenize_str(character)[0][0] for character in _CHARACTERS]
    if every_byte:  # for texts that are not English
        names = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {BOS: 0, EOS: 1} | {name: i + 2 for i, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(  # so that a second BOS would show
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_decoder(seed: int = 0) -> RapidDecoder:
    return RapidDecoder(tiny_model(seed), tiny_tokenizer(), name=f"tiny-{seed}")


def save_tiny_model(folder: Path, seed: int = 0) -> str:
    """A folder that transformers loads."""
    tiny_model(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
