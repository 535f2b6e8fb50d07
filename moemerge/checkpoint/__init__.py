"""Reads and writes checkpoints: hub download, safetensors, family descriptions, tensors by role.

Knows nothing of similarity or merging. For other rooms: `variants.open_variants`,
`checkpoint.Checkpoint`, `tensors.TensorReader`, `headers.StoredTensor`, `writer.write_tensors`,
`tokenizer.load_tokenizer`, and the hub through `hub`.
"""
