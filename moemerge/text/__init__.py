"""Text in, text out, over an engine: tokenizers, chat templates, stop strings, answers, request files.

For other rooms: `variants.VariantText` and `variants.BundleText`, `answers.answer` and
`answers.RunningAnswer`, `limits`, `request_files.run_request_file`. Knows nothing of HTTP.
"""
