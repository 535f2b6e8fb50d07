"""Serves a bundle from one device: tokens of many variants in one batch, over one expert pool.

Deals in token ids; knows nothing of text and HTTP. For other rooms: `engine.Engine`,
`options.EngineOptions`, `request` (requests and outputs), `sampling.Sampling`, `weights.Swap`,
`metrics.Snapshot`, and `service.EngineService`, an engine on a thread of its own.
"""
