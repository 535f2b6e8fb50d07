"""What generated TeleChat checkpoints of each generation have, for `tests.factories.write_checkpoint`."""

SEVENTH = {"num_kv_heads": 4, "rope_base_length": None}
"""Settings as those of TeleChat-7B: tied, a head of keys for each of queries, no base length."""
TWELFTH = {**SEVENTH, "tied_head": False}
"""TeleChat-12B."""
SECOND = {"tied_head": False}
"""TeleChat2 with grouped heads, as the 115B has them."""
MIXTURE = {"tied_head": False, "num_kv_heads": 4}
"""TeleChat2-39B-A12B; or a smaller TeleChat2."""
CODE = {"AutoModelForCausalLM": "modeling_telechat.TelechatForCausalLM"}
"""`auto_map` of the series."""
