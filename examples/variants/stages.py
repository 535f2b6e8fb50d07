"""The stages in their order, each made once, and again when what it starts from has changed."""

import contextlib
import hashlib
import importlib
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sizes import Size

RECORD, WEIGHTS = "training.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class Stage:
    """One training stage.

    Attributes:
        name: Of the checkpoint that it makes.
        start: The checkpoint that it starts from.
        module: Has `train(start, out, size)`.
        trainer: Whose class does the work.
    """

    name: str
    start: str | None
    module: str
    trainer: str


STAGES = (
    Stage("base", None, "pretrain", "transformers Trainer"),
    Stage("code", "base", "domain", "transformers Trainer"),
    Stage("chat", "base", "chat", "TRL SFTTrainer"),
    Stage("preferred", "chat", "prefer", "TRL DPOTrainer, PEFT LoRA"),
    Stage("thinker-start", "base", "think", "TRL SFTTrainer"),
    Stage("thinker", "thinker-start", "reason", "TRL GRPOTrainer"),
)


def make(stage: Stage, out: Path, size: Size) -> dict:
    """Train a stage unless that was done from the same start; its record.

    Raises:
        SystemExit: The folder was made at another size.
    """
    folder, start = out / stage.name, out / stage.start if stage.start else None
    start_sha256 = hashlib.sha256((start / WEIGHTS).read_bytes()).hexdigest() if start else None
    if (folder / RECORD).is_file():
        record = json.loads((folder / RECORD).read_text())
        if record["size"] != asdict(size):
            sys.exit(f"error: {folder} was made with other settings; choose another folder with -o")
        if record["start_sha256"] == start_sha256:
            return record
        shutil.rmtree(folder)
    print(
        f"{stage.name}: {stage.trainer}, from {stage.start or 'fresh weights'}", file=sys.stderr, flush=True
    )
    staging = out / f".{stage.name}.staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    wall_s, cpu_s = time.monotonic(), time.process_time()
    train = importlib.import_module(stage.module).train
    with contextlib.redirect_stdout(sys.stderr):  # where trainers print their progress
        figures = train(start, staging, size)
    record = {
        **asdict(stage),
        "start_sha256": start_sha256,
        "wall_s": time.monotonic() - wall_s,
        "cpu_s": time.process_time() - cpu_s,
        "figures": [asdict(figure) for figure in figures],
        "size": asdict(size),
    }
    (staging / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    staging.rename(folder)
    return record
