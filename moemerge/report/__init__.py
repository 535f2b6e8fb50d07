"""What was measured and decided, to be looked at: in a terminal, for machines, and as one HTML page.

Knows nothing of how numbers were made, and reads no weights. For other rooms: `reading.open_report`,
`views.VIEWS`, `html.write_report`.
"""
