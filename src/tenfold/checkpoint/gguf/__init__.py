"""Models as GGUF files, llama.cpp's format: read, never written.

`reader` opens the container, `architectures` turns its metadata into a ModelConfig, and `slots` says
where its tensors go.
"""
