"""Quality: perplexity on text and accuracy on tasks, of checkpoints, bundles and baselines.

Knows nothing of HTTP. For other rooms: `loading.load_model`,
`loading.average_models`, `perplexity`, `tasks`, and `demo.run_demo`.
"""
