"""All figures as one table, and with the machine as JSON."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("moemerge", "torch", "transformers", "trl", "peft")


def machine(threads: int) -> dict[str, object]:
    """What it was measured on."""
    return {
        "processor": processor(),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit(),
    }


def processor() -> str:
    """Its name, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if "model name" in line] if path.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def commit() -> str | None:
    """Of this repository, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def write(path: Path, figures: dict) -> None:
    """As JSON."""
    path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tables(stages: list[dict], family: dict) -> str:
    """As Markdown."""
    return "\n\n".join((stage_table(stages), family_table(family), answer_table(family), served(family)))


def stage_table(stages: list[dict]) -> str:
    """Every stage by its own metrics, on data kept from training."""
    rows = [
        (
            stage["name"] if index == 0 else "",
            figure["metric"],
            f"{figure['before']:.3f}",
            f"{figure['after']:.3f}",
        )
        for stage in stages
        for index, figure in enumerate(stage["figures"])
    ]
    times = [
        (stage["name"], stage["trainer"], f"{stage['wall_s']:.0f} s", f"{stage['cpu_s']:.0f} s")
        for stage in stages
    ]
    return (
        table(("stage", "metric", "before", "after"), rows)
        + "\n\n"
        + table(("stage", "trainer", "wall time", "processor time"), times)
    )


def family_table(family: dict) -> str:
    """What the bundle keeps of every variant."""
    rows = [
        (name, *(f"{found[key]:.3f}" for key in ("base_nll", "original_nll", "nll", "gain", "kl")))
        for name, found in family["eval"]["variants"].items()
    ]
    columns = ("variant", "base NLL", "original NLL", "bundle NLL", "gain recovered", "KL to original")
    return table(columns, rows)


def answer_table(family: dict) -> str:
    """Right answers by itself and from the bundle."""
    rows = [
        (name, f"{found['by itself']:.3f}", f"{found['from the bundle']:.3f}")
        for name, found in family["answers"].items()
    ]
    return table(("variant", "right by itself", "right from the bundle, mixed batches"), rows)


def served(family: dict) -> str:
    """What came back over HTTP."""
    return "\n".join(f"{name}: {text!r}" for name, text in family["served"].items())


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Rows as Markdown."""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
