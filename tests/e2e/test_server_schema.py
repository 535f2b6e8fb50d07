"""Schemathesis makes requests from the server's own description; no answer is a failure of the server."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.bundles import write_bundle
from tests.e2e.serving import serve

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


def test_nothing_that_the_description_suggests_breaks_the_server(tmp_path):
    with serve(write_bundle(tmp_path)) as served:
        environment = {
            **os.environ,
            "SCHEMATHESIS_HOOKS": "tests.e2e.schemathesis_hooks",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        done = subprocess.run(
            [
                Path(sys.executable).parent / "schemathesis", "run", f"{served.url}/openapi.json",
                "--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing", "--max-examples", "20",
                "--exclude-method", "DELETE", "--seed", "1", "--no-shrink", "--continue-on-failure",
                "--warnings", "off",
            ],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"\d{3,} generated, (\d+) passed", done.stdout)
        figures = served.http.get("/metrics").text
        # Enough of them came through to the engine.
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            line = f'moemerge_http_requests_total{{method="POST",path="{path}",status="200"}} '
            answered = re.search(re.escape(line) + r"(\d+)", figures)
            assert answered, path
            assert int(answered[1]) >= 3, path
        assert served.http.get("/ready").status_code == 200
        served.wait_until_idle()
