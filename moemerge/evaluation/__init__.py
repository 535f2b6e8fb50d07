"""Quality: perplexity on text and accuracy on tasks, of checkpoints, bundles and baselines.

Knows nothing of HTTP. For other rooms: `models.Scored`, `perplexity`, `tasks`, `baselines`.
"""
