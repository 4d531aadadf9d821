"""A byte-level vocabulary of any size for models of random weights, as both sides of a benchmark want it."""

import json
from pathlib import Path

import gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END = "<|end|>"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def tokens(size: int) -> list[str]:
    """The 256 bytes, made-up words, and the token that ends a text."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*bytes_, *(f"Ġw{number}" for number in range(size - len(bytes_) - 1)), END]


def write_tokenizer(directory: Path, size: int, chat: bool = False) -> None:
    """tokenizer.json and tokenizer_config.json. Text becomes bytes: no merges lead to the words."""
    vocabulary = {token: index for index, token in enumerate(tokens(size))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": END} | ({"chat_template": TEMPLATE} if chat else {})
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def add_to_gguf(writer: gguf.GGUFWriter, size: int) -> None:
    types = [gguf.TokenType.NORMAL] * (size - 1) + [gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens(size))
    writer.add_token_types(types)
    writer.add_token_merges(["Ġ w"])  # the list may not be empty; it leads to no other token
    writer.add_eos_token_id(size - 1)
