"""OpenAI's HTTP API over one engine: `moemerge serve`.

Deals in text and HTTP; knows nothing of tensors. For other rooms: `program.serve_bundle`,
`options.ServerOptions`, `keys.read_keys`. Needs the extra `serve`.
"""
