"""llama.cpp, through llama-cpp-python's low-level API, behind the interface that tenfold's runners have."""

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from torch import Tensor

MICRO_BATCH = 512
"""Tokens computed at once: llama.cpp's own default."""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(_level: int, _text: bytes, _data: Any) -> None:
    """It writes hundreds of lines while loading."""


llama_cpp.llama_log_set(_silent, None)
llama_cpp.llama_backend_init()


class LlamaRunner:
    def __init__(self, file: Path, batch: int, capacity: int, threads: int, mapped: bool = False):
        """`batch` sequences of up to `capacity` tokens each, with all other settings llama.cpp's own;
        `mapped` keeps it to the file's pages, where otherwise it repacks weights into memory of its own."""
        settings = llama_cpp.llama_model_default_params()
        settings.use_extra_bufts = not mapped
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
        if not self.model:
            raise SystemExit(f"{file}: llama.cpp cannot load it")
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = batch
        params.n_ctx = batch * -(-capacity // 256) * 256
        params.n_batch = batch * capacity
        params.n_ubatch = MICRO_BATCH
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"{file}: llama.cpp cannot make a context")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.tokens = llama_cpp.llama_batch_init(batch * capacity, 0, 1)
        self.position = 0

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Append the tokens; logits (B, V) after the last."""
        sequences, new = ids_BS.shape
        batch = self.tokens
        batch.n_tokens = sequences * new
        for index, token in enumerate(ids_BS.flatten().tolist()):
            sequence, offset = divmod(index, new)
            batch.token[index] = token
            batch.pos[index] = self.position + offset
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = offset == new - 1
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp could not decode")
        self.position += new
        last = range(new - 1, sequences * new, new)
        rows = [llama_cpp.llama_get_logits_ith(self.context, index) for index in last]
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows]))

    def reset(self) -> None:
        """Forget every token."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.position = 0

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.tokens)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def quantize(source: Path, target: Path, kind: str, pure: bool = False) -> None:
    """`source` in another format, such as Q4_K_M; `pure` is that format for all matrices."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.pure = pure
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise SystemExit(f"llama.cpp could not quantise {source} to {kind}")
