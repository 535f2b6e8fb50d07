"""Serves a bundle from one device: the engine, swapping of variants, sampling.

Deals in token ids; knows nothing of text and HTTP. For other rooms: `engine.Engine`,
`engine.Swap`, `sampling.Sampling`.
"""
