"""The bundle on disk: manifest, writer, reader, verification, export and model card.

Knows the format (`docs/bundle-format.md`) and nothing of how a plan was found. For other rooms:
`manifest.Manifest`, `reader.Bundle`, `writer`, `verify.verify_bundle`, `export.export_variant`.
"""
