"""The family in one bundle: what moemerge's commands say about it, and what its variants answer from it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import chat
import corpus
import httpx
import sums
import world
from measuring import ask
from model import load_model, load_tokenizer
from sizes import Size
from training import SEED

VARIANTS = {
    "code": ("code",),
    "chat": ("chat",),
    "preferred": ("chat", "preferred/adapter"),
    "thinker": ("thinker",),
}
"""Folders of a source, the second one with an adapter to the first."""
BUDGET = "1x"
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A held-out question to a variant, and who tells whether an answer is right."""

    variant: str
    text: str
    is_right: Callable[[str], bool]


def consolidate(out: Path, size: Size) -> dict:
    """Calibrate, merge, verify and measure; then the held-out questions in mixed batches, and over HTTP."""
    bundle = out / "family.moe"
    tests, calibration = (write_texts(out, size, held_out=held_out) for held_out in (True, False))
    variants = [f"{name}={'+'.join(str(out / part) for part in parts)}" for name, parts in VARIANTS.items()]
    base = ["--base", out / "base"]
    tokens = ["--tokens", size.calibration_tokens, "--window", size.window]
    calibrated = moemerge(
        "calibrate", *variants, *base, *tokens, *texts_of(calibration), "-o", out / "calibration"
    )
    if set(calibrated["reused"]) != set(VARIANTS):  # some have changed
        shutil.rmtree(bundle, ignore_errors=True)
    if not bundle.is_dir():
        moemerge(
            "merge", *variants, *base, "--budget", BUDGET, "--calibration", out / "calibration", "-o", bundle
        )
    moemerge("verify", bundle)
    shown = moemerge("show", bundle)
    originals = [part for variant in variants for part in ("--original", variant)]
    windows = ["--windows", 48, "--window", size.window]
    found = moemerge("eval", bundle, *base, *originals, *texts_of(tests), *windows)
    return {
        "budget": BUDGET,
        "bundle": shown,
        "eval": found,
        "answers": answers(bundle, out, size),
        "served": serve(bundle),
    }


def moemerge(*arguments: object) -> dict:
    """A command's data; its progress and messages go to standard error."""
    command = [sys.executable, "-m", "moemerge", *map(str, arguments), "--json"]
    print(f"moemerge {' '.join(command[3:-1])}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: moemerge {arguments[0]} ended with {done.returncode}\n{done.stdout}")
    return json.loads(done.stdout)["data"]


def write_texts(out: Path, size: Size, *, held_out: bool) -> dict[str, Path]:
    """Every variant's own kind of text: to calibrate on, or kept from training to measure on."""
    folder, random = out / "texts", Random(SEED + 3)
    dialogues = {
        "chat": partial(world.dialogue, random, 4, held_out=held_out),
        "preferred": partial(world.dialogue, random, 4, held_out=held_out, is_brief=True),
        "thinker": partial(sums.dialogue, random, 4, sums.HELD_OUT if held_out else sums.REWARDED),
    }
    count = size.calibration_tokens // 32
    texts = {"code": corpus.code(8 * size.calibration_tokens, held_out=held_out)}
    for name, dialogue in dialogues.items():
        tokenizer = load_tokenizer(out / name)
        texts[name] = "".join(tokenizer.apply_chat_template(dialogue(), tokenize=False) for _ in range(count))
    folder.mkdir(exist_ok=True)
    paths = {name: folder / f"{name}.{'test' if held_out else 'train'}.txt" for name in texts}
    for name, text in texts.items():
        paths[name].write_text(text, encoding="utf-8")
    return paths


def texts_of(paths: dict[str, Path]) -> list[str]:
    """Options for commands."""
    return [part for name, path in paths.items() for part in ("--text", f"{name}={path}")]


def held_out_questions(size: Size) -> list[Asked]:
    """For every variant that answers questions, in turns: neighbours in the file ask different variants."""
    random = Random(SEED + 4)
    asked = []
    for _ in range(size.questions):
        question, problem = world.question(random, held_out=True), sums.problem(random, sums.HELD_OUT)
        about_town = partial(world.is_right, question)
        asked += [
            Asked("chat", question.text, about_town),
            Asked("preferred", question.text, about_town),
            Asked("thinker", problem.text, partial(sums.is_right, problem)),
        ]
    return asked


def answers(bundle: Path, out: Path, size: Size) -> dict[str, dict[str, float]]:
    """Share of right answers: of each variant in transformers, and from the bundle in mixed batches."""
    asked = held_out_questions(size)
    requests, results = out / "requests.jsonl", out / "results.jsonl"
    lines = [
        {
            "variant": question.variant,
            "messages": [{"role": "user", "content": question.text}],
            "max_tokens": chat.ANSWER_TOKENS,
            "temperature": 0,
        }
        for question in asked
    ]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results.unlink(missing_ok=True)
    moemerge("run", bundle, "--input", requests, "--output", results, "--dtype", "float32")
    merged = [text_of(json.loads(line)) for line in results.read_text().splitlines()]
    return {
        name: {
            "by itself": share([a for a in asked if a.variant == name], by_itself(out / name, asked, name)),
            "from the bundle": share(
                [a for a in asked if a.variant == name],
                [text for a, text in zip(asked, merged, strict=True) if a.variant == name],
            ),
        }
        for name in ("chat", "preferred", "thinker")
    }


def text_of(result: dict) -> str:
    """An answer as the model wrote it; thinking was told apart."""
    return f"{result['reasoning']}\n</think>\n{result['text']}" if "reasoning" in result else result["text"]


def by_itself(folder: Path, asked: Sequence[Asked], name: str) -> list[str]:
    """A variant's answers to its questions without moemerge."""
    questions = [question.text for question in asked if question.variant == name]
    return ask(load_model(folder), load_tokenizer(folder), questions, max_tokens=chat.ANSWER_TOKENS)


def share(asked: Sequence[Asked], texts: Sequence[str]) -> float:
    """Of right answers."""
    return sum(a.is_right(text) for a, text in zip(asked, texts, strict=True)) / len(asked)


def serve(bundle: Path) -> dict[str, str]:
    """One request to every variant at the same time, over HTTP; the answers."""
    command = [
        sys.executable,
        "-m",
        "moemerge",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--drain",
        "0",
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = f"{wait_until_ready(server)['url']}/v1"
            with httpx.Client(base_url=url, timeout=PATIENCE_S) as http, ThreadPoolExecutor() as pool:
                return dict(zip(VARIANTS, pool.map(partial(request, http), VARIANTS), strict=True))
        finally:
            server.terminate()


def wait_until_ready(server: subprocess.Popen) -> dict:
    """The object that a server prints as soon as it listens."""
    lines = []
    for line in server.stdout:
        lines.append(line)
        if line.rstrip() == "}":
            return json.loads("".join(lines))["data"]
    sys.exit(f"error: moemerge serve ended with {server.wait()}")


def request(http: httpx.Client, variant: str) -> str:
    """What a variant answers."""
    settings = {"model": variant, "max_tokens": chat.ANSWER_TOKENS, "temperature": 0}
    if variant == "code":
        answer = http.post("/completions", json={**settings, "prompt": "def __init__(self"})
        return answer.raise_for_status().json()["choices"][0]["text"]
    asked = next(a for a in held_out_questions(Size(questions=1)) if a.variant == variant)
    messages = [{"role": "user", "content": asked.text}]
    answer = http.post("/chat/completions", json={**settings, "messages": messages})
    message = answer.raise_for_status().json()["choices"][0]["message"]
    return " / ".join((asked.text, *filter(None, (message.get("reasoning_content"), message["content"]))))
