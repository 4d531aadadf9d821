"""Packed models: what `tenfold pack` writes, `load_packed` maps and `tenfold unpack` undoes.

A packed model is a Hugging Face directory whose config.json has the quantization_config of
`tenfold.formats.Packing`, and whose safetensors hold one file a layer and one for the rest. Tensors have the
names of our model's state_dict:

    layers.3.mlp.experts.7            an expert's record (`record`), uint8
    layers.3.self_attn.q_proj.weight  a matrix's panels (`tenfold.panels`), uint8, zeros behind
    layers.3.input_layernorm.weight   all else, in float32 or bfloat16

Records and matrices come first in a file, each at a multiple of 4096 bytes, the experts of a layer in
order and nothing between them. `__metadata__` says under each tensor's name what it is and its CRC-32:
`q4 2048x1024 1f2e3d4c` is a record of hidden size 2048 and width 1024, or a matrix of 2048 rows.
"""
