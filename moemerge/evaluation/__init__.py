"""Quality: what bundles and checkpoints score on text and tasks, and methods compared at equal bytes.

Knows nothing of HTTP and terminals. For other rooms: `evaluating.evaluate`, `comparison.compare`,
`selection` to open what they take, `curves.draw_curves`, and `demo.run_demo`.
"""
