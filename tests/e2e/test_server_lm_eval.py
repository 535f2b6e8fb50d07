"""lm-eval's `local-completions` scores a task of its own format, without network, against the server."""

import json
import os
import subprocess
import sys

import torch

from moemerge.bundle.reader import open_bundle
from moemerge.runner.engine import Engine
from moemerge.runner.options import EngineOptions
from moemerge.text.variants import VariantText
from tests.e2e.serving import serve

ROWS = [
    {"question": "for x", "choices": [" in range", " zebra"], "answer": 0},
    {"question": "def test_", "choices": ["(self):", " king of"], "answer": 0},
    {"question": "import", "choices": [" os", " the Lord"], "answer": 0},
]
TASK = """\
task: next_words
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_task_of_log_likelihoods_is_scored_as_the_model_scores_it(mini_bundle, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "next_words.yaml").write_text(TASK.replace("ROWS", str(rows)))
    with serve(mini_bundle, engine={"dtype": "float32"}) as served:
        arguments = f"model=code,base_url={served.url}/v1/completions,tokenizer_backend=remote,max_length=512"
        # The tokenizer, too, comes from the server.
        done = subprocess.run(
            [
                sys.executable, "-m", "lm_eval", "run", "--model", "local-completions",
                "--model_args", arguments, "--include_path", str(tmp_path), "--tasks", "next_words",
                "--batch_size", "4", "--output_path", str(tmp_path / "out"), "--log_samples",
            ],
            cwd=tmp_path, env=offline(tmp_path), capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    logged = next((tmp_path / "out").rglob("samples_*.jsonl")).read_text().splitlines()
    samples = sorted(map(json.loads, logged), key=lambda sample: sample["doc_id"])
    expected = [[score(mini_bundle, row["question"], choice) for choice in row["choices"]] for row in ROWS]
    right = [scores.index(max(scores)) == row["answer"] for scores, row in zip(expected, ROWS, strict=True)]
    assert results["results"]["next_words"]["acc,none"] == sum(right) / len(right)
    for sample, scores in zip(samples, expected, strict=True):
        for (given,), (total, is_greedy) in zip(sample["resps"], scores, strict=True):
            assert abs(float(given[0]) - total) < 1e-2
            assert str(given[1]) == str(is_greedy)


def score(bundle, question, choice):
    """Log-likelihood of a choice after a question, and whether a greedy answer would be it."""
    engine = Engine(open_bundle(bundle), EngineOptions(dtype="float32"))
    text = VariantText(engine.bundle, "code")
    start = len(text.encode(question, add_special_tokens=False))
    token_ids = text.encode(question + choice, add_special_tokens=False)
    logits_TV = engine.logits("code", torch.tensor([token_ids]))[0].float()
    engine.close()
    chosen_TV = torch.log_softmax(logits_TV, -1)[start - 1 : -1]
    ids_T = torch.tensor(token_ids[start:])
    is_greedy = bool((chosen_TV.argmax(-1) == ids_T).all())
    return float(chosen_TV.gather(1, ids_T[:, None]).sum()), is_greedy


def offline(folder):
    switches = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    return {**os.environ, **switches, "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
