"""Settings that all trainers share."""

from pathlib import Path
from typing import Any

SEED = 0


def arguments(out: Path, *, steps: int, rate: float, batch: int) -> dict[str, Any]:
    """Arguments for whatever is derived from `TrainingArguments`: on the CPU, in float32, no checkpoints."""
    return {
        "output_dir": str(out / "trainer"),
        "max_steps": steps,
        "learning_rate": rate,
        "per_device_train_batch_size": batch,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "weight_decay": 0.01,
        "logging_steps": max(1, steps // 20),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
